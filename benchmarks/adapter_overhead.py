"""The adapter's own cost: everything in vLLM's `visual` except the backend's run, as a share of the whole.

448x448 pixels (1,024 patches) through a tower of the 7B shape with random bfloat16 weights on `onnxrt`. Lower bound:
the adapter must read each patch once (2.4 MB in bfloat16) and widen it to float32 (4.8 MB), which takes under 1 ms at
10 GB/s. The encode has 1.36 TFLOP.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch

from visionaccel.core.arrays import Array
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, random_checkpoint

GRID = (1, 32, 32)
RUNS = 5


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(Path(folder), QWEN2_5_VL_7B, dtype="bfloat16")
        with patch.dict(os.environ, {"VISIONACCEL_BACKEND": "onnxrt"}):
            return _measure(folder)


def _measure(folder: str) -> dict[str, float]:
    from visionaccel.integrations.vllm.compat.engine_config import ServedModel
    from visionaccel.integrations.vllm.inline.visual import AcceleratedTower

    served = ServedModel(
        source=folder,
        revision=None,
        named="Qwen2_5_VLForConditionalGeneration",
        replaces="Qwen2_5_VLForConditionalGeneration",
        multimodal=True,
        takes_media=True,
        own_implementation=True,
        dtype=torch.bfloat16,
        device="cpu",
        vision=QWEN2_5_VL_7B,
    )
    tower = AcceleratedTower(served)
    session = tower._encoder.result(time.monotonic()).primary.programs[0].session
    run, in_session = session.run, []

    def timed(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        start = time.perf_counter()
        outputs = run(inputs)
        in_session.append(time.perf_counter() - start)
        return outputs

    patches = torch.randn(GRID[0] * GRID[1] * GRID[2], 1176, dtype=torch.bfloat16)
    with patch.object(session, "run", timed):
        tower(patches, grid_thw=[GRID])
        in_session.clear()
        whole = []
        for _ in range(RUNS):
            start = time.perf_counter()
            tower(patches, grid_thw=[GRID])
            whole.append(time.perf_counter() - start)
    tower._encoder.close()
    own = [total - inner for total, inner in zip(whole, in_session, strict=True)]
    shares = [100 * part / total for part, total in zip(own, whole, strict=True)]
    return {
        "encode, s (median)": statistics.median(whole),
        "adapter's own, ms (median)": 1e3 * statistics.median(own),
        "adapter's own, % of the encode (median)": statistics.median(shares),
        "adapter's own, % of the encode (worst)": max(shares),
    }
