"""Quantized bundles: int8 products, close to float32, stated as such, and never kept if they are too far from it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from typer.testing import CliRunner

from bundles import document, entry, write_bundle
from towers import lowest_cosine, random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import Accepted, QuantizedModel, default_registry
from visionaccel.bundle import GOLDEN_FILE, open_bundle
from visionaccel.cli.app import app
from visionaccel.core.comparison import THRESHOLDS, Comparison
from visionaccel.core.program import CHECKPOINT, ONNX_STANDARD
from visionaccel.encoder import open_tower
from visionaccel.errors import AccuracyError, ArtifactError, ConfigurationError, InputError, PluginError
from visionaccel.validation import REFERENCE_OPTIONS, quantize_bundle
from visionaccel.validation.trials import bundled_photographs
from visionaccel_testing.conformance.digits_reading import read_digits


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float32") / "bundle"
    return open_bundle(write_bundle(checkpoint, folder, "10x18", bucket="14x22", dynamic=True))


@pytest.fixture(scope="module")
def quantized(bundle, images, tmp_path_factory):
    return quantize_bundle(bundle, tmp_path_factory.mktemp("int8") / "bundle", [images], target="onnxrt")


@pytest.mark.parametrize("grid", [(1, 10, 18), (1, 6, 10), (2, 30, 26)], ids=["fixed", "bucket", "dynamic"])
def test_embeddings_are_close_to_transformers_but_not_those_of_float32(checkpoint, quantized, grid):
    patches = random_patches([grid])
    exact = reference(checkpoint, patches, [grid])
    with open_encoder(quantized, backend="onnxrt") as encoder:
        assert {opened.session.capabilities.precision for opened in encoder.programs} == {"int8"}
        ours = encoder.encode(patches, [grid])
    assert 0.99 < lowest_cosine(ours, exact) < 0.999999


def test_each_row_has_a_scale_of_its_own(checkpoint, quantized):
    """With one scale for all rows, the lowest cosine here is 0.9976."""
    patches = random_patches([(1, 10, 18)])
    with open_encoder(quantized, backend="onnxrt") as encoder:
        ours = encoder.encode(patches, [(1, 10, 18)])
    assert lowest_cosine(ours, reference(checkpoint, patches, [(1, 10, 18)])) > 0.9985


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"threshold": 2.0}, ConfigurationError, "not a valid cosine threshold"),
        ({"threshold": float("nan")}, ConfigurationError, "not a valid cosine threshold"),
        ({"device": "tpu"}, ConfigurationError, "unknown device 'tpu'"),
        ({"judged_by": ["/nowhere.png"]}, InputError, "nowhere"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_work(bundle, images, tmp_path, monkeypatch, given, error, said):
    backend = default_registry().load("onnxrt")
    monkeypatch.setattr(type(backend), "quantize", lambda *_: pytest.fail("it has begun"))
    if "judged_by" in given:
        given = {"judged_by": [Path(name) for name in given["judged_by"]]}
    with pytest.raises(error, match=said):
        quantize_bundle(bundle, tmp_path / "int8", [images], target="onnxrt", **given)


def test_nothing_that_is_read_is_replaced(checkpoint, bundle, images, tmp_path):
    outer = tmp_path / "outer"
    write_bundle(checkpoint, outer, "6x10")
    inner = open_bundle(write_bundle(checkpoint, outer / "inner", "6x10"))
    with pytest.raises(ConfigurationError, match="contains the bundle or its weights"):
        quantize_bundle(inner, outer, [images], target="onnxrt", force=True)
    with pytest.raises(ConfigurationError, match="contains the bundle or its weights"):
        quantize_bundle(bundle, checkpoint, [images], target="onnxrt", force=True)
    assert (outer / "inner").is_dir()


def test_broken_programs_are_artifact_errors(bundle, tmp_path):
    backend = default_registry().load("onnxrt")
    program = bundle.programs(["onnx"])[0]
    with pytest.raises(ArtifactError, match="not an ONNX model"):
        backend.quantize(replace(program, model=lambda: b"\xff nonsense"), [], tmp_path)
    with pytest.raises(ArtifactError, match="cannot be run"):
        backend.quantize(replace(program, folder=tmp_path), [], tmp_path)
    (standard,) = bundle.tower.programs([ONNX_STANDARD])
    with pytest.raises(ConfigurationError, match="not a float32 ONNX program"):
        backend.quantize(standard, [], tmp_path)
    inputs = {spec.name: np.full(spec.shape, np.nan, spec.dtype) for spec in program.inputs}
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        backend.quantize(program, [inputs], tmp_path)


def test_every_product_but_that_of_the_patches_is_of_int8(quantized):
    for program in quantized.programs(["onnx"]):
        model = onnx.load_model_from_string(program.model())
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("MatMulInteger") == 3 * 5 + 2
        assert kinds.count("Gemm") == 1
        assert kinds.count("ReduceMax") == 3 * 4 + 2, "rows of every activation are scaled one by one"
        stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        assert stored["blocks.0.mlp.up_proj.weight_quantized"] == onnx.TensorProto.INT8
        assert "blocks.0.mlp.up_proj.weight" not in stored, "the float32 weight is not referred to any more"
        assert "blocks.0.mlp.up_proj.bias" in stored


def test_the_bundle_states_what_was_done_and_holds_its_certificate(quantized, bundle):
    for stated in quantized.manifest.programs:
        assert stated.quantization.dtype == "int8"
        assert stated.quantization.target == "onnxrt"
        assert stated.quantization.calibration_images == 3
        assert "smoothed" in stated.quantization.method
    certificate = quantized.manifest.certificate
    assert certificate.passed
    assert {result.threshold for result in certificate.programs} == {THRESHOLDS["int8"]}
    assert certificate.images["real"] == len(bundled_photographs()) > 3
    assert bundle.manifest.certificate is None
    assert all(program.quantization is None for program in bundle.manifest.programs)
    assert {program.quantization for program in quantized.programs(["onnx"])} == {"int8"}


def test_what_is_too_far_from_the_reference_is_not_kept(bundle, images, tmp_path):
    with pytest.raises(
        AccuracyError, match=r"lowest cosine 0\.99\d+.*mean 0\.99\d+.*Worst: \w[^,]* at grid .*, "
    ) as caught:
        quantize_bundle(bundle, tmp_path / "bundle", [images], target="onnxrt", threshold=0.99999)
    assert "nothing was kept" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_program_is_quantized_once_and_from_float32(quantized, checkpoint, images, tmp_path):
    with pytest.raises(ConfigurationError, match="is not a float32 program"):
        quantize_bundle(quantized, tmp_path / "again", [images], target="onnxrt")
    half = open_bundle(write_bundle(checkpoint, tmp_path / "half", "6x6", precision="float16"))
    with pytest.raises(ConfigurationError, match="is not a float32 program"):
        quantize_bundle(half, tmp_path / "again", [images], target="onnxrt")


def test_a_backend_that_does_not_quantize_says_so(bundle, images, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="'torch_ref' does not run program '10x18'"):
        quantize_bundle(bundle, tmp_path / "bundle", [images], target="torch_ref")
    backend = default_registry().load("torch_ref")
    monkeypatch.setattr(type(backend), "formats", frozenset({"onnx", CHECKPOINT}))
    monkeypatch.setattr(type(backend), "probe", lambda *_: Accepted(1, "runs anything"))
    with pytest.raises(ConfigurationError, match="'torch_ref' cannot quantize program '10x18'"):
        quantize_bundle(bundle, tmp_path / "bundle", [images], target="torch_ref")
    assert list(tmp_path.iterdir()) == []


def test_a_backend_gets_real_images_and_must_write_into_the_bundle(bundle, images, tmp_path, monkeypatch):
    backend, seen = default_registry().load("onnxrt"), {}

    def record(self, program, calibration, folder):
        seen[program.name] = [[dict(inputs) for inputs in calibration] for _ in range(2)]
        return QuantizedModel("onnx", tmp_path / "elsewhere.onnx", "nothing")

    monkeypatch.setattr(type(backend), "quantize", record)
    with pytest.raises(PluginError, match="did not write into the bundle"):
        quantize_bundle(bundle, tmp_path / "bundle", [images], target="onnxrt")
    first, second = seen["10x18"]
    assert len(first) == 3
    assert all(inputs["pixel_values"].shape == (180, 96) for inputs in first)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["pixel_values"], other["pixel_values"])


def test_the_command_writes_a_bundle(bundle, images, tmp_path, checkpoint):
    command = ["quantize", str(bundle.folder), "--output", str(tmp_path / "int8"), "--calibrate", str(images)]
    done = CliRunner().invoke(app, [*command, "--target", "onnxrt", "--reference", str(checkpoint), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["manifest"] == document(tmp_path / "int8")
    shutil.rmtree(tmp_path / "int8")
    empty = tmp_path / "empty"
    empty.mkdir()
    command[-1] = str(empty)
    assert isinstance(CliRunner().invoke(app, [*command, "--target", "onnxrt"]).exception, ConfigurationError)


def test_a_bundle_that_holds_its_weights_keeps_them(checkpoint, images, tmp_path):
    packed = open_bundle(write_bundle(checkpoint, tmp_path / "packed", "6x10", self_contained=True))
    made = quantize_bundle(packed, tmp_path / "int8", [images], target="onnxrt", reference=open_tower(checkpoint))
    assert made.manifest.checkpoint is None
    before, after = ({file.path for file in each.manifest.every_file()} for each in (packed, made))
    assert after == before | {GOLDEN_FILE}
    assert entry(document(tmp_path / "int8"), "6x10")["quantization"]["dtype"] == "int8"


def test_answers_of_the_digits_model_are_those_of_float32(digits, tmp_path):
    from digits_vlm.samples import held_out_images

    (tmp_path / "images").mkdir()
    for number, sample in enumerate(held_out_images(8)):
        Image.fromarray(np.asarray(sample.image)).save(tmp_path / "images" / f"{number}.png")
    bundle = open_bundle(write_bundle(digits, tmp_path / "float32", dynamic=True))
    int8 = quantize_bundle(bundle, tmp_path / "int8", [tmp_path / "images"], target="onnxrt")
    exact = open_encoder(digits, backend="torch_ref", options=REFERENCE_OPTIONS)
    with open_encoder(int8, backend="onnxrt") as ours, exact as reference:
        (read,) = read_digits(digits, ours, reference, 100)
    assert read.agreement >= 0.99, "one point of float32"


def test_the_worst_encodes_come_first():
    comparison, exact = Comparison(4), np.eye(4, dtype=np.float32)
    for tilt in (0.1, 0.5, 0.0, 0.3):
        comparison.add(exact + np.float32(tilt) * np.roll(exact, 1, axis=1), exact)
    assert [encode for encode, _ in comparison.worst(3)] == [1, 3, 0]
