"""Validation: a bundle that is right gets its certificate, and every planted fault is found and named."""

import json
import math
import os
import shutil
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bundles import document, edit_index, edit_model, entry, replace_model, write_bundle, zero_tensor
from fake_plugins import install
from visionaccel import open_encoder
from visionaccel.backends.registry import _default
from visionaccel.bundle import open_bundle
from visionaccel.checkpoint import Checkpoint, differing_weights, read_header, write_safetensors
from visionaccel.cli.bundles import print_certificate, validate
from visionaccel.core.comparison import FLOAT32_ERROR, THRESHOLDS, Comparison, length_errors, token_cosines
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, Bucket, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, InputError, SettingsError, UnknownBackendError
from visionaccel.families.qwen2_5_vl import FAMILY
from visionaccel.images import image_processor
from visionaccel.isolation import IsolatedSession
from visionaccel.towers import Tower
from visionaccel.validation import validate_bundle
from visionaccel.validation.trials import Trials, bundled_photographs, find_images, trial_calls
from visionaccel_testing.checkpoints import random_checkpoint

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(validate)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Towers of milliseconds are many times slower on several threads where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(bundle, reference, *arguments, status=0):
    """The command in this process; its certificate."""
    command = [str(bundle), "--reference", str(reference), "--backend", "onnxrt", "--json", *map(str, arguments)]
    done = CliRunner().invoke(app, command)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)["certificate"]


def failed(certificate):
    """Programs that failed, with the reason; the certificate has not passed."""
    assert certificate["passed"] is False
    return {result["program"]: result["failure"] for result in certificate["programs"] if result["failure"]}


