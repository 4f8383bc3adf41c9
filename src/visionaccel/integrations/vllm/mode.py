"""Whether an engine encodes next to its steps or inside of them, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm.compat import engine_config, releases
from visionaccel.integrations.vllm.compat.contract import Feature, why_off
from visionaccel.integrations.vllm.pipelined import self_test
from visionaccel.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """How an engine encodes, and why."""

    mode: Literal["pipelined", "inline"]
    reason: str


def choose_mode(config: VllmConfig, settings: Settings) -> ModeChoice:
    """The mode that the settings name, or the best that is available.

    Raises:
        ConfigurationError: If the named one is not available.
    """
    named = engine_config.is_pipelined(config)
    if settings.mode == "inline":
        if named:
            raise ConfigurationError(
                f"VISIONACCEL_MODE=inline, but --ec-transfer-config names {engine_config.CONNECTOR}.",
                hint="Drop one of them.",
            )
        return ModeChoice("inline", "VISIONACCEL_MODE=inline")
    obstacles = engine_config.impossible_with_connector(config)
    if not named:  # to name it is the user's own choice: what the connector cannot see, it leaves to the step
        obstacles += engine_config.obstacles_to_pipelining(config)
    if named or settings.mode == "pipelined":
        by = f"--ec-transfer-config names {engine_config.CONNECTOR}" if named else "VISIONACCEL_MODE=pipelined"
        obstacles = obstacles or _unproven(config)
        if obstacles:
            raise ConfigurationError(
                f"{by}, but pipelined mode is not available: {'; '.join(obstacles)}.",
                hint=f"Change that, or {'leave the choice to visionaccel' if named else 'set VISIONACCEL_MODE=auto'}.",
            )
        return ModeChoice("pipelined", by)
    shared = _shared_device(config, settings)
    if shared is not None:
        obstacles.append(
            f"{shared} belongs to the language model, whose memory vLLM plans without a second process there"
        )
    obstacles = obstacles or _unproven(config)
    if obstacles:
        return ModeChoice("inline", "; ".join(obstacles))
    return ModeChoice("pipelined", "nothing is in its way")


def _unproven(config: VllmConfig) -> list[str]:
    """Why the connector cannot be relied on in this vLLM; empty if it can be. Asked last: it may take some seconds."""
    reason = why_off(Feature.PIPELINED)
    if reason is None:
        asynchronous = bool(config.scheduler_config.async_scheduling)
        reason = self_test.problem(contained=engine_config.can_contain(config), asynchronous=asynchronous)
        reason = reason and f"its self-test on vLLM {releases.release()} failed: {reason}"
    return [reason] if reason else []


def _shared_device(config: VllmConfig, settings: Settings) -> str | None:
    """A device of the settings that is of the language model's kind, and no CPU."""
    kind = engine_config.served_model(config).device.partition(":")[0]
    shared = [device for device in settings.wanted_devices if device and device.partition(":")[0] == kind != "cpu"]
    return shared[0] if shared else None
