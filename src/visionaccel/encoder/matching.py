"""Opens an encoder that is to take the place of a model's own tower, and checks that it belongs to that model."""

from __future__ import annotations

from pathlib import Path

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
from visionaccel.errors import CheckpointError, ConfigurationError
from visionaccel.families import Tower, tower_of


def open_matching(folder: Path, wanted: Tower, stored: Checkpoint, *, model: str | None = None) -> Tower | Bundle:
    """Open the bundle or checkpoint in a folder as the encoder of a model that has the tower `wanted`.

    Args:
        folder: The setting `VISIONACCEL_BUNDLE`.
        wanted: The tower of the model, with the configuration that its engine uses.
        stored: The files of that model.
        model: What messages call the model, if it is not the folder of its files.

    Raises:
        ConfigurationError: If it is not a folder, or the encoder was made for another configuration, other weights or
            another image processor.
        ArtifactError: If the bundle or checkpoint is broken.
    """
    if not folder.is_dir():
        raise ConfigurationError(
            f"the bundle {str(folder)!r} is not a folder.",
            hint="Pass an existing folder, or set VISIONACCEL_BUNDLE to one; `visionaccel pull` fetches bundles.",
        )
    source: Tower | Bundle
    if is_bundle(folder):
        source = open_bundle(folder, checkpoint=stored)
        processor = source.manifest.processor_digest
    else:
        source = tower_of(locate_checkpoint(folder))
        processor = processor_digest(source.tower.checkpoint.folder)
    _require_weights(wanted, source_digest(source), folder, model or str(wanted.checkpoint.folder))
    require_processor(processor, stored.folder, folder)
    if wanted.spec != source.tower.spec:
        raise ConfigurationError(
            f"the encoder in {folder} was made for a different vision configuration than the served one: "
            f"{source.tower.spec.differing(wanted.spec)}.",
            hint="Point VISIONACCEL_BUNDLE at the encoder of the served model, or drop the --hf-overrides that change "
            "the vision tower.",
        )
    return source


def source_digest(source: Tower | Bundle) -> str:
    """Return the digest of an encoder's weights."""
    return source.manifest.weights_digest if isinstance(source, Bundle) else tower_digest(source)


def _require_weights(served: Tower, digest: str, folder: Path, model: str) -> None:
    """Refuse an encoder of other vision weights than the served checkpoint's.

    A checkpoint stripped of its vision weights keeps a note of their digest. Without a note it is trusted.
    """
    noted = read_strip_note(served.checkpoint.folder)
    found = tower_digest(served) if served.stored_names else noted
    if found is None:
        return
    if noted not in (None, found):
        raise CheckpointError(
            f"{served.checkpoint.folder} contains vision weights, but not those that were removed according to its "
            f"{STRIP_NOTE}.",
            hint=f"Remove {STRIP_NOTE} if the weights are right, or strip the checkpoint again.",
        )
    if found != digest:
        raise ConfigurationError(
            f"the encoder in {folder} was made from different vision weights than those of {model}.",
            hint="Export a bundle from that model. A model in memory must be in the dtype of its checkpoint.",
        )
