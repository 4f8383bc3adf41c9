"""Every error this package raises, in one hierarchy.

Four branches tell apart whose fault it is, because callers treat them differently: bad data of one call (`InputError`:
fail that request), a wrong set-up (`ConfigurationError`: refuse to start), a broken or foreign file (`ArtifactError`:
fetch it again) and a device that failed (`DeviceError`: retry or fall back).
"""

__all__ = [
    "AccuracyError",
    "ArtifactError",
    "BackendUnavailableError",
    "BundleError",
    "CheckpointError",
    "ConfigurationError",
    "DeadlineError",
    "DeviceError",
    "DeviceLostError",
    "DuplicateBackendError",
    "GridError",
    "InputError",
    "NonFiniteError",
    "OutputError",
    "PatchesError",
    "PluginError",
    "QueueFullError",
    "ServiceClosedError",
    "SettingsError",
    "UnfitGridError",
    "UnknownBackendError",
    "UnsupportedArchitectureError",
    "VisionAccelError",
]


class VisionAccelError(Exception):
    """Base of all errors of this package.

    Args:
        message: What was wrong and where.
        hint: What to do about it; printed after the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[VisionAccelError], message: str, hint: str | None) -> VisionAccelError:
    """Unpickles an error: its hint is a keyword, which the default protocol cannot pass."""
    return kind(message, hint=hint)


class InputError(VisionAccelError, ValueError):
    """The caller's data is wrong. Only this call fails; the encoder stays usable."""


class GridError(InputError):
    """A grid is malformed, empty, or not divisible by the merge size."""


class UnfitGridError(GridError):
    """No program of the encoder takes the grid. Another encoder may, so a fallback is asked."""


class PatchesError(InputError):
    """Patches have the wrong shape or dtype, or disagree with their grids."""


class NonFiniteError(InputError):
    """Patches hold NaN or infinity."""


class ConfigurationError(VisionAccelError):
    """The set-up cannot work; nothing was started."""


class SettingsError(ConfigurationError):
    """A setting or option is unknown or has an invalid value."""


class UnknownBackendError(ConfigurationError):
    """No installed distribution provides the named backend."""


class DuplicateBackendError(ConfigurationError):
    """Two installed distributions provide a backend of one name."""


class PluginError(ConfigurationError):
    """A plug-in could not be imported or does not honour the contract."""


class BackendUnavailableError(ConfigurationError):
    """The named backend, or every candidate, refused the program on this machine."""


class ArtifactError(VisionAccelError):
    """A model file is broken, incomplete, or not what it should be."""


class CheckpointError(ArtifactError):
    """A checkpoint folder or one of its files is missing, truncated or inconsistent."""


class BundleError(ArtifactError):
    """A bundle's manifest or one of its files is missing, damaged, or not what the manifest says."""


class AccuracyError(ArtifactError):
    """A program that was just made is too far from the float32 reference; it was not kept."""


class UnsupportedArchitectureError(ArtifactError):
    """The checkpoint's vision tower is of a family that is not implemented."""


class DeviceError(VisionAccelError, RuntimeError):
    """A backend or its device failed on valid input."""


class DeviceLostError(DeviceError):
    """A device's process died, or was ended because it hung. A new one is started."""


class DeadlineError(DeviceError, TimeoutError):
    """An item's embedding was not there by its deadline."""


class QueueFullError(DeviceError):
    """As many items wait for the encoder as may. Nothing was begun; try again later."""


class ServiceClosedError(DeviceError):
    """The encode service was closed before the item was encoded."""


class OutputError(DeviceError):
    """A backend returned something other than it promised: shape, dtype, or non-finite values."""
