"""Checkpoints that change while they are served: an encoder that opens later must not use the changed weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from visionaccel.checkpoint import locate_checkpoint
from visionaccel.families import tower_of

Change: TypeAlias = Literal["replaced", "rewritten"]
"""How files change: other files are renamed to their names, or others' bytes are written into them."""


def copy_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint, which may be changed, below a folder."""
    return Path(shutil.copytree(checkpoint, folder / "checkpoint"))


def change_weights(checkpoint: Path, change: Change) -> None:
    """Turn the sign of every vision weight of a checkpoint, so that what reads them encodes something else."""
    weights = tower_of(locate_checkpoint(checkpoint)).weights.values()
    for file in sorted({tensor.file for tensor in weights}):
        target = file
        if change == "replaced":
            target = file.with_suffix(".new")
            shutil.copyfile(file, target)
        negated = {each.offset: np.negative(each.read()).tobytes() for each in weights if each.file == file}
        with target.open("r+b") as written:
            for offset, data in negated.items():
                written.seek(offset)
                written.write(data)
        if change == "replaced":
            target.replace(file)
