"""Small, real models of three Qwen-VL generations that read handwritten digits.

The checkpoints are trained by `digits_vlm.train` with transformers' own classes, and their vision towers have every
structural trait of the released ones. So an encoder that shifts a grid, permutes a window or swaps deepstack levels
loses visible accuracy.
"""

from importlib import resources
from pathlib import Path

__all__ = ["checkpoint_path"]


def checkpoint_path(family: str = "qwen2_5_vl") -> Path:
    """Return the folder of a trained checkpoint: configuration, weights, tokenizer, processor and `score.json`.

    Args:
        family: `qwen2_vl`, `qwen2_5_vl` or `qwen3_vl`.

    Raises:
        ValueError: No reader of this family is included; the message lists those that are.
    """
    folder = Path(str(resources.files(__name__))) / "checkpoints"
    trained = sorted(path.name for path in folder.iterdir())
    if family not in trained:
        raise ValueError(f"no digits reader of family {family!r} is included; use one of {', '.join(trained)}")
    return folder / family
