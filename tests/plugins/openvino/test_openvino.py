"""The OpenVINO backend computes the tower, in place, from the checkpoint's own bytes, and refuses what it cannot do."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings

from bundles import write_bundle
from simulated import requires_bfloat16
from strategies import grid_lists
from towers import lowest_cosine, random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import Accepted, Rejected, default_registry
from visionaccel.core.grid import Grid
from visionaccel.core.program import ONNX, ONNX_STANDARD, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ArtifactError, BackendUnavailableError, ConfigurationError, DeviceError
from visionaccel_testing.checkpoints import TINY, random_checkpoint

HEAD_OF_80 = {**TINY, "hidden_size": 160, "num_heads": 2}
GRIDS = [(1, 20, 18), (2, 10, 6), (1, 20, 18)]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def stored(request, tmp_path_factory):
    """A checkpoint in each stored dtype, in several shards."""
    return random_checkpoint(tmp_path_factory.mktemp("stored"), dtype=request.param, shards=2)


@pytest.fixture(scope="module")
def encoder(stored):
    with open_encoder(stored, backend="openvino") as encoder:
        yield encoder


@pytest.fixture
def program(tiny):
    (program,) = open_tower(tiny).programs([ONNX_STANDARD])
    return program


@pytest.fixture
def backend():
    return default_registry().load("openvino")


@given(triples=grid_lists())
@example(triples=[(1, 58, 74)])
@example(triples=[(1, 2, 2)])
@example(triples=[(4, 10, 6), (1, 8, 8), (4, 10, 6), (1, 20, 2)])
@hypothesis_settings(max_examples=20)
def test_embeddings_equal_transformers(stored, encoder, triples):
    patches = random_patches(triples)
    ours = encoder.encode(patches, triples)
    np.testing.assert_allclose(ours, reference(stored, patches, triples), rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, HEAD_OF_80], ids=["head16", "head80"])
@pytest.mark.parametrize("side", ["8x8", "10x10", "20x20", "18x26"])
def test_no_form_of_the_graph_gives_a_wrong_token(tmp_path, config, side, precision):
    """In bfloat16 OpenVINO's own choice for a bucket gives tokens with a cosine of 0.4 to 0.9, and means above 0.96."""
    if precision == "bfloat16":
        requires_bfloat16()
    checkpoint = random_checkpoint(tmp_path / "checkpoint", config)
    grid = Grid.parse(side)
    triple = [(1, grid.h, grid.w)]
    patches = random_patches(triple, config)
    exact = reference(checkpoint, patches, triple)
    sources = {
        "dynamic": checkpoint,
        "fixed": write_bundle(checkpoint, tmp_path / "fixed", side),
        "bucket": write_bundle(checkpoint, tmp_path / "bucket", bucket=side),
        "larger bucket": write_bundle(checkpoint, tmp_path / "larger", bucket="30x34"),
        "split": write_bundle(checkpoint, tmp_path / "split", side, split_host=True),
    }
    for form, source in sources.items():
        with open_encoder(source, backend="openvino", options={"precision": precision}) as encoder:
            assert encoder.capabilities.precision == precision
            found = lowest_cosine(encoder.encode(patches, triple), exact)
        assert found > (0.999 if precision == "bfloat16" else 0.999999), form


def test_device_auto_cannot_be_kept_from_wrong_tokens_and_is_refused(tiny, tmp_path):
    bucket = write_bundle(tiny, tmp_path / "bucket", bucket="20x20")
    with pytest.raises(ConfigurationError, match=r"may give wrong answers in bfloat16 for program"):
        open_encoder(bucket, backend="openvino", device="auto", options={"precision": "bfloat16"})
    patches = random_patches([(1, 20, 18)])
    exact = reference(tiny, patches, [(1, 20, 18)])
    with open_encoder(bucket, backend="openvino", device="auto") as encoder:
        np.testing.assert_allclose(encoder.encode(patches, [(1, 20, 18)]), exact, rtol=0, atol=2e-5)


def test_a_program_for_any_grid_in_a_bundle_is_exported_in_standard_operators(tiny, tmp_path):
    fused = write_bundle(tiny, tmp_path / "fused", dynamic=True)
    with pytest.raises(BackendUnavailableError, match=r"ONNX Runtime's operators.*--dialect standard"):
        open_encoder(fused, backend="openvino")
    standard = write_bundle(tiny, tmp_path / "standard", dynamic=True, dialect="standard")
    with open_encoder(standard, backend="openvino") as encoder:
        patches = random_patches(GRIDS)
        np.testing.assert_allclose(encoder.encode(patches, GRIDS), reference(tiny, patches, GRIDS), atol=2e-5)


def test_input_is_read_in_place_and_output_is_the_callers(tiny):
    patches = random_patches(GRIDS)
    patches.flags.writeable = False
    kept = patches.copy()
    with open_encoder(tiny, backend="openvino") as encoder:
        first = encoder.encode(patches, GRIDS)
        copied = first.copy()
        second = encoder.encode(random_patches(GRIDS, seed=1), GRIDS)
        assert not np.shares_memory(first, second)
        np.testing.assert_array_equal(first, copied)
        first[:] = 0
        np.testing.assert_array_equal(encoder.encode(patches, GRIDS), copied)
    np.testing.assert_array_equal(patches, kept)


