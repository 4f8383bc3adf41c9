"""Programs of fixed shapes in ONNX Runtime's own operators: the same tower, and nothing but ONNX Runtime runs them."""

import shutil

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from bundles import document, write_bundle
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import Accepted, Rejected, default_registry
from visionaccel.bundle import ProgramRequest, export_bundle, open_bundle
from visionaccel.cli.app import app
from visionaccel.core.grid import Grid
from visionaccel.core.program import EMBEDDINGS, ONNX_FUSED, FixedGrid, HostSplit
from visionaccel.encoder import open_tower
from visionaccel.errors import BackendUnavailableError, ConfigurationError
from visionaccel_onnxrt.session import SPINNING, UNPACKED

GRID, LARGEST = Grid(1, 10, 18), Grid(1, 14, 22)


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    tower = open_tower(tiny)
    requests = [
        ProgramRequest(FixedGrid(GRID), dialect="microsoft"),
        ProgramRequest(tower.bucket(LARGEST), dialect="microsoft"),
    ]
    return export_bundle(tower, tmp_path_factory.mktemp("fused") / "bundle", requests)


@pytest.fixture(scope="module")
def encoder(bundle):
    with open_encoder(bundle, backend="onnxrt", device="cpu") as encoder:
        yield encoder


@pytest.mark.parametrize(
    "grid", [(1, 10, 18), (2, 10, 18), (1, 14, 22), (1, 22, 14), (1, 12, 8), (1, 2, 2), (1, 2, 30)], ids=str
)
def test_embeddings_equal_transformers(tiny, encoder, grid):
    patches = random_patches([grid])
    exact = reference(tiny, patches, [grid])
    np.testing.assert_allclose(encoder.encode(patches, [grid]), exact, rtol=0, atol=2e-5)


def test_a_bucket_works_on_real_rows_only_and_pads_what_it_gives(encoder):
    opened = encoder.program_for(Grid(1, 6, 4))
    patches = random_patches([(1, 6, 4)])
    outputs = opened.session.run(opened.host.inputs(patches, [Grid(1, 6, 4)]))
    assert outputs[EMBEDDINGS].shape == (308 // 4, 24)
    assert np.abs(outputs[EMBEDDINGS][:6]).max(axis=1).min() > 0
    assert not outputs[EMBEDDINGS][6:].any()


def test_the_models_are_valid_and_attention_is_one_operator(bundle, tiny, tmp_path):
    for file in tiny.iterdir():
        shutil.copy(file, tmp_path)  # onnx looks for external data beside the model and takes no links
    for program in bundle.programs([ONNX_FUSED]):
        (tmp_path / "tower.onnx").write_bytes(program.model())
        onnx.checker.check_model(tmp_path / "tower.onnx", full_check=True)
        model = onnx.load_model_from_string(program.model())
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("MultiHeadAttention") == 3
        assert "Softmax" not in kinds
        assert [value.name for value in model.graph.input] == [spec.name for spec in program.inputs]


def test_only_a_backend_that_knows_the_operators_is_offered_them(bundle):
    assert {program.format for program in bundle.manifest.programs} == {ONNX_FUSED}
    with pytest.raises(BackendUnavailableError, match="has no program for this backend"):
        open_encoder(bundle, backend="flexmlrt")
    backend = default_registry().load("onnxrt")
    (program, _) = bundle.programs(backend.formats)
    assert isinstance(backend.probe(program, "cpu"), Accepted)
    refusal = backend.probe(program, "npu")
    assert isinstance(refusal, Rejected)
    assert "own operators" in refusal.reason


@pytest.mark.parametrize("options", [{"spinning": True}, {"share_weights": True}, {}])
def test_options_of_the_session_reach_it_and_change_no_answer(tiny, options):
    patches = random_patches([(1, 10, 18)])
    with open_encoder(tiny, backend="onnxrt", options=options) as encoder:
        settings = encoder.programs[0].session._session.get_session_options()
        assert settings.get_session_config_entry(SPINNING) == str(int(options.get("spinning", False)))
        assert settings.get_session_config_entry(UNPACKED) == str(int(options.get("share_weights", False)))
        exact = reference(tiny, patches, [(1, 10, 18)])
        np.testing.assert_allclose(encoder.encode(patches, [(1, 10, 18)]), exact, rtol=0, atol=2e-5)


def test_what_is_not_written_is_refused(tiny):
    tower = open_tower(tiny)
    with pytest.raises(ConfigurationError, match="cannot leave the patch embedding"):
        tower.onnx_model(coverage=FixedGrid(GRID), host=HostSplit("grouped"), dialect="microsoft")


def test_the_command_writes_them_when_asked(tiny, tmp_path):
    command = ["export", str(tiny), str(tmp_path / "fused"), "--grid", "10x18", "--dialect", "microsoft", "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    (stated,) = document(tmp_path / "fused")["programs"]
    assert stated["format"] == ONNX_FUSED
    plain = open_bundle(write_bundle(tiny, tmp_path / "plain", "10x18"))
    assert plain.manifest.programs[0].format == "onnx"
    refused = CliRunner().invoke(app, [*command[:2], str(tmp_path / "npu"), *command[3:], "--device", "npu"])
    assert isinstance(refused.exception, ConfigurationError)
