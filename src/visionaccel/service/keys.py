"""Keys of items and of their embeddings: what must be equal for two embeddings to be the same."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np

from visionaccel.core.arrays import Array, as_numpy, dtype_name
from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel.encoder import Encoder


def item_key(patches: Array, grid: Grid, context: str = "") -> str:
    """A digest of one item's patches and grid, the same in every process. It releases the GIL while it computes.

    Args:
        patches: [P, patch_width], numpy or torch.
        grid: The item's grid.
        context: What else must be equal.
    """
    digest = hashlib.blake2b(repr((*grid.thw, context)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(as_numpy(patches)).view(np.uint8).data)
    return digest.hexdigest()


def embedding_key(patches: Array, grid: Grid, numbers: str, content: str | None = None) -> str:
    """What an item's embedding is kept under: its content, its grid, its dtype, and what computes it.

    Args:
        patches: The item's patches. They are read only where `content` is None.
        grid: Its grid.
        numbers: What `numerics` gives for the encoder.
        content: The caller's key of the patches' values, such as vLLM's hash.
    """
    context = f"{dtype_name(patches)} {numbers}"
    return item_key(patches, grid, context) if content is None else f"{content} {grid} {context}"


def numerics(encoder: Encoder, dtype: str) -> str:
    """What decides an encoder's numbers: backend, kind and model of the device, precision, options and programs.

    A program without a digest is identified by its weights' files and their states when they were verified.

    Args:
        encoder: An open encoder.
        dtype: The dtype that embeddings are kept in.
    """
    capabilities = encoder.capabilities
    parts = {
        "family": encoder.tower.family,
        "backend": encoder.backend,
        "device": re.sub(r"[:@]\d+$", "", capabilities.device),  # the kind
        "hardware": sorted({opened.session.capabilities.hardware for opened in encoder.programs}),
        "precision": capabilities.precision,
        "options": encoder.options,
        "dtype": dtype,
        "programs": sorted(_identity(opened.program) for opened in encoder.programs),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _identity(program: Program) -> str:
    if program.digest is not None:
        return program.digest
    files = sorted({f"{weight.file} {weight.origin}" for weight in program.weights.values()})
    return f"{program.name} {program.format} {program.precision} {program.coverage} {files}"
