"""Checkpoint folders: locating tensors, reading, copying and comparing them."""

from visionaccel.checkpoint.reading import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    locate_checkpoint,
    read_header,
    read_json,
)
from visionaccel.checkpoint.tensors import copy_to_memory, differing_weights, weights_digest, write_safetensors

__all__ = [
    "INDEX_FILE", "SINGLE_FILE", "Checkpoint", "copy_to_memory", "differing_weights", "locate_checkpoint",
    "read_header", "read_json", "weights_digest", "write_safetensors",
]  # fmt: skip
