"""Which features of the integration are on: those whose part of the contract holds in the vLLM that runs."""

from __future__ import annotations

from collections.abc import Callable

from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat.contract import WITHOUT, Feature

__all__ = ["is_on", "require_features", "why_off"]


def why_off(feature: Feature, architecture: str | None = None) -> str | None:
    """What a feature misses in this vLLM, for a log or an error; None if its contract holds.

    Args:
        feature: The feature.
        architecture: The model that it is for, if what it needs of that model counts too.
    """
    missing = compat.missing(feature, architecture)
    if not missing:
        return None
    return f"vLLM {compat.release()} is not what the {feature} feature needs: {'; '.join(missing)}"


def is_on(feature: Feature) -> bool:
    """Whether the contract of a feature holds."""
    return why_off(feature) is None


def require_features(served: Callable[[], str | None], limited_grids: Callable[[], bool]) -> None:
    """Log which features are off, and refuse to start where an answer could then be wrong.

    Args:
        served: The served architecture, if its class is replaced. Asked once what that stands on is known to hold.
        limited_grids: Whether the encoder's programs take some grids only. Asked if fitting is off.

    Raises:
        ConfigurationError: If the contract of the in-line mode does not hold, on which all else stands; or if that of
            fitting does not, and it is needed.
    """
    without = "Install a release of vLLM that docs/compatibility.md names, or unset VISIONACCEL_BACKEND."
    architecture = None
    reason = why_off(Feature.INLINE)
    if reason is None:
        architecture = served()
        reason = why_off(Feature.INLINE, architecture)
    if reason is not None:
        raise ConfigurationError(f"the vision encoder cannot be replaced: {reason}.", hint=without)
    reason = why_off(Feature.FITTING, architecture)
    if reason is not None and limited_grids():
        raise ConfigurationError(
            f"the encoder's programs take some image sizes only, and images cannot be fitted to them: {reason}.",
            hint=f"Use a bundle with a dynamic program. {without}",
        )
    for feature in Feature:
        reason = why_off(feature, architecture)
        if reason is not None:
            compat.logger().warning("visionaccel: %s. Without it, %s.", reason, WITHOUT[feature])
