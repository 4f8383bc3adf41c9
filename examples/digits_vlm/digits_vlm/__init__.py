"""A small, real Qwen2.5-VL that reads handwritten digits.

The checkpoint is trained by `digits_vlm.train` with transformers' own classes and has every structural trait of the 7B
vision tower: window attention with partial windows, full-attention layers, 2x2 patch merging and axial rotary
positions. So an encoder that shifts a grid or permutes a window loses visible accuracy.
"""

from importlib import resources
from pathlib import Path

__all__ = ["checkpoint_path"]


def checkpoint_path() -> Path:
    """Return the folder of the trained checkpoint: configuration, weights, tokenizer, processor and `score.json`."""
    return Path(str(resources.files(__name__))) / "checkpoint"
