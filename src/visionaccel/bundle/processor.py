"""The image processor's configuration, which determines how pixels become patches.

A bundle is bound to the settings that the patches of a given grid depend on, including defaults of the processor's
class. It is not bound to a file, because releases of transformers write the same processor in different ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionaccel.checkpoint import read_json
from visionaccel.core.digests import json_digest
from visionaccel.errors import CheckpointError, ConfigurationError

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that may contain it. The first, since transformers 5, also configures other processors."""

_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
"""The settings that patches depend on, with the defaults of the image processor of every implemented family.

The bounds on an image's pixels are not included: they determine its grid, which is passed with the patches.
"""

_SWITCHES = {
    "do_resize": ("resample",), "do_rescale": ("rescale_factor",), "do_normalize": ("image_mean", "image_std")
}  # fmt: skip
"""Settings that have no effect if a step is switched off."""

_CHANNELS = 3
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's names of its resampling filters, in the order of their numbers."""

_NAMES_OF_CLASSES = frozenset(
    {"feature_extractor_type", "image_processor_type", "processor_class", "_processor_class", "transformers_version"}
)


def processor_digest(folder: Path) -> str | None:
    """Return the digest of the settings that patches depend on; None if a checkpoint folder has no image processor.

    Raises:
        CheckpointError: If the file is malformed, or a setting has an invalid value.
    """
    found = _configuration(folder)
    return None if found is None else json_digest(_settings(*found))


def require_processor(stated: str | None, folder: Path, bundle: Path) -> None:
    """Refuse an image processor whose patches differ from those that a bundle was exported for.

    Bundles of earlier releases have a digest of the processor's whole file. It is accepted if it matches the folder's
    file, or the bundle's own file if that has the same settings as the folder's.

    Args:
        stated: The digest in the manifest; None if the bundle was exported without a processor.
        folder: The checkpoint whose processor will be used; if it has none, it is not refused here.
        bundle: The folder of the bundle or checkpoint.

    Raises:
        ConfigurationError: If the settings differ.
        CheckpointError: If a configuration is malformed.
    """
    found = processor_digest(folder)
    if stated is None or found is None or stated in (found, _file_digest(folder)):
        return
    if stated == _file_digest(bundle) and processor_digest(bundle) == found:
        return
    raise ConfigurationError(
        f"the encoder in {bundle} was made for a different image processor than that of {folder}: patch sizes, "
        f"resampling, "
        "rescaling or normalisation differ, or an earlier release made the bundle and the processor was saved again.",
        hint="Export a bundle from that checkpoint, or restore its preprocessor_config.json.",
    )


def _configuration(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the path of the image processor's configuration, and its content."""
    for name in PROCESSOR_FILES:
        if not (folder / name).exists():
            continue
        config: Any = read_json(folder / name)
        if name == PROCESSOR_FILES[0]:
            config = config.get("image_processor")
        if isinstance(config, dict):
            return folder / name, config
    return None


def _settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return each setting that patches depend on, in a canonical form."""
    found: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value: Any = default if config.get(name) is None else config[name]
        try:
            match default:
                case bool():
                    found[name] = {True: True, False: False}[value]
                case int():
                    found[name] = _FILTERS.index(value.lower()) if isinstance(value, str) else _whole(value)
                case float():
                    found[name] = float(value)
                case _:
                    several = value if isinstance(value, list | tuple) else [value] * _CHANNELS
                    found[name] = [float(each) for each in several]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: the image processor's {name} cannot be {str(value)[:40]!r}.", hint="Download the file again."
            ) from error
    for switch, names in _SWITCHES.items():
        if not found[switch]:
            found |= dict.fromkeys(names)
    return found


def _whole(value: Any) -> int:
    if isinstance(value, bool) or value != int(value):
        raise ValueError("not a whole number")
    return int(value)


def _file_digest(folder: Path) -> str | None:
    """Return the digest in manifests of earlier releases: of the whole configuration without Python class names."""
    found = _configuration(folder)
    if found is None:
        return None
    return json_digest({key: value for key, value in found[1].items() if key not in _NAMES_OF_CLASSES})
