"""Programs: what a backend is asked to run, described without loading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionaccel.checkpoint import StoredTensor
from visionaccel.contracts import TensorSpec

__all__ = ["CHECKPOINT", "ONNX", "Program"]

ONNX = "onnx"
"""An ONNX model as bytes; its external data lies under `Program.folder`."""

CHECKPOINT = "checkpoint"
"""A Hugging Face checkpoint folder, for a backend that builds the tower from its weights."""


@dataclass(frozen=True)
class Program:
    """One artifact that computes an encoder, with named inputs and outputs.

    Attributes:
        family: The vision tower's architecture, such as `qwen2_5_vl`.
        format: What kind of artifact it is: `onnx`, `checkpoint`, or a plug-in's own name.
        folder: The checkpoint folder (`checkpoint`), or the folder that external-data locations start from (`onnx`).
        inputs: Tensors that a session takes.
        outputs: Tensors that a session returns.
        config: Sizes of the tower, as the checkpoint's configuration names them.
        weights: Where the tower's tensors lie, by their names below the checkpoint's prefix.
        uniform_frames: All frames of one call must have the same height and width in patches.
        model: Returns the artifact's bytes where it has any; called when a session opens, never by a probe.
    """

    family: str
    format: str
    folder: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    config: Mapping[str, Any] = field(compare=False, repr=False)
    weights: Mapping[str, StoredTensor] = field(compare=False, repr=False)
    uniform_frames: bool
    model: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)
