"""The backends of this repository, checked as anybody's. Their reports make the table of the documentation."""

from pathlib import Path
from typing import Any

import pytest

from bundles import reseal, write_bundle
from conformance.planted import FIXED, fixed_shapes
from simulated import simulated_precision
from visionaccel_flexmlrt.artifact import FLEXMLRT_RAI
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_testing.checkpoints import TINY_TOWERS
from visionaccel_testing.conformance import CHECKS, BackendUnderTest, conformance_suite, run_checks


def simulated_npu(checkpoint: Path, folder: Path) -> Path:
    """A bundle of two grids whose device parts are compiled for the simulator; the host embeds the patches."""
    grids, precision = [f"{grid.h}x{grid.w}" for grid in FIXED], simulated_precision()
    write_bundle(checkpoint, folder, *grids, split_host=True, self_contained=True, device="simulator")

    def compiled(manifest: dict[str, Any]) -> None:
        for program in manifest["programs"]:
            model = folder / program["model"]
            artifact = model.with_suffix(".rai")
            compile_partition(model, artifact, precision)
            model.unlink()
            files = [{"path": artifact.name, "bytes": 0, "sha256": ""}]
            program |= {"format": FLEXMLRT_RAI, "model": artifact.name, "files": files, "precision": precision}

    reseal(folder, compiled)
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
    assert {f"L2-tower-{family}" for family in TINY_TOWERS} <= passed
