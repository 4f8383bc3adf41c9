"""An image to patches of a known grid: transformers' processor against the pass over its table of levels, in turns.

One image has the size of its grid already, as what was fitted has; the other is resized from 1920x1080 to 1932x1092.
Both ways give the same bits, which is checked here too.
"""

from functools import partial

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from benchmarks.turns import medians
from visionaccel.images import ImageProcessor
from visionaccel_bench.serve.fixed_grid import FixedGridProcessor, resized

SIZES = ((1036, 812), (1920, 1080))
LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 12845056}


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    for kind in (Qwen2VLImageProcessorPil, Qwen2VLImageProcessor):
        processor = ImageProcessor(kind(size=LIMITS))
        for size in SIZES:
            image = _picture(*size)
            theirs, grid = processor(image)
            fixed = FixedGridProcessor(processor, grid)
            if not np.array_equal(fixed([image]), theirs):
                raise AssertionError(f"{processor.backend}: patches of {size} differ from the processor's")
            pixels = (grid.w * processor.patch_size, grid.h * processor.patch_size)
            seconds = medians(
                {
                    "processor": partial(processor, image),
                    "fused": partial(fixed, [image]),
                    "fused, its resize alone": partial(resized, processor, image, pixels),
                }
            )
            case = f"{processor.backend} {size[0]}x{size[1]}"
            figures |= {f"{case}, {name}, ms": 1e3 * median for name, median in seconds.items()}
            figures[f"{case}, processor : fused"] = seconds["processor"] / seconds["fused"]
            figures[f"{case}, fused, times the processor"] = seconds["fused"] / seconds["processor"]
    return figures


def _picture(width: int, height: int) -> Image.Image:
    """Something smooth with a little noise, as photographs are."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))
