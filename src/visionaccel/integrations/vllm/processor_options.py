"""Options of the image processor (`mm_processor_kwargs`) that a server or a request may not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["changed_size", "normalisation_in", "without_normalisation"]

_SIZES = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
"""Options that decide what a row of patches is, and what the vision configuration calls them."""

_NORMALISATION = frozenset({"do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor"})


def changed_size(options: Mapping[str, Any], vision: Mapping[str, Any]) -> str | None:
    """The first option that would cut images in another way than the vision encoder takes them, as `name=value`.

    Args:
        options: Options, and those of one modality in a mapping of their own.
        vision: The vision tower's configuration.
    """
    for scope in _scopes(options):
        for name, size in _SIZES.items():
            if name in scope and size in vision and scope[name] != vision[size]:
                return f"{name}={scope[name]!r}"
    return None


def without_normalisation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that scale and shift pixel values.

    vLLM's own encoder does that on its device, by the checkpoint's processor configuration alone, and ignores these,
    whether the server or a request sets them.
    """
    kept = {name: value for name, value in options.items() if name not in _NORMALISATION}
    return {name: without_normalisation(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def normalisation_in(options: Mapping[str, Any]) -> list[str]:
    """Names of the options that scale and shift pixel values."""
    return sorted({name for scope in _scopes(options) for name in _NORMALISATION & scope.keys()})


def _scopes(options: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield options
    yield from (value for value in options.values() if isinstance(value, Mapping))
