"""Where the encoder of a served model comes from, and the proof that it belongs to that model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from visionaccel.backends import AUTO, default_registry, select
from visionaccel.bundle import Bundle, is_bundle, open_bundle
from visionaccel.bundle.opening import tower_digest
from visionaccel.bundle.processor import processor_digest, require_processor
from visionaccel.checkpoint import Checkpoint, locate_checkpoint
from visionaccel.cores import on_cores
from visionaccel.errors import CheckpointError, ConfigurationError
from visionaccel.families import Tower, tower_of
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import ServedModel
from visionaccel.program import AnyGrid, Coverage
from visionaccel.runtime.guarded import GuardedEncoder
from visionaccel.settings import Settings
from visionaccel.stripping import read_strip_note

__all__ = ["Grids", "announce", "grids_of", "open_served_encoder", "open_served_source"]


def open_served_source(model: str, revision: str | None, settings: Settings) -> Tower | Bundle:
    """The encoder that the settings name for a served model: a bundle, another checkpoint's, or its own.

    Args:
        model: Checkpoint folder or Hugging Face repository that is served.
        revision: That repository's revision.
        settings: The settings.

    Raises:
        ConfigurationError: If `VISIONACCEL_BUNDLE` is no folder, or is a bundle of another model.
        ArtifactError: If the bundle or checkpoint is broken.
    """
    if settings.bundle is None:
        return tower_of(locate_checkpoint(model, revision))
    if not settings.bundle.is_dir():
        raise ConfigurationError(
            f"VISIONACCEL_BUNDLE={str(settings.bundle)!r} is not a folder.",
            hint="Name an existing folder; `visionaccel pull` fetches a bundle from the hub.",
        )
    served = locate_checkpoint(model, revision)
    if not is_bundle(settings.bundle):
        tower = tower_of(locate_checkpoint(settings.bundle))
        _require_weights(served, tower_digest(tower), settings.bundle)
        require_processor(processor_digest(tower.checkpoint.folder), served.folder, settings.bundle)
        return tower
    bundle = open_bundle(settings.bundle, checkpoint=served)
    _require_weights(served, bundle.manifest.weights_digest, bundle.folder)
    require_processor(bundle.manifest.processor_digest, served.folder, bundle.folder)
    return bundle


def open_served_encoder(served: ServedModel, settings: Settings) -> Tower | Bundle:
    """As `open_served_source`, and its sizes are those that the served model needs.

    Raises:
        ConfigurationError: If the encoder was made for another model.
        ArtifactError: If the bundle or checkpoint is broken.
    """
    source = open_served_source(served.source, served.revision, settings)
    tower = source.tower if isinstance(source, Bundle) else source
    vision = served.vision
    wanted = (
        vision.out_hidden_size,
        vision.spatial_merge_size,
        vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
    )
    ours = (tower.out_width, tower.merge_size, tower.patch_width)
    if ours != wanted:
        raise ConfigurationError(
            f"the encoder in {settings.bundle or served.source} has embedding width, merge size and patch width "
            f"{ours}; the served model needs {wanted}.",
            hint="Point VISIONACCEL_BUNDLE at the encoder of the served model.",
        )
    return source


def announce(encoders: Iterable[GuardedEncoder], how: str) -> None:
    """Log what encodes, and how."""
    for encoder in encoders:
        primary = encoder.primary
        compat.logger().info(
            "visionaccel: the vision encoder runs on backend %r, device %s%s, %s arithmetic, %s, and takes %s; "
            "fallback: %s",
            primary.backend,
            primary.capabilities.device,
            " (simulated)" if primary.capabilities.simulated else "",
            primary.capabilities.precision,
            how,
            ", ".join(str(opened.program.coverage) for opened in primary.programs),
            ", ".join(stage.name for stage in encoder.stages[1:] if not stage.same) or "none",
        )


def _require_weights(served: Checkpoint, stated: str, folder: Path) -> None:
    """Refuse an encoder of other vision weights than the served checkpoint's.

    A checkpoint stripped of its vision weights keeps a note of their digest. One that has neither cannot be told apart
    from another of the same shape, and is taken at its word.
    """
    found = read_strip_note(served.folder)
    if found is None:
        try:
            found = tower_digest(tower_of(served))
        except CheckpointError:
            return
    if found != stated:
        raise ConfigurationError(
            f"the encoder in {folder} was made from other vision weights than those of {served.folder}.",
            hint="Export a bundle from the served checkpoint.",
        )


@dataclass(frozen=True)
class Grids:
    """Which grids the encoder of a served model takes, if that is not every one.

    Attributes:
        tower: The vision tower.
        coverages: What each program takes that the chosen backend accepts.
        rest: Another backend takes over what fits none.
    """

    tower: Tower
    coverages: tuple[Coverage, ...]
    rest: bool


def grids_of(model: str, revision: str | None, settings: Settings) -> Grids | None:
    """What the encoder of a served model will take, without opening it; None if that is every grid.

    Every process of vLLM that prepares images asks, and all come to the same answer: probes allocate nothing.

    Args:
        model: Checkpoint folder or Hugging Face repository that is served.
        revision: That repository's revision.
        settings: The settings.

    Raises:
        ConfigurationError: As `open_served_source`, or if the backend is unknown or broken.
        ArtifactError: If the bundle or checkpoint is broken.
    """
    if settings.bundle is None or not is_bundle(settings.bundle):
        return None  # An encoder from a checkpoint's weights takes every grid.
    source = open_served_source(model, revision, settings)
    tower = source.tower if isinstance(source, Bundle) else source
    with on_cores(compat.started_cores()):  # backends count cores when they are first asked, for good
        chosen = select(default_registry(), source, settings.backend or AUTO, settings.device).chosen
    if chosen is None:
        return None  # The engine will not start, or start with the fallback, which takes every grid.
    coverages = tuple(program.coverage for program in chosen.programs)
    return None if AnyGrid() in coverages else Grids(tower, coverages, bool(settings.fallback))
