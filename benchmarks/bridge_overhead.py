"""The C++ bridge's own cost: a call through bridge and simulator, minus the simulator's own computation.

Inputs and outputs are those of the 7B tower at 58x74, float32 [1073, 4, 1280] and [1073, 3584]; between them is one
block instead of 32, whose time is not counted. Lower bound: the bridge writes the output once, to poison it (15 MB,
half a millisecond at 30 GB/s), while the host works; apart from that it only describes two tensors.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_encoder, open_tower
from visionaccel_flexmlrt.runtime import SIMULATOR, AmdEnvironment, load
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai
from visionaccel_flexmlrt.vitisai.writing import write_vitisai_folder
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, random_checkpoint

GRID = Grid(1, 58, 74)
RUNS = 15


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {**QWEN2_5_VL_7B, "depth": 1, "fullatt_block_indexes": []}
        tower = open_tower(random_checkpoint(folder / "checkpoint", config, dtype="bfloat16"))
        write_vitisai_folder(tower, folder / "compiled", GRID, layout="rai", compile=compile_partition)
        imported = import_vitisai(tower, [ImportRequest(folder / "compiled")], folder / "bundle")
        patches = np.random.default_rng(0).standard_normal((GRID.patches, tower.patch_width), dtype=np.float32)
        simulator = load(SIMULATOR, AmdEnvironment())
        own: list[float] = []
        with open_encoder(imported.bundle, backend="flexmlrt", device=SIMULATOR, isolation="none") as encoder:
            session = encoder.programs[0].session
            run = session.run

            def timed(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
                start = time.perf_counter()
                outputs = run(inputs)
                own.append(time.perf_counter() - start - simulator.last_forward_seconds())
                return outputs

            with patch.object(session, "run", timed):
                for _ in range(RUNS):
                    encoder.encode(patches, [GRID])
    return {
        "bridge's own, ms (median)": 1e3 * statistics.median(own),
        "bridge's own, ms (worst)": 1e3 * max(own),
    }
