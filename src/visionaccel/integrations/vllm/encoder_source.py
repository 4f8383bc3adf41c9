"""Opens the source of a served model's encoder, and checks that it belongs to that model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from visionaccel.backends import AUTO, default_registry, select
from visionaccel.bundle import (
    STRIP_NOTE,
    Bundle,
    is_bundle,
    open_bundle,
    processor_digest,
    read_strip_note,
    require_processor,
    tower_digest,
)
from visionaccel.checkpoint import Checkpoint, locate_checkpoint
from visionaccel.core.cores import on_cores
from visionaccel.core.program import AnyGrid, Coverage
from visionaccel.errors import ArtifactError, CheckpointError, ConfigurationError
from visionaccel.families import Tower, family_of, tower_of
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import weight_files, worker
from visionaccel.integrations.vllm.compat.engine_config import ServedModel
from visionaccel.integrations.vllm.reloading import source_digest
from visionaccel.settings import Settings
from visionaccel.trust import GuardedEncoder


def served_tower(served: ServedModel, stored: Checkpoint) -> Tower:
    """The vision tower that vLLM serves: the checkpoint's files under the configuration that vLLM has resolved."""
    if served.replaces is None or served.vision is None:
        return tower_of(stored)
    resolved = copy(stored)
    resolved.config = {**stored.config, "architectures": [served.replaces]}
    resolved.config = family_of(resolved).with_configuration(resolved.config, served.vision)
    tower = tower_of(resolved)
    with suppress(ArtifactError):
        unchanged = tower_of(stored)
        if unchanged.spec == tower.spec:
            return unchanged
    return tower


def implemented_epsilon(served: ServedModel) -> float:
    """What the tower of a served model adds to variances, by the family's description of it."""
    folder = weight_files.settings_folder(served.source, served.revision)
    return served_tower(served, Checkpoint(folder, files=())).spec.norm1.epsilon


def open_served_source(served: ServedModel, settings: Settings) -> Tower | Bundle:
    """The encoder that the settings name for a served model: a bundle, another checkpoint's, or its own.

    Raises:
        ConfigurationError: If `VISIONACCEL_BUNDLE` is not a folder, or is a bundle of another model.
        ArtifactError: If the bundle or checkpoint is broken.
    """
    stored = _served_checkpoint(served)
    wanted = served_tower(served, stored)
    if settings.bundle is None:
        if wanted.stored_names:
            _ = wanted.weights  # an encoder that is opened late reads these files, and not what replaced them
        return wanted
    if not settings.bundle.is_dir():
        raise ConfigurationError(
            f"VISIONACCEL_BUNDLE={str(settings.bundle)!r} is not a folder.",
            hint="Name an existing folder; `visionaccel pull` fetches a bundle from the hub.",
        )
    source: Tower | Bundle
    if is_bundle(settings.bundle):
        source = open_bundle(settings.bundle, checkpoint=stored)
        processor = source.manifest.processor_digest
    else:
        source = tower_of(locate_checkpoint(settings.bundle))
        processor = processor_digest(source.tower.checkpoint.folder)
    _require_weights(wanted, source_digest(source), settings.bundle)
    require_processor(processor, stored.folder, settings.bundle)
    if wanted.spec != source.tower.spec:
        raise ConfigurationError(
            f"the encoder in {settings.bundle} was made for another vision configuration than the one that is served: "
            f"{source.tower.spec.differing(wanted.spec)}.",
            hint="Point VISIONACCEL_BUNDLE at the encoder of the served model, or drop the --hf-overrides that change "
            "the vision tower.",
        )
    return source


def stated_source(served: ServedModel, settings: Settings, used: Tower | Bundle | None) -> Tower | Bundle | None:
    """The encoder of a checkpoint that was stripped of other vision weights than those in use; an error without one.

    None if the checkpoint has vision weights, or no note that names others than those in use. `used` is what encodes
    now, or None if that does not have the weights that were served before.
    """
    folder = weight_files.settings_folder(served.source, served.revision)
    stated = read_strip_note(folder)
    if stated is None or (used is not None and stated == source_digest(used)):
        return None
    if served_tower(served, _served_checkpoint(served)).stored_names:
        return None
    if settings.bundle is None:
        raise ConfigurationError(
            f"{folder} was stripped of other vision weights than those that the vision encoder has.",
            hint="Load the checkpoint with its vision weights, or start the server with VISIONACCEL_BUNDLE.",
        )
    return open_served_source(served, settings)


def _served_checkpoint(served: ServedModel) -> Checkpoint:
    """The files that vLLM loads, downloaded by vLLM if they are not there."""
    folder = weight_files.settings_folder(served.source, served.revision)
    return Checkpoint(folder, files=weight_files.weight_files(served.source, served.revision, served.load))


def announce(encoders: Sequence[GuardedEncoder], how: str, on_drift: Callable[[], None]) -> None:
    """Log what encodes, and how; `on_drift` is called when one of its devices is distrusted."""
    for link in {link for encoder in encoders for link in encoder.links}:
        link.on_drift(on_drift)
    for encoder in encoders:
        primary, capabilities = encoder.primary, encoder.primary.capabilities
        takes = ", ".join(str(opened.program.coverage) for opened in primary.programs)
        fallback = ", ".join(link.name for link in encoder.links[1:] if not link.same) or "none"
        compat.logger().info(
            f"visionaccel: the vision encoder runs on backend {primary.backend!r}, device {capabilities.device}"
            f"{' (simulated)' if capabilities.simulated else ''}, {capabilities.precision} arithmetic, {how}, and "
            f"takes {takes}; fallback: {fallback}"
        )


def _require_weights(served: Tower, stated: str, folder: Path) -> None:
    """Refuse an encoder of other vision weights than the served checkpoint's.

    A checkpoint stripped of its vision weights keeps a note of their digest. One without a note is trusted.
    """
    noted = read_strip_note(served.checkpoint.folder)
    found = tower_digest(served) if served.stored_names else noted
    if found is None:
        return
    if noted not in (None, found):
        raise CheckpointError(
            f"{served.checkpoint.folder} holds other vision weights than those that its {STRIP_NOTE} says were taken "
            "out.",
            hint=f"Remove {STRIP_NOTE} if the weights are right, or strip the checkpoint again.",
        )
    if found != stated:
        raise ConfigurationError(
            f"the encoder in {folder} was made from other vision weights than those of {served.checkpoint.folder}.",
            hint="Export a bundle from the served checkpoint.",
        )


@dataclass(frozen=True)
class Grids:
    """Which grids the encoder of a served model takes, if it does not take every one."""

    tower: Tower
    coverages: tuple[Coverage, ...]  # of each program that the chosen backend accepts
    rest: bool  # a fallback takes what fits none

    def __str__(self) -> str:
        return "; ".join(map(str, self.coverages))


def grids_of(served: ServedModel, settings: Settings) -> Grids | None:
    """What the encoder of a served model will take, without opening it; None if that is every grid.

    Every process of vLLM that prepares images asks, and gets the same answer.
    """
    if settings.bundle is None or not is_bundle(settings.bundle):
        return None  # An encoder from a checkpoint's weights takes every grid.
    source = open_served_source(served, settings)
    with on_cores(worker.started_cores()):  # backends count cores once, when they are first asked
        chosen = select(default_registry(), source, settings.backend or AUTO, settings.device).chosen
    if chosen is None:
        return None  # The engine will not start, or start with the fallback, which takes every grid.
    coverages = tuple(program.coverage for program in chosen.programs)
    return None if AnyGrid() in coverages else Grids(source.tower, coverages, bool(settings.fallback))
