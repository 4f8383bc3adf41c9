"""Every error this package raises, in one hierarchy.

Four branches tell apart what failed, because callers treat them differently: bad data of one call (`InputError`:
fail that request), a wrong set-up (`ConfigurationError`: refuse to start), a broken or unsupported file
(`ArtifactError`: fetch it again) and a device that failed (`DeviceError`: retry or fall back).

The first paragraph of each class says when it is raised, and the one that begins with `To do:` what to do. The hint of
an error says what to do in its case, with the names in it.
"""

from functools import partial

from visionaccel.core.safe_text import lines

__all__ = [
    "AccuracyError", "ArtifactError", "BackendUnavailableError", "BundleError", "ChangedFileError", "CheckpointError",
    "ConfigurationError", "DeadlineError", "DeviceError", "DeviceLostError", "DuplicateBackendError", "GridError",
    "InputError", "NonFiniteError", "OutputError", "PatchesError", "PluginError", "QueueFullError",
    "ServiceClosedError", "SettingsError", "UnfitGridError", "UnknownBackendError", "UnsupportedArchitectureError",
    "VisionAccelError",
]  # fmt: skip


class VisionAccelError(Exception):
    """Base of all errors of this package.

    Both texts are made safe to show, because they quote files and devices.

    Args:
        message: What was wrong and where.
        hint: What to do about it; printed after the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message, hint = lines(message), None if hint is None else lines(hint)
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), self.message, hint=self.hint), ()  # the default protocol cannot pass a keyword


class InputError(VisionAccelError, ValueError):
    """The caller's data is wrong. Only this call fails; the encoder stays usable.

    To do: Fail that request only. Pass what the model's own processor returns, unchanged.
    """


class GridError(InputError):
    """A grid is malformed, empty, or not divisible by the merge size.

    To do: Pass the `image_grid_thw` or `video_grid_thw` that came with the patches, as integers (t, h, w).
    """


class UnfitGridError(GridError):
    """No program of the encoder accepts the grid. A fallback is tried, which may accept it.

    To do: Fit the image to a grid that the message lists (`VISIONACCEL_FIT` in vLLM), set `VISIONACCEL_FALLBACK`, or
    export a program for the grid.
    """


class PatchesError(InputError):
    """Patches have the wrong shape or dtype, or disagree with their grids.

    To do: Pass `pixel_values` and grids from the same call of the processor.
    """


class NonFiniteError(InputError):
    """Patches contain NaN or infinity.

    To do: Check the image that the message names, and its normalisation.
    """


class ConfigurationError(VisionAccelError):
    """The set-up cannot work; nothing was started.

    To do: Change the setting, option or argument that the message names. A retry does not help.
    """

    @staticmethod
    def missing_extra(what: str, module: str | None, extra: str) -> "ConfigurationError":
        """Make the error for `what`, such as `reading image files`, whose `module` the extra would install.

        An extra is a name such as `visionaccel[images]`.
        """
        return ConfigurationError(
            f"{what} needs {module}, which is not installed.", hint=f"Install it: pip install '{extra}'."
        )


class SettingsError(ConfigurationError):
    """A setting or option is unknown or has an invalid value.

    To do: Use one that the table of settings, `visionaccel backends` or `--help` lists.
    """


class UnknownBackendError(ConfigurationError):
    """No installed distribution provides the named backend.

    To do: Install its plug-in into the same environment, or choose a backend that `visionaccel backends` lists.
    """


class DuplicateBackendError(ConfigurationError):
    """Two installed distributions provide a backend of the same name.

    To do: Uninstall one of the two that the message names.
    """


class PluginError(ConfigurationError):
    """A plug-in could not be imported or does not follow the contract.

    To do: Reinstall the distribution that the message names; if that does not help, report it to its authors.
    """


class BackendUnavailableError(ConfigurationError):
    """The named backend, or every candidate, refused the program on this machine.

    To do: Follow the hint after each refusal; `visionaccel explain` and `visionaccel doctor` say more.
    """


class ArtifactError(VisionAccelError):
    """A model file is broken, incomplete, or not the expected one.

    To do: Fetch or make the file again. Do not edit it: edited files are refused.
    """


class CheckpointError(ArtifactError):
    """A checkpoint folder or one of its files is missing, truncated or inconsistent.

    To do: Download all files of one revision of the checkpoint again; run `git lfs pull` if it was cloned.
    """


class BundleError(ArtifactError):
    """A bundle's manifest or one of its files is missing or damaged, or does not match the manifest.

    To do: Export, import or pull the bundle again. Do not use a bundle whose paths point outside its folder.
    """


class ChangedFileError(ArtifactError):
    """A file of the encoder changed after it was verified, so nothing was opened from it.

    To do: Restart the server or open the encoder again, which verifies the files as they are now. Put new files into a
    new folder rather than into one that is in use.
    """


class AccuracyError(ArtifactError):
    """A new program differs too much from the float32 reference and was discarded.

    To do: Calibrate with images like those that will be encoded, or keep the bundle's precision.
    """


class UnsupportedArchitectureError(ArtifactError):
    """The checkpoint's vision tower belongs to an unsupported family.

    To do: Unset `VISIONACCEL_BACKEND`, so that vLLM runs the tower itself, or use a checkpoint of a family that the
    hint lists.
    """


class DeviceError(VisionAccelError, RuntimeError):
    """A backend or its device failed on valid input.

    To do: Try again, or set `VISIONACCEL_FALLBACK`. If the error persists, `visionaccel doctor` checks drivers and
    libraries.
    """


class DeviceLostError(DeviceError):
    """A device's process died, or was ended because it hung. It is restarted.

    To do: Try again. A device that is only slow needs a longer `VISIONACCEL_DEADLINE` or `VISIONACCEL_OPEN_DEADLINE`.
    """


class DeadlineError(DeviceError, TimeoutError):
    """An item's embedding was not ready by its deadline.

    To do: Try again, raise the deadline, or run a device that hangs in a child process
    (`VISIONACCEL_ISOLATION=process`).
    """


class QueueFullError(DeviceError):
    """The encoder's queue is full. Nothing was started.

    To do: Try again later, raise the queue's size, or add devices.
    """


class ServiceClosedError(DeviceError):
    """The encode service was closed before the item was encoded.

    To do: Open a new one.
    """


class OutputError(DeviceError):
    """A backend returned a tensor with the wrong shape or dtype, NaN or infinity, or rows that were not computed.

    To do: Do not use that backend for this program until `visionaccel validate` passes; report it to its authors.
    """
