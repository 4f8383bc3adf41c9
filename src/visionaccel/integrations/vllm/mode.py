"""Whether an engine encodes beside its steps or inside of them, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm import compat
from visionaccel.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["Choice", "choose_mode"]


@dataclass(frozen=True, slots=True)
class Choice:
    """How an engine encodes.

    Attributes:
        mode: `pipelined`, or `inline`.
        reason: Why.
    """

    mode: Literal["pipelined", "inline"]
    reason: str


def choose_mode(config: VllmConfig, settings: Settings) -> Choice:
    """The mode that the settings name, or the best that can be had.

    Raises:
        ConfigurationError: If the named one cannot be had.
    """
    named = compat.is_pipelined(config)
    if settings.mode == "inline":
        if named:
            raise ConfigurationError(
                f"VISIONACCEL_MODE=inline, but --ec-transfer-config names {compat.CONNECTOR}.",
                hint="Drop one of them.",
            )
        return Choice("inline", "VISIONACCEL_MODE=inline")
    impossible = compat.impossible_with_connector(config)
    if named:
        if impossible:
            raise ConfigurationError(
                f"--ec-transfer-config names {compat.CONNECTOR}, but that cannot work: {'; '.join(impossible)}.",
                hint="Change that, or leave the choice to visionaccel.",
            )
        # The user's own choice of vLLM's means: what the connector cannot see, it leaves to the step.
        return Choice("pipelined", f"--ec-transfer-config names {compat.CONNECTOR}")
    obstacles = impossible + compat.obstacles_to_pipelining(config)
    if settings.mode == "pipelined":
        if obstacles:
            raise ConfigurationError(
                f"VISIONACCEL_MODE=pipelined cannot be had: {'; '.join(obstacles)}.",
                hint="Change that, or set VISIONACCEL_MODE=auto.",
            )
        return Choice("pipelined", "VISIONACCEL_MODE=pipelined")
    shared = _shared_device(config, settings)
    if shared is not None:
        obstacles.append(
            f"{shared} belongs to the language model, whose memory vLLM plans without a second process there"
        )
    if obstacles:
        return Choice("inline", "; ".join(obstacles))
    return Choice("pipelined", "nothing is in its way")


def _shared_device(config: VllmConfig, settings: Settings) -> str | None:
    """A device of the settings that is of the language model's kind, and no CPU."""
    kind = compat.served_model(config).device.partition(":")[0]
    shared = [device for device in settings.wanted_devices if device and device.partition(":")[0] == kind != "cpu"]
    return shared[0] if shared else None
