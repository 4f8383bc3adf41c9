"""The backends of this repository, checked as anybody's. Their reports make the table of the documentation."""

from functools import partial
from pathlib import Path

import pytest

from conformance.planted import FIXED, fixed_shapes
from simulated import simulated_precision
from visionaccel.encoder import open_tower
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai
from visionaccel_flexmlrt.vitisai.writing import write_vitisai_folder
from visionaccel_testing.conformance import CHECKS, BackendUnderTest, conformance_suite, run_checks


def simulated_npu(checkpoint: Path, folder: Path) -> Path:
    """A bundle of what AMD's compiler would leave for two grids, compiled for the simulator."""
    tower, precision = open_tower(checkpoint), simulated_precision()
    requests = []
    for grid in FIXED:
        left = folder.with_name(f"{folder.name}-{grid}")
        write_vitisai_folder(tower, left, grid, layout="rai", compile=partial(compile_partition, precision=precision))
        requests.append(ImportRequest(path=left, precision=precision))
    import_vitisai(tower, requests, folder)
    return folder


TestOnnxRuntime = conformance_suite(BackendUnderTest("onnxrt", capabilities={"thread_safe": True}))
TestOpenVino = conformance_suite(BackendUnderTest("openvino", capabilities={"thread_safe": True}))
TestTorch = conformance_suite(BackendUnderTest("torch_ref"))
TestFlexMLRT = conformance_suite(
    BackendUnderTest(
        "flexmlrt",
        device="simulator",
        source=simulated_npu,
        capabilities={"simulated": True, "precision": simulated_precision()},
        speed_floor=None,  # it simulates what an NPU computes, not how fast
    )
)


@pytest.mark.parametrize("backend", ["onnxrt", "openvino"])
def test_programs_of_fixed_shapes_conform(backend, tmp_path):
    checks = [check for check in CHECKS if check.level in (1, 2) or check.name in ("L5-truncated", "L5-tampered")]
    outcomes = run_checks(BackendUnderTest(backend, source=fixed_shapes), tmp_path / "work", checks=checks)
    assert {outcome.check: outcome.detail for outcome in outcomes if outcome.status == "failed"} == {}
    passed = {outcome.check for outcome in outcomes if outcome.status == "passed"}
    assert {"L1-padding", "L1-partial-windows", "L2-digits", "L2-windows", "L5-tampered"} <= passed
