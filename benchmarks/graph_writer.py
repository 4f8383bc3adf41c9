"""Time and memory of writing the 7B tower's ONNX graph. No weight is read, so the weights file is a hole."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, hollow_checkpoint

CODE = """
import json, sys, time
from pathlib import Path
def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20
before, start = peak(), time.perf_counter()
from visionaccel.encoder import open_tower
model = open_tower(sys.argv[1]).onnx_model()
seconds = time.perf_counter() - start
import onnx
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
start = time.perf_counter()
open_tower(sys.argv[1]).onnx_model()
again = time.perf_counter() - start
start = time.perf_counter()
fixed = open_tower(sys.argv[1]).onnx_model(coverage=FixedGrid(Grid(1, 58, 74)))
print(json.dumps({
    "first graph, imports included, s": seconds,
    "second graph, s": again,
    "nodes": len(onnx.load_model_from_string(model).graph.node),
    "model, MB": len(model) / 1e6,
    "graph for 58x74, s": time.perf_counter() - start,
    "nodes for 58x74": len(onnx.load_model_from_string(fixed).graph.node),
    "model for 58x74, MB": len(fixed) / 1e6,
    "peak memory above the interpreter's own, GiB": peak() - before,
}))
"""


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        hollow_checkpoint(Path(folder), QWEN2_5_VL_7B)
        command = [sys.executable, "-c", CODE, folder]
        figures: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return figures
