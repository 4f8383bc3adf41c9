"""The program for any grid in standard operators: right on ONNX Runtime's CPU and on OpenVINO, refused elsewhere."""

import numpy as np
import onnx
import pytest

from towers import lowest_cosine, random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import Accepted, Rejected, default_registry, select
from visionaccel.bundle import ProgramRequest, export_bundle, open_bundle
from visionaccel.core.program import ONNX_STANDARD, AnyGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError

GRIDS = [(1, 8, 8), (1, 10, 6), (2, 20, 14), (1, 2, 2)]
"""Windows that are full, cut off and single, and several in a call."""


def exported(tiny, folder, precision):
    request = ProgramRequest(AnyGrid(), dialect="standard")
    return open_bundle(export_bundle(open_tower(tiny), folder, [request], precision=precision).folder)


@pytest.mark.parametrize("backend", ["onnxrt", "openvino"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_the_reference(tiny, tmp_path, backend, precision):
    patches = random_patches(GRIDS)
    exact = reference(tiny, patches, GRIDS)
    with open_encoder(exported(tiny, tmp_path / "b", precision), backend=backend) as encoder:
        ours = encoder.encode(patches, GRIDS)
    assert lowest_cosine(ours, exact) > (0.99999 if precision == "float32" else 0.99)
    if precision == "float32":
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


def test_auto_takes_openvino_and_other_devices_of_onnx_runtime_refuse(tiny, tmp_path):
    bundle = exported(tiny, tmp_path / "b", "float32")
    selection = select(default_registry(), bundle)
    verdicts = {candidate.entry.name: candidate.verdict for candidate in selection.candidates}
    assert selection.chosen.entry.name == "openvino"
    assert isinstance(verdicts["onnxrt"], Accepted)
    (refused,) = select(default_registry(), bundle, "onnxrt", "cuda").candidates
    assert isinstance(refused.verdict, Rejected)
    assert "which only the cpu supports" in refused.verdict.reason


def test_what_an_earlier_release_wrote_is_refused_with_a_reason(tiny, tmp_path):
    from visionaccel_onnxrt.backend import _require_whole_masks

    (program,) = exported(tiny, tmp_path / "b", "float32").programs([ONNX_STANDARD])
    model = onnx.load_model_from_string(program.model())
    _require_whole_masks(model.SerializeToString(), program)
    (expand,) = [node for node in model.graph.node if node.op_type == "Expand"]
    expand.op_type = "Identity"
    with pytest.raises(ConfigurationError, match="written by an earlier release"):
        _require_whole_masks(model.SerializeToString(), program)