def lowest(certificate, program):
    (result,) = (each for each in certificate["programs"] if each["program"] == program)
    return result["lowest_cosine"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def good(request, tiny, tmp_path_factory):
    """A right bundle of every kind of program, in each precision; copy it before writing."""
    folder = tmp_path_factory.mktemp("good") / request.param
    return write_bundle(tiny, folder, "10x18", "18x10", bucket="14x22", dynamic=True, precision=request.param)


@pytest.fixture
def bundle(good, tmp_path):
    return shutil.copytree(good, tmp_path / "bundle")


# A right bundle


def test_a_right_bundle_passes_and_holds_its_certificate(bundle, tiny):
    certificate = run(bundle, tiny)
    assert certificate["passed"] is True
    names = [result["program"] for result in certificate["programs"]]
    assert names == ["10x18", "18x10", "bucket-308x6", "dynamic"]
    for result in certificate["programs"]:
        assert result["failure"] is None
        assert (result["backend"], result["device"], result["simulated"]) == ("onnxrt", "cpu", False)
        assert result["threshold"] == THRESHOLDS[entry(document(bundle), result["program"])["precision"]]
        assert result["lowest_cosine"] <= result["first_percentile_cosine"] <= result["mean_cosine"]
        assert result["nonfinite_rows"] == 0
    opened = open_bundle(bundle)
    assert opened.manifest.certificate.model_dump(mode="json") == certificate
    assert certificate["reference"] == opened.manifest.weights_digest
    assert {"visionaccel-onnxrt", "torch", "visionaccel"} <= set(certificate["toolchain"])
    assert certificate["images"]["generated"] > 20
    assert certificate["images"]["real"] == 0
    with open_encoder(bundle, backend="onnxrt") as encoder:
        assert len(encoder.programs) == 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_programs_that_leave_work_to_the_host_pass(tiny, tmp_path, precision):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", bucket="10x18", split_host=True, precision=precision)
    assert run(folder, tiny)["passed"] is True


def test_the_limit_of_float32_is_not_for_other_precisions(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", "6x10", precision="float16")
    (result,) = run(folder, tiny, "--threshold", "0.9999")["programs"]
    assert result["failure"] is None
    assert result["relative_error"] > FLOAT32_ERROR


def test_a_bundle_with_its_own_weights_passes(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", "6x10", self_contained=True, precision="bfloat16")
    assert run(folder, tiny)["passed"] is True


def test_without_transformers_tower_the_certificate_says_that_the_reference_is_not_independent(
    tiny, tmp_path, caplog, capsys
):
    bundle = open_bundle(write_bundle(tiny, tmp_path / "bundle", "6x10"))
    checkpoint = Checkpoint(tiny)
    assert validate_bundle(bundle, Tower(FAMILY, checkpoint), backend="onnxrt").certificate.independent
    checkpoint.config = {**checkpoint.config, "architectures": ["ThirdPartyModel"], "model_type": "third_party"}
    certificate = validate_bundle(bundle, Tower(FAMILY, checkpoint), backend="onnxrt").certificate
    assert certificate.passed
    assert not certificate.independent
    print_certificate(certificate, "bundle")
    assert "The reference is not independent" in " ".join(capsys.readouterr().out.split())
    assert "no vision tower for ThirdPartyModel. The reference is visionaccel's own float32 tower" in caplog.text


class Recorded(IsolatedSession):
    """An isolated session that tells its process and limits."""

    made: ClassVar[list["Recorded"]] = []
    calls: ClassVar[set[int | None]] = set()

    def __init__(self, backend, program, device, options, *, limits):
        super().__init__(backend, program, device, options, limits=limits)
        self.program, self.limits = program, limits
        self.made.append(self)

    def run(self, inputs):
        self.calls.add(self.pid)
        return super().run(inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="devices live in processes of their own on Linux only")
def test_programs_run_where_and_as_long_as_the_settings_say(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("visionaccel.isolation.IsolatedSession", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(Recorded, "calls", set())
    folder = write_bundle(tiny, tmp_path / "bundle", "6x10", "10x6")
    assert run(folder, tiny, "--no-write")["passed"] is True
    assert Recorded.made == []
    for name, value in (("ISOLATION", "process"), ("DEADLINE", "45"), ("OPEN_DEADLINE", "90")):
        monkeypatch.setenv(f"VISIONACCEL_{name}", value)
    assert run(folder, tiny)["passed"] is True
    assert [session.program.name for session in Recorded.made] == ["6x10", "10x6"]
    assert {(session.limits.run, session.limits.opening) for session in Recorded.made} == {(45, 90)}
    assert len(Recorded.calls) == 2
    assert not {None, os.getpid()} & Recorded.calls


def test_no_write_leaves_every_byte(bundle, tiny):
    before = {path: path.read_bytes() for path in bundle.iterdir()}
    assert run(bundle, tiny, "--no-write")["passed"] is True
    assert {path: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_failed_certificate_replaces_a_good_one(bundle, tiny):
    run(bundle, tiny)
    run(bundle, tiny, "--threshold", "0.999999999999999", status=1)
    assert open_bundle(bundle).manifest.certificate.passed is False


def test_the_table_is_for_people(bundle, tiny):
    done = CliRunner().invoke(app, [str(bundle), "--reference", str(tiny), "--backend", "onnxrt"])
    assert done.exit_code == 0
    assert "Passed." in done.stdout
    assert "visionaccel.json" in done.stdout


# Planted faults


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("split_host", [False, True])
def test_swapped_tables_of_landscape_and_portrait_are_found(tiny, tmp_path, split_host, precision):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", "18x10", split_host=split_host, precision=precision)
    tower, other = open_tower(tiny), FixedGrid(Grid.parse("18x10"))
    host = tower.split(other) if split_host else None
    replace_model(folder, "10x18", tower.onnx_model(coverage=other, host=host, precision=precision))
    certificate = run(folder, tiny, status=1)
    assert set(failed(certificate)) == {"10x18"}
    assert "row" in failed(certificate)["10x18"]
    assert lowest(certificate, "10x18") < 0.95
    assert lowest(certificate, "18x10") > 0.999


def rolled_window(index):
    """The order of tokens with those of the first window moved by one."""
    index[:16] = np.roll(index[:16], 1)
    return index


@pytest.mark.parametrize("which", [0, -1], ids=["window index", "reverse index"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_permuted_tokens_of_one_window_are_found(tiny, tmp_path, which, precision):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", "18x10", precision=precision)
    edit_model(folder, "10x18", lambda model: edit_index(model, which, rolled_window))
    certificate = run(folder, tiny, status=1)
    assert set(failed(certificate)) == {"10x18"}
    assert lowest(certificate, "10x18") < 0.9


def test_a_dropped_weight_is_found_in_every_program(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", dynamic=True, self_contained=True)
    zero_tensor(folder, "visual.blocks.2.mlp.down_proj.weight")
    certificate = run(folder, tiny, status=1)
    assert set(failed(certificate)) == {"10x18", "dynamic"}
    assert lowest(certificate, "dynamic") < 0.9


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_weight_that_hardly_matters_is_found_by_its_bits(tiny, tmp_path, precision):
    folder = write_bundle(tiny, tmp_path / "bundle", "6x10", self_contained=True, precision=precision)
    assert run(folder, tiny)["passed"] is True
    zero_tensor(folder, "visual.blocks.2.attn.proj.bias")
    certificate = run(folder, tiny, "--threshold", 0.5, status=1)
    assert "'blocks.2.attn.proj.bias'" in failed(certificate)["6x10"]
    assert lowest(certificate, "6x10") > 0.99


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packed_weights_are_compared_bit_by_bit(tmp_path, dtype):
    def stored(folder, **tensors):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        return read_header(folder / "model.safetensors")[0]

    rng = np.random.default_rng(0)
    values = rng.standard_normal((600, 500), dtype=np.float32)
    exact = stored(tmp_path / "exact", a=values, b=values[0], c=np.arange(5))
    write_safetensors(tmp_path / "packed.safetensors", exact, dtype=dtype)
    packed = read_header(tmp_path / "packed.safetensors")[0]
    assert differing_weights(packed, exact) == ()
    assert differing_weights({**packed, "d": packed["a"]}, exact) == ("d",)
    assert differing_weights({**packed, "a": packed["b"]}, exact) == ("a",)
    values[599, 499] *= 1.1
    assert differing_weights(packed, stored(tmp_path / "other", a=values, b=values[0], c=np.arange(5) + 1)) == (
        "a",
        "c",
    )


SPOILED = """
import numpy as np
from visionaccel.backends import Accepted, Capabilities, Session, VisionBackend, hookimpl
from visionaccel_onnxrt import OnnxRuntimeBackend

class SpoiledSession(Session):
    capabilities = Capabilities(device="npu7", precision="float32", simulated=True)
    opened = []
    def __init__(self, session):
        self.session = session
        self.opened.append(self)
    def run(self, inputs):
        outputs = {{name: np.array(rows) for name, rows in self.session.run(inputs).items()}}
        for rows in outputs.values():
            {spoil}
        return outputs
    def close(self):
        self.session.close()

class Spoiled(VisionBackend):
    name = "spoiled"
    formats = frozenset({{"onnx"}})
    def probe(self, program, device):
        return Accepted(1000, "says yes")
    def open(self, program, device, options):
        return SpoiledSession(OnnxRuntimeBackend().open(program, None, OnnxRuntimeBackend.options()))

@hookimpl
def visionaccel_backends():
    return [Spoiled]
"""


@pytest.fixture
def spoiled(tmp_path, monkeypatch):
    """Installs a backend that changes `rows`, each of ONNX Runtime's outputs, by a statement."""

    def make(spoil):
        name = f"acme-spoiled-{abs(hash(spoil))}"
        monkeypatch.syspath_prepend(install(tmp_path / "site", name, "spoiled", SPOILED.format(spoil=spoil)))
        _default.cache_clear()

    yield make
    _default.cache_clear()


@pytest.mark.parametrize(
    ("spoil", "reason", "most"),
    [
        ("rows[:] = 0", "a single repeated number in", -1),
        ("rows[3] = rows[2]", "row 0, column 3 of its tokens", 0.9),
        ("rows[4] = np.nan", "NaN or infinity in 1 of", -1),
        ("rows[5, 0] = np.inf", "NaN or infinity in 1 of", -1),
        ("rows *= 2", "length is off by 100", 1),
        ("raise RuntimeError('the device hung')", "RuntimeError: the device hung", -1),
        ("rows.resize(3, 3, refcheck=False)", "the program declares", -1),
    ],
    ids=["zeros", "a repeated token", "NaN", "infinity", "twice as long", "raises", "wrong shape"],
)
def test_a_device_that_spoils_embeddings_is_found(tiny, tmp_path, spoiled, spoil, reason, most):
    spoiled(spoil)
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", dynamic=True)
    certificate = run(folder, tiny, "--backend", "spoiled", status=1)
    assert set(failed(certificate)) == {"10x18", "dynamic"}
    assert reason in failed(certificate)["10x18"]
    for result in certificate["programs"]:
        assert (result["backend"], result["device"], result["simulated"]) == ("spoiled", "npu7", True)
        assert result["lowest_cosine"] <= most
    assert open_bundle(folder).manifest.certificate.passed is False


def test_rows_of_nan_are_counted(tiny, tmp_path, spoiled):
    spoiled("rows[1:3] = np.nan")
    (result,) = run(write_bundle(tiny, tmp_path / "bundle", "10x18"), tiny, "--backend", "spoiled", status=1)[
        "programs"
    ]
    assert result["nonfinite_rows"] == 2 * result["images"]
    assert "more encodes" in result["failure"]


def test_a_simulated_device_is_marked_in_the_table(tiny, tmp_path, spoiled):
    spoiled("pass")
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [str(folder), "--reference", str(tiny), "--backend", "spoiled"]
    )
    assert done.exit_code == 0, done.output
    assert "(simulated)" in " ".join(done.stdout.split())


# What was not run


@pytest.mark.parametrize("backend", ["onnxrt", "auto"])
def test_programs_that_no_backend_takes_fail_with_the_reason(tiny, tmp_path, backend):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", dynamic=True)
    certificate = run(folder, tiny, "--backend", backend, "--device", "abacus", status=1)
    reasons = failed(certificate)
    assert set(reasons) == {"10x18", "dynamic"}
    assert all("not run" in reason and "abacus" in reason for reason in reasons.values())
    assert all(result["grids"] == [] and result["lowest_cosine"] == -1 for result in certificate["programs"])


def test_bare_weights_never_stand_in_for_a_program(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18")
    certificate = run(folder, tiny, "--backend", "torch_ref", status=1)
    assert "supported formats: checkpoint" in failed(certificate)["10x18"]


def test_a_fault_in_the_fast_tower_does_not_reach_the_reference(tiny, tmp_path, monkeypatch):
    from visionaccel_torch_ref.tower import FastTower

    def refuse(*_):
        raise AssertionError("the fast tower stood in for the reference")

    monkeypatch.setattr(FastTower, "__init__", refuse)
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18")
    assert run(folder, tiny)["passed"]


def test_one_program_that_cannot_be_opened_does_not_cost_the_others_theirs(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", "18x10")
    edit_model(folder, "10x18", lambda model: setattr(model.graph.node[3], "op_type", "Abacus"))
    certificate = run(folder, tiny, status=1)
    assert set(failed(certificate)) == {"10x18"}
    assert "Abacus" in failed(certificate)["10x18"]


def test_programs_made_for_a_device_are_run_on_it(tiny, tmp_path, spoiled):
    spoiled("pass")
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", device="abacus")
    assert run(folder, tiny, "--backend", "spoiled")["passed"] is True
    assert "abacus" in failed(run(folder, tiny, status=1))["10x18"]


# What is refused


def test_a_reference_of_other_weights_is_refused(bundle, tmp_path):
    other = random_checkpoint(tmp_path / "other", seed=1)
    before = (bundle / "visionaccel.json").read_bytes()
    with pytest.raises(ConfigurationError, match="are not those that"):
        run(bundle, other)
    assert (bundle / "visionaccel.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--backend", "onnxtr"], UnknownBackendError),
        (["--options", "threads=none"], SettingsError),
        (["--options", "threads"], SettingsError),
        (["--threshold", "nan"], ConfigurationError),
        (["--threshold", "0"], ConfigurationError),
        (["--threshold", "1.5"], ConfigurationError),
        (["--images", "{bundle}"], ConfigurationError),
        (["--images", "{bundle}/visionaccel.json"], ConfigurationError),
    ],
)
def test_what_cannot_be_validated_is_refused_and_nothing_is_written(bundle, tiny, arguments, kind):
    before = (bundle / "visionaccel.json").read_bytes()
    with pytest.raises(kind) as caught:
        run(bundle, tiny, *(argument.format(bundle=bundle) for argument in arguments))
    assert caught.value.hint
    assert (bundle / "visionaccel.json").read_bytes() == before


def test_a_bundle_in_the_hubs_cache_is_not_changed(bundle, tiny, tmp_path):
    blob = (bundle / "visionaccel.json").rename(tmp_path / "blob")
    (bundle / "visionaccel.json").symlink_to(blob)
    with pytest.raises(ConfigurationError, match="--no-write"):
        run(bundle, tiny)
    assert run(bundle, tiny, "--no-write")["passed"] is True


# Real images


@pytest.fixture(scope="module")
def fixed_digits(digits, tmp_path_factory):
    """Programs of two grids of the digits model; copy it before writing."""
    return write_bundle(digits, tmp_path_factory.mktemp("digits") / "bundle", "10x18", "18x10")


def test_real_images_are_shown(fixed_digits, digits):
    certificate = run(fixed_digits, digits, "--no-write")
    assert certificate["passed"] is True
    assert certificate["images"]["real"] == len(bundled_photographs()) > 3


def test_images_of_a_folder_are_shown_in_their_place(fixed_digits, digits, tmp_path):
    from digits_vlm.samples import held_out_images

    for number, sample in enumerate(held_out_images(3)):
        sample.image.save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    arguments = ("--images", tmp_path, "--images", tmp_path / "0.png", "--no-write")
    certificate = run(fixed_digits, digits, *arguments)
    assert certificate["images"]["real"] == 3
    (tmp_path / "3.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    with pytest.raises(InputError, match=r"3\.png"):
        run(fixed_digits, digits, *arguments)


def test_a_program_for_any_grid_is_shown_images_of_their_own_size(digits, tmp_path):
    folder = write_bundle(digits, tmp_path / "bundle", dynamic=True, precision="bfloat16")
    (result,) = run(folder, digits)["programs"]
    assert "1x36x36" in result["grids"], "the astronaut at its own size"


def test_a_photograph_at_its_own_grid_is_not_taken_for_one_that_was_fitted_to_it(digits, tmp_path):
    natural = Grid(1, 22, 32)  # that of one of scikit-image's photographs
    folder = write_bundle(digits, tmp_path / "bundle", "22x32", dynamic=True)
    certificate = run(folder, digits)
    assert all(str(natural) in result["grids"] for result in certificate["programs"])


# Trials


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), windows=st.integers(1, 40))
def test_trials_of_a_bucket_lie_within_it_and_fill_it(tiny, rows, columns, windows):
    tower = open_tower(tiny)
    bucket = Bucket({"patches": rows * columns * 4, "windows": windows})
    calls = trial_calls(tower, bucket)
    assert calls
    assert all(len(call) == 1 and tower.fits(bucket, call[0]) for call in calls)
    assert len(set(calls)) == len(calls)
    natural = tower.bucket(Grid(1, rows * 2, columns * 2))
    assert max(grid.patches for (grid,) in trial_calls(tower, natural)) == rows * columns * 4


def test_trials_of_any_grid_have_partial_windows_neighbours_and_a_video(tiny):
    calls = trial_calls(open_tower(tiny), AnyGrid())
    assert (Grid(1, 2, 2),) in calls
    assert any(len(call) > 1 for call in calls)
    assert any(grid.t == 2 for call in calls for grid in call)
    assert {(Grid(1, 10, 18),), (Grid(1, 18, 10),)} <= set(calls)
    limited = trial_calls(open_tower(tiny), AnyGrid(most_patches=30))
    assert limited
    assert all(grid.h * grid.w <= 30 for call in limited for grid in call)


def test_pictures_have_their_grid_and_are_the_same_every_time(digits):
    tower, photographs = open_tower(digits), bundled_photographs()[:2]
    trials = Trials(tower, image_processor(digits), photographs)
    for coverage in (FixedGrid(Grid(1, 10, 18)), AnyGrid(), tower.bucket(Grid(1, 14, 22))):
        found = trials.of(coverage)
        assert set(photographs) == {trial.photograph for trial in found} - {None}
        assert {"noise", "strokes", "gradient", "checkerboard"} <= {trial.name for trial in found}
        for trial in found:
            patches = trial.patches()
            assert patches.shape == (sum(grid.patches for grid in trial.grids), tower.patch_width)
            assert patches.dtype == np.float32
            np.testing.assert_array_equal(patches, trial.patches())
        assert len(set(found)) == len(found)


def test_images_are_found_once_and_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "c.txt"):
        (tmp_path / name).touch()
    found = find_images([tmp_path / "b.png", tmp_path])
    assert [path.name for path in found] == ["b.png", "a.JPG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no images"):
        find_images([tmp_path / "empty"])


# Numbers


floats = st.floats(-100, 100, width=32) | st.just(0.0)
values = floats | st.sampled_from([np.nan, np.inf])


def pairs(tokens, width):
    """Two arrays of that shape."""
    return st.tuples(*(arrays(np.float32, (tokens, width), elements=values),) * 2)


rows = st.tuples(st.integers(1, 9), st.integers(1, 5)).flatmap(lambda shape: pairs(*shape))
calls = st.tuples(st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda sizes: st.tuples(
        st.just(sizes[0]),
        st.lists(st.integers(1, 6).flatmap(lambda tokens: pairs(tokens, sizes[0] * sizes[1])), min_size=1, max_size=4),
    )
)


def naive(ours, reference):
    """Cosines and errors of lengths, one row at a time."""
    cosines, lengths = [], []
    for a, b in zip(ours.tolist(), reference.tolist(), strict=True):
        a = a if all(map(math.isfinite, a)) else [0.0] * len(a)
        b = b if all(map(math.isfinite, b)) else [0.0] * len(b)
        norm_a, norm_b = math.hypot(*a), math.hypot(*b)
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        cosines.append(dot / (norm_a * norm_b) if norm_a * norm_b > 0 else -1.0)
        lengths.append(abs(norm_a / norm_b - 1) if norm_b else 1.0)
    return cosines, lengths


@given(rows)
def test_rows_are_compared_as_a_naive_loop_does(pair):
    cosines, lengths = naive(*pair)
    np.testing.assert_allclose(token_cosines(*pair), cosines, rtol=0, atol=1e-9)
    np.testing.assert_allclose(length_errors(*pair), lengths, rtol=1e-9, atol=1e-9)


@given(calls)
def test_encodes_add_up(call):
    blocks, pairs = call
    width = pairs[0][0].shape[1] // blocks
    comparison = Comparison(width)
    for ours, reference in pairs:
        comparison.add(ours, reference)
    each_block = [tuple(x.reshape(-1, width) for x in pair) for pair in pairs]
    cosines = [cosine for pair in each_block for cosine in naive(*pair)[0]]
    assert comparison.tokens * blocks == len(cosines)
    assert comparison.encodes == len(pairs)
    assert comparison.lowest == pytest.approx(min(cosines), abs=1e-9)
    assert comparison.mean == pytest.approx(sum(cosines) / len(cosines), abs=1e-9)
    assert comparison.first_percentile == pytest.approx(np.percentile(cosines, 1), abs=1e-9)
    place = comparison.lowest_at
    at = place.token * blocks + place.block
    assert naive(*each_block[place.encode])[0][at] == pytest.approx(min(cosines), abs=1e-9)
    low = [min(cosines[n : n + blocks]) < 0.5 for n in range(0, len(cosines), blocks)]
    assert comparison.tokens_below(0.5) == sum(low)
    assert comparison.nonfinite_rows == sum(int((~np.isfinite(ours)).any(axis=1).sum()) for ours, _ in pairs)
    clean = [[np.where(np.isfinite(x).all(1, keepdims=True), x, 0).astype(float) for x in pair] for pair in each_block]
    errors = []
    for block in range(blocks):
        error = math.sqrt(sum(np.square(ours - exact)[block::blocks].sum() for ours, exact in clean))
        size = math.sqrt(sum(np.square(exact)[block::blocks].sum() for _, exact in clean))
        errors.append(error / size if size else float(error > 0))
    assert comparison.relative_error == pytest.approx(max(errors), rel=1e-9)


def test_zeros_never_pass():
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    for pair in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        comparison = Comparison(3)
        comparison.add(*pair)
        assert comparison.lowest == -1
    missing = Comparison(3)
    missing.add_missing(ones, 2)
    assert (missing.lowest, missing.relative_error, missing.nonfinite_rows) == (-1, 1, 2)