def test_calls_in_flight_have_a_request_each(tiny):
    answers = {}
    patches = {seed: random_patches(GRIDS, seed=seed) for seed in range(12)}
    with open_encoder(tiny, backend="openvino", options={"requests": 3}) as encoder:
        assert (encoder.capabilities.thread_safe, encoder.capabilities.max_in_flight) == (True, 3)

        def encode(seed):
            answers[seed] = encoder.encode(patches[seed], GRIDS)

        threads = [threading.Thread(target=encode, args=(seed,)) for seed in patches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, answer in answers.items():
        np.testing.assert_allclose(answer, reference(tiny, patches[seed], GRIDS), rtol=0, atol=2e-5)
    assert len(answers) == len(patches)


@pytest.mark.parametrize("device", [None, "cpu", "auto"])
def test_the_cpus_cache_is_refused_since_it_gives_wrong_answers(tiny, tmp_path, device):
    with pytest.raises(ConfigurationError, match=r"wrong answers.*Leave out the option cache_dir"):
        open_encoder(tiny, backend="openvino", device=device, options={"cache_dir": str(tmp_path / "cache")})
    assert not (tmp_path / "cache").exists()


def test_a_call_that_fails_while_it_computes_leaves_nothing_for_later_ones(tiny, caplog):
    """After an allocation that failed, OpenVINO's compiled model fails in every later call too."""

    class Failing:
        def set_tensor(self, name, tensor):
            pass

        def start_async(self):
            raise RuntimeError("std::bad_alloc")

    grids = [(1, 16, 12)]
    patches = random_patches(grids)
    with open_encoder(tiny, backend="openvino") as encoder:
        exact = encoder.encode(patches, grids)
        (opened,) = encoder.programs
        pool = opened.session._pool
        pool.free.get()
        pool.free.put(Failing())
        with pytest.raises(DeviceError, match="bad_alloc"):
            encoder.encode(patches, grids)
        np.testing.assert_array_equal(encoder.encode(patches, grids), exact)
        assert opened.session._pool is not pool
    assert "compiled again" in caplog.text


def test_a_precision_that_the_device_lacks_is_refused(tiny):
    import openvino

    if "FP16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with open_encoder(tiny, backend="openvino", options={"precision": "float16"}) as encoder:
            assert encoder.capabilities.precision == "float16"
        return
    with pytest.raises(ConfigurationError, match="does not compute in float16 here; it offers float32"):
        open_encoder(tiny, backend="openvino", options={"precision": "float16"})


def test_properties_reach_the_device_and_wrong_ones_are_named(tiny):
    with open_encoder(tiny, backend="openvino", options={"threads": 1, "properties": {"NUM_STREAMS": "1"}}) as encoder:
        assert encoder.capabilities.device == "cpu"
    with pytest.raises(DeviceError, match="NO_SUCH_PROPERTY"):
        open_encoder(tiny, backend="openvino", options={"properties": {"NO_SUCH_PROPERTY": "1"}})


@pytest.mark.parametrize("name", ["CACHE_DIR", "INFERENCE_PRECISION_HINT", "LP_TRANSFORMS_MODE", "SNIPPETS_MODE"])
def test_properties_that_answers_depend_on_are_not_the_users_to_set(tiny, name):
    with pytest.raises(ConfigurationError, match=f"{name} cannot be set"):
        open_encoder(tiny, backend="openvino", options={"properties": {name: "x"}})


def test_a_device_that_computes_in_another_precision_is_noticed(program):
    import openvino

    from visionaccel_openvino.backend import _check_precision
    from visionaccel_openvino.model import read_model

    requires_bfloat16()
    core = openvino.Core()
    model, mapped = read_model(core, program)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    assert mapped
    _check_precision(compiled, "cpu", "bfloat16")
    with pytest.raises(DeviceError, match="computes in bf16, but float32 was requested"):
        _check_precision(compiled, "cpu", "float32")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("tpu", "unknown device 'tpu'"),
        ("npu", "only programs of fixed shapes"),
        ("gpu:7", "found no device 'gpu:7'; it found cpu"),
    ],
)
def test_devices_are_refused_with_the_reason(program, backend, device, reason):
    verdict = backend.probe(program, device)
    assert isinstance(verdict, Rejected)
    assert reason in verdict.reason
    assert verdict.hint


@pytest.mark.parametrize("device", [None, "cpu", "auto"])
def test_devices_that_are_there_are_taken(program, backend, device):
    assert isinstance(backend.probe(program, device), Accepted)


def test_devices_are_listed_by_our_names(backend):
    assert {"cpu", "auto"} <= set(backend.devices())


def test_fixed_shapes_are_taken_in_the_common_format(program, backend):
    fixed = replace(program, format=ONNX, coverage=FixedGrid(Grid(1, 8, 8)))
    assert isinstance(backend.probe(fixed, "cpu"), Accepted)


def test_a_broken_model_and_missing_weights_are_artifact_errors(program, backend, tmp_path):
    options = backend.options()
    with pytest.raises(ArtifactError, match="not an ONNX model"):
        backend.open(replace(program, model=lambda: b"\xff nonsense"), "cpu", options)
    with pytest.raises(ArtifactError, match="has no model"):
        backend.open(replace(program, model=None), "cpu", options)
    with pytest.raises(ArtifactError, match=r"cannot be read from .*model\.safetensors"):
        backend.open(replace(program, folder=tmp_path), "cpu", options)
