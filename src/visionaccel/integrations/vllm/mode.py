"""Whether an engine encodes beside its steps or inside of them, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat.contract import Feature
from visionaccel.integrations.vllm.features import why_off
from visionaccel.integrations.vllm.pipelined import self_test
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
    """The mode that the settings name, or the best that is available.

    Raises:
        ConfigurationError: If the named one is not available.
    """
    named = compat.is_pipelined(config)
    if settings.mode == "inline":
        if named:
            raise ConfigurationError(
                f"VISIONACCEL_MODE=inline, but --ec-transfer-config names {compat.CONNECTOR}.",
                hint="Drop one of them.",
            )
        return Choice("inline", "VISIONACCEL_MODE=inline")
    obstacles = compat.impossible_with_connector(config)
    if not named:  # to name it is the user's own choice: what the connector cannot see, it leaves to the step
        obstacles += compat.obstacles_to_pipelining(config)
    if named or settings.mode == "pipelined":
        obstacles = obstacles or _unproven(config)
        if named and obstacles:
            raise ConfigurationError(
                f"--ec-transfer-config names {compat.CONNECTOR}, but pipelined mode is not available: "
                f"{'; '.join(obstacles)}.",
                hint="Change that, or leave the choice to visionaccel.",
            )
        if obstacles:
            raise ConfigurationError(
                f"VISIONACCEL_MODE=pipelined, but pipelined mode is not available: {'; '.join(obstacles)}.",
                hint="Change that, or set VISIONACCEL_MODE=auto.",
            )
        by = f"--ec-transfer-config names {compat.CONNECTOR}" if named else "VISIONACCEL_MODE=pipelined"
        return Choice("pipelined", by)
    shared = _shared_device(config, settings)
    if shared is not None:
        obstacles.append(
            f"{shared} belongs to the language model, whose memory vLLM plans without a second process there"
        )
    obstacles = obstacles or _unproven(config)
    if obstacles:
        return Choice("inline", "; ".join(obstacles))
    return Choice("pipelined", "nothing is in its way")


def _unproven(config: VllmConfig) -> list[str]:
    """Why the connector cannot be relied on in this vLLM; empty if it can be. Asked last: it may take some seconds."""
    reason = why_off(Feature.PIPELINED)
    if reason is None:
        asynchronous = bool(config.scheduler_config.async_scheduling)
        reason = self_test.problem(contained=compat.can_contain(config), asynchronous=asynchronous)
        reason = reason and f"its self-test on vLLM {compat.release()} failed: {reason}"
    return [reason] if reason else []


def _shared_device(config: VllmConfig, settings: Settings) -> str | None:
    """A device of the settings that is of the language model's kind, and no CPU."""
    kind = compat.served_model(config).device.partition(":")[0]
    shared = [device for device in settings.wanted_devices if device and device.partition(":")[0] == kind != "cpu"]
    return shared[0] if shared else None
