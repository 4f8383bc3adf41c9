"""Programs of int8 for OpenVINO: close to float32 whatever is large in them, in int8 kernels where these are right."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from bundles import document, entry, write_bundle
from simulated import requires_bfloat16
from towers import lowest_cosine, random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import Rejected, default_registry
from visionaccel.bundle import open_bundle
from visionaccel.core.program import ONNX, ONNX_FUSED, ONNX_STANDARD
from visionaccel.errors import (
    AccuracyError,
    ArtifactError,
    BackendUnavailableError,
    BundleError,
    ConfigurationError,
)
from visionaccel.validation import REFERENCE_OPTIONS, quantize_bundle
from visionaccel_testing.conformance.digits_reading import read_digits

FIXED, BUCKET, DYNAMIC = [(1, 10, 18)], [(1, 6, 10)], [(2, 30, 26)]


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float32") / "bundle"
    write_bundle(checkpoint, folder, "10x18", bucket="14x22", dynamic=True, dialect="standard")
    return open_bundle(folder)


@pytest.fixture(scope="module")
def quantized(bundle, images, tmp_path_factory):
    return quantize_bundle(bundle, tmp_path_factory.mktemp("quantized") / "bundle", [images], target="openvino")


@pytest.fixture
def backend():
    return default_registry().load("openvino")


def saturates():
    from visionaccel_openvino.integer_products import integer_products_saturate

    return integer_products_saturate()


@pytest.mark.parametrize("grids", [FIXED, BUCKET, DYNAMIC], ids=["fixed", "bucket", "dynamic"])
def test_embeddings_are_close_to_transformers_but_not_those_of_float32(checkpoint, quantized, grids):
    patches = random_patches(grids)
    with open_encoder(quantized, backend="openvino") as encoder:
        ours = encoder.encode(patches, grids)
    assert 0.9985 < lowest_cosine(ours, reference(checkpoint, patches, grids)) < 0.999999


def test_rows_that_no_image_of_the_calibration_had_are_held_too(checkpoint, quantized):
    """With one scale for all rows, the lowest cosine here is 0.9968."""
    patches = random_patches(FIXED)
    patches[::7] *= 100
    with open_encoder(quantized, backend="openvino") as encoder:
        ours = encoder.encode(patches, FIXED)
    assert lowest_cosine(ours, reference(checkpoint, patches, FIXED)) > 0.9985


def test_rows_of_zeros_stay_zero(quantized):
    patches = random_patches(FIXED)
    patches[:] = 0
    with open_encoder(quantized, backend="openvino") as encoder:
        assert np.isfinite(encoder.encode(patches, FIXED)).all()


def test_int8_kernels_compute_where_they_are_right(quantized, caplog):
    with caplog.at_level(logging.WARNING), open_encoder(quantized, backend="openvino") as encoder:
        computed = {opened.session.capabilities.precision for opened in encoder.programs}
    assert computed == {"float32" if saturates() else "int8"}
    assert ("without VNNI" in caplog.text) is saturates()


def test_kernels_that_saturate_are_found_by_what_they_compute():
    """As Linux says what the processor has; every x86 with VNNI adds in 32 bits."""
    with Path("/proc/cpuinfo").open() as file:
        flags = next((set(line.split()) for line in file if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("this is no x86")
    assert saturates() is not bool(flags & {"avx512_vnni", "avx_vnni"})


def compiled_operations(quantized, precision):
    """What OpenVINO makes of the program for any grid where int8 is right, whether it is here or not: not run."""
    import openvino

    from visionaccel_openvino.model import read_model

    (program,) = (each for each in quantized.programs([ONNX_STANDARD]) if each.name == "dynamic")
    core = openvino.Core()
    model, mapped = read_model(core, program)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "LP_TRANSFORMS_MODE": True})
    assert mapped
    names = ("layerType", "runtimePrecision", "outputPrecisions")
    stated = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    return [tuple(each[name].astype(str) for name in names) for each in stated]


def test_every_product_but_the_first_and_the_last_becomes_an_int8_kernel(quantized):
    operations = compiled_operations(quantized, "f32")
    kinds = [precision for kind, precision, _ in operations if kind == "FullyConnected"]
    assert sorted(kinds) == ["f32"] * 2 + ["i8"] * (3 * 5 + 1)
    quantizing = [kind for kind, _, output in operations if output == "i8" and kind != "Const"]
    assert set(quantizing) == {"Eltwise"}, "fused with the division"
    assert len(quantizing) == 3 * 4 + 1, "gate and up read one matrix"


def test_what_lies_between_the_products_is_in_bfloat16_if_asked(quantized):
    """Were the last product of int8 too, OpenVINO would compute most of it in float32."""
    requires_bfloat16()
    between = [precision for kind, precision, _ in compiled_operations(quantized, "bf16") if kind == "Eltwise"]
    assert between.count("f32") == 0
    assert between.count("bf16") > 3 * 4 + 1


def test_int8_weights_take_the_place_of_those_in_float32(quantized):
    for program in quantized.programs([ONNX_STANDARD]):
        model = onnx.load_model_from_string(program.model())
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("QuantizeLinear") == 3 * 4 + 1, "rows are quantized once for all products of theirs"
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        assert stored["blocks.0.mlp.up_proj.weight.int8"].data_type == onnx.TensorProto.INT8
        assert "blocks.0.mlp.up_proj.weight" not in stored, "the float32 weight is not referred to any more"
        assert stored["blocks.0.mlp.up_proj.bias"].data_location == onnx.TensorProto.EXTERNAL


def test_the_bundle_states_what_was_done(quantized):
    for stated in quantized.manifest.programs:
        assert (stated.format, stated.precision) == (ONNX_STANDARD, "float32")
        assert (stated.quantization.dtype, stated.quantization.target) == ("int8", "openvino")
    assert quantized.manifest.certificate.passed
    assert "openvino" in quantized.manifest.toolchain


def test_fixed_shapes_in_bfloat16_are_right_too(checkpoint, quantized):
    requires_bfloat16()
    for grids in (FIXED, BUCKET, DYNAMIC):
        patches = random_patches(grids)
        with open_encoder(quantized, backend="openvino", options={"precision": "bfloat16"}) as encoder:
            assert encoder.capabilities.precision == "int8"
            assert lowest_cosine(encoder.encode(patches, grids), reference(checkpoint, patches, grids)) > 0.995


def test_device_auto_is_refused_where_it_may_be_wrong(quantized):
    if not saturates():
        with open_encoder(quantized, backend="openvino", device="auto") as encoder:
            assert encoder.capabilities.precision == "int8"
        return
    with pytest.raises(ConfigurationError, match=r"the int8 program .*: this CPU.*Choose a device"):
        open_encoder(quantized, backend="openvino", device="auto")


def test_what_was_quantized_for_another_backend_is_refused_with_the_way_on(quantized, backend):
    with pytest.raises(BackendUnavailableError, match=r"quantized for OpenVINO.*--target onnxrt"):
        open_encoder(quantized, backend="onnxrt")
    program = quantized.programs([ONNX_STANDARD])[0]
    verdict = backend.probe(replace(program, format=ONNX), None)
    assert isinstance(verdict, Rejected)
    assert "quantized for ONNX Runtime" in verdict.reason
    assert "--target openvino" in verdict.hint


def test_what_is_too_far_from_the_reference_is_not_kept(bundle, images, tmp_path):
    with pytest.raises(AccuracyError, match=r"nothing was kept.*lowest cosine 0\.99\d+"):
        quantize_bundle(bundle, tmp_path / "bundle", [images], target="openvino", threshold=0.99999)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_weight_is_found_when_the_bundle_opens(quantized, tmp_path):
    copy = shutil.copytree(quantized.folder, tmp_path / "copy")
    path = copy / entry(document(copy), "10x18")["model"]
    model = onnx.load_model(path, load_external_data=False)
    (weight,) = (each for each in model.graph.initializer if each.name == "blocks.0.mlp.up_proj.weight.int8")
    weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"10x18\.onnx (is damaged|has \d+ bytes)"):
        open_bundle(copy, checkpoint=quantized.tower.checkpoint)


def test_broken_programs_are_artifact_errors_and_others_are_refused(bundle, backend, tmp_path):
    program = bundle.programs([ONNX])[0]
    with pytest.raises(ArtifactError, match="not an ONNX model"):
        backend.quantize(replace(program, model=lambda: b"\xff nonsense"), [], tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read from"):
        backend.quantize(replace(program, folder=tmp_path), [{}], tmp_path)
    with pytest.raises(ConfigurationError, match="no calibration images"):
        backend.quantize(program, [], tmp_path)
    for other in (replace(program, format=ONNX_FUSED), replace(program, precision="float16")):
        with pytest.raises(ConfigurationError, match="not a float32 program in standard ONNX"):
            backend.quantize(other, [], tmp_path)
    inputs = {spec.name: np.full(spec.shape, np.nan, spec.dtype) for spec in program.inputs}
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        backend.quantize(program, [inputs], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_any_grid_in_onnx_runtimes_operators_is_refused_before_the_work(checkpoint, images, tmp_path):
    fused = open_bundle(write_bundle(checkpoint, tmp_path / "fused", dynamic=True))
    with pytest.raises(BackendUnavailableError, match=r"--dialect standard"):
        quantize_bundle(fused, tmp_path / "int8", [images], target="openvino")


def test_answers_of_the_digits_model_are_those_of_float32(digits, tmp_path):
    from digits_vlm.samples import held_out_images

    (tmp_path / "images").mkdir()
    for number, sample in enumerate(held_out_images(8)):
        Image.fromarray(np.asarray(sample.image)).save(tmp_path / "images" / f"{number}.png")
    bundle = open_bundle(write_bundle(digits, tmp_path / "float32", dynamic=True, dialect="standard"))
    int8 = quantize_bundle(bundle, tmp_path / "int8", [tmp_path / "images"], target="openvino")
    exact = open_encoder(digits, backend="torch_ref", options=REFERENCE_OPTIONS)
    with open_encoder(int8, backend="openvino") as ours, exact as reference:
        (read,) = read_digits(digits, ours, reference, 100)
    assert read.agreement >= 0.99, "one point of float32"
