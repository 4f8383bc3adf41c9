"""Programs for FlexMLRT's simulator, made from a tower without a bundle around them."""

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import openvino
import pytest

from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid, Program
from visionaccel.families import Tower
from visionaccel_flexmlrt.artifact import FLEXMLRT_DIRECTORY, FLEXMLRT_RAI
from visionaccel_flexmlrt.simulator import compile_partition

GRID = Grid(1, 8, 12)


def simulated_precision() -> Literal["float32", "bfloat16"]:
    """What the simulator computes in here: bfloat16 as the NPU does, where the processor can."""
    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if "BF16" in known else "float32"


def requires_bfloat16():
    """Skip the test where OpenVINO does not compute in bfloat16 on this processor."""
    if simulated_precision() != "bfloat16":
        pytest.skip("this CPU does not compute in bfloat16")


def simulated_program(
    tower: Tower,
    folder: Path,
    grid: Grid,
    *,
    layout: Literal["rai", "directory"] = "rai",
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Program:
    """A program of one grid for the simulator; the weights must lie in one folder."""
    coverage = FixedGrid(grid)
    split = tower.split(coverage)
    partition = folder / "partition.onnx"
    for file in {tensor.file for tensor in tower.weights.values()}:
        shutil.copyfile(file, folder / file.name)  # a hard link would change the state of the checkpoint's file
    partition.write_bytes(tower.onnx_model(coverage=coverage, host=split))
    if layout == "rai":
        artifact = binary = folder / "vision.rai"
    else:
        place = folder / "vaiml_par_0"
        place.mkdir()
        artifact, binary = place / "partition-info.json", place / "simulator.rai"
        artifact.write_text("{}")
    compile_partition(partition, binary, precision)
    inputs, outputs = tower.signature(coverage, split)
    return Program(
        name="simulated",
        family=tower.family,
        format=FLEXMLRT_RAI if layout == "rai" else FLEXMLRT_DIRECTORY,
        folder=folder,
        inputs=inputs,
        outputs=outputs,
        weights={},
        uniform_frames=True,
        coverage=coverage,
        precision=precision,
        host=split,
        device="simulator",
        artifact=artifact,
    )


def small_model(rows: int, outputs: int) -> onnx.ModelProto:
    """A model of one product with ones: float32 `x` [rows, 16] in, `y` [rows, outputs] out."""
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "small",
        [onnx.helper.make_tensor_value_info("x", float32, (rows, 16))],
        [onnx.helper.make_tensor_value_info("y", float32, (rows, outputs))],
        [onnx.numpy_helper.from_array(np.ones((16, outputs), np.float32), "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
