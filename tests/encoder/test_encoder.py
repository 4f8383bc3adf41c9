"""The encoder on real backends: shapes, order, independence of neighbours, and errors of the right type."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fake_plugins import ECHO, install
from strategies import grid_lists
from towers import random_patches, reference
from visionaccel import Encoder, open_encoder
from visionaccel.backends import Capabilities, EncodeReport, Registry, Session, hookimpl
from visionaccel.core.program import CHECKPOINT
from visionaccel.encoder import open_tower, opening
from visionaccel.errors import DeviceError, GridError, InputError, NonFiniteError, OutputError, PatchesError

TOKENS_WIDTH = 24


@pytest.fixture(scope="module", params=["onnxrt", "torch_ref"])
def encoder(request, tiny):
    with open_encoder(tiny, backend=request.param) as encoder:
        yield encoder


def split(embeddings, triples):
    return np.split(embeddings, np.cumsum([t * h * w // 4 for t, h, w in triples])[:-1])


@given(triples=grid_lists(), data=st.data())
@hypothesis_settings(max_examples=20)
def test_one_row_a_token_and_items_do_not_see_each_other(encoder, triples, data):
    patches = random_patches(triples)
    embeddings = encoder.encode(patches, triples)
    assert embeddings.shape == (sum(t * h * w for t, h, w in triples) // 4, TOKENS_WIDTH)
    assert embeddings.dtype == np.float32

    order = data.draw(st.permutations(range(len(triples))))
    items = np.split(patches, np.cumsum([t * h * w for t, h, w in triples])[:-1])
    permuted = encoder.encode(np.concatenate([items[i] for i in order]), [triples[i] for i in order])
    expected = [split(embeddings, triples)[i] for i in order]
    np.testing.assert_allclose(permuted, np.concatenate(expected), rtol=0, atol=2e-5)


@given(triples=grid_lists(most=3))
@hypothesis_settings(max_examples=15)
def test_embeddings_equal_the_reference(tiny, encoder, triples):
    patches = random_patches(triples)
    np.testing.assert_allclose(encoder.encode(patches, triples), reference(tiny, patches, triples), rtol=0, atol=2e-5)


def test_frames_of_a_video_do_not_see_each_other_but_their_patches_do(encoder):
    video = [(3, 6, 10)]
    patches = random_patches(video)
    before = encoder.encode(patches, video)
    patches[60:120] += 1.0
    after = encoder.encode(patches, video)
    changed = np.abs(after - before).max(axis=1) > 1e-4
    np.testing.assert_array_equal(changed, [False] * 15 + [True] * 15 + [False] * 15)


@pytest.mark.parametrize(
    "convert",
    [
        lambda p: p.astype(np.float16),
        lambda p: p.astype(ml_dtypes.bfloat16),
        lambda p: torch.from_numpy(p.copy()).bfloat16(),
        lambda p: torch.from_numpy(p.copy()),
        lambda p: np.asfortranarray(p),
        lambda p: np.repeat(p, 2, axis=0)[::2],
    ],
    ids=["float16", "bfloat16", "bfloat16 tensor", "tensor", "fortran order", "strided"],
)
def test_every_accepted_form_of_patches_is_read_right(encoder, convert):
    grids = [(1, 6, 10), (2, 4, 4), (1, 6, 10)]
    given_patches = convert(random_patches(grids))
    exact = np.asarray(
        given_patches.float().numpy() if isinstance(given_patches, torch.Tensor) else given_patches.astype(np.float32)
    )
    out = encoder.encode(given_patches, grids)
    np.testing.assert_allclose(np.asarray(out), encoder.encode(exact, grids), rtol=0, atol=2e-5)


def test_input_may_be_read_only_and_is_not_written_to(encoder):
    grids = [(1, 10, 6)]
    patches = random_patches(grids)
    patches.flags.writeable = False
    kept = patches.copy()
    encoder.encode(patches, grids)
    np.testing.assert_array_equal(patches, kept)


def test_outputs_of_two_calls_share_no_memory(encoder):
    grids = [(1, 4, 4)]
    first = encoder.encode(random_patches(grids, seed=1), grids)
    kept = first.copy()
    second = encoder.encode(random_patches(grids, seed=2), grids)
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)


def test_tensors_stay_tensors_where_the_session_takes_them(tiny):
    grids = [(1, 4, 4), (1, 6, 4)]
    tensor = torch.from_numpy(random_patches(grids))
    with open_encoder(tiny, backend="torch_ref") as takes, open_encoder(tiny, backend="onnxrt") as does_not:
        assert isinstance(takes.encode(tensor, grids), torch.Tensor)
        assert isinstance(does_not.encode(tensor, grids), np.ndarray)


def test_threads_may_share_an_encoder(encoder):
    grids = [[(1, 4 + 2 * i, 6)] for i in range(6)]
    inputs = [random_patches(g, seed=i) for i, g in enumerate(grids)]
    expected = [encoder.encode(p, g) for p, g in zip(inputs, grids, strict=True)]
    got: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.__setitem__(i, encoder.encode(inputs[i], grids[i]))) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        np.testing.assert_allclose(got[i], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("patches", "grids", "kind"),
    [
        (random_patches([(1, 4, 4)]), [(1, 4, 3)], GridError),
        (random_patches([(1, 4, 4)]), [], GridError),
        (random_patches([(1, 4, 4)]), [(1, 4, 6)], PatchesError),
        (random_patches([(1, 4, 4)])[:, :-1], [(1, 4, 4)], PatchesError),
        (random_patches([(1, 4, 4)]) * np.nan, [(1, 4, 4)], NonFiniteError),
        (random_patches([(1, 4, 4)]).astype(np.int32), [(1, 4, 4)], PatchesError),
    ],
)
def test_wrong_input_is_refused_and_the_encoder_stays_usable(encoder, patches, grids, kind):
    with pytest.raises(kind) as caught:
        encoder.encode(patches, grids)
    assert isinstance(caught.value, InputError)
    assert caught.value.hint
    assert len(encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])) == 4


def test_a_closed_encoder_says_so_and_closes_twice(tiny):
    encoder = open_encoder(tiny, backend="onnxrt")
    encoder.close()
    encoder.close()
    with pytest.raises(DeviceError, match="closed"):
        encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])


class Slow(Session):
    """A session that takes a moment, counts calls in progress, and knows whether it was closed under one."""

    def __init__(self, thread_safe):
        self.capabilities = Capabilities(device="nowhere", precision="float32", thread_safe=thread_safe)
        self.running = self.most = 0
        self.closed_while_running = False
        self.entered = threading.Event()
        self.guard = threading.Lock()

    def run(self, inputs):
        with self.guard:
            self.running += 1
            self.most = max(self.most, self.running)
        self.entered.set()
        time.sleep(0.05)
        with self.guard:
            self.running -= 1
        rows = np.arange(len(inputs["pixel_values"]) // 4 * TOKENS_WIDTH, dtype=np.float32)
        return {"embeddings": rows.reshape(-1, TOKENS_WIDTH)}

    def close(self):
        self.closed_while_running = self.running > 0


@pytest.mark.parametrize("thread_safe", [False, True])
def test_calls_overlap_only_on_thread_safe_sessions(tiny, thread_safe):
    session = Slow(thread_safe)
    with open_encoder(tiny, backend="onnxrt") as encoder:
        programs = [replace(encoder.programs[0], session=session)]
        encoder = Encoder(encoder.tower, "slow", programs, Registry())
    patches = random_patches([(1, 4, 4)])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: encoder.encode(patches, [(1, 4, 4)]), range(4)))
    assert (session.most > 1) == thread_safe


@pytest.mark.parametrize("thread_safe", [False, True])
def test_closing_waits_for_the_call_in_progress(tiny, thread_safe):
    session = Slow(thread_safe)
    with open_encoder(tiny, backend="onnxrt") as encoder:
        programs = [replace(encoder.programs[0], session=session)]
        encoder = Encoder(encoder.tower, "slow", programs, Registry())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(encoder.encode, random_patches([(1, 4, 4)]), [(1, 4, 4)])
        assert session.entered.wait(5)
        encoder.close()
        assert not session.closed_while_running
        assert len(running.result()) == 4


@hypothesis_settings(max_examples=20)
@given(waits=st.lists(st.sampled_from([0.0, 0.02, None, "call"]), min_size=2, max_size=6), thread_safe=st.booleans())
def test_the_device_is_given_back_once_and_never_during_a_call(tiny, waits, thread_safe):
    class Counted(Slow):
        closed = 0

        def close(self):
            super().close()
            self.closed += 1

    session = Counted(thread_safe)
    with open_encoder(tiny, backend="onnxrt") as encoder:
        programs = [replace(encoder.programs[0], session=session)]
        encoder = Encoder(encoder.tower, "slow", programs, Registry())
    patches = random_patches([(1, 4, 4)])

    def act(wait):
        if wait != "call":
            return encoder.close(wait)
        try:
            return len(encoder.encode(patches, [(1, 4, 4)])) == 4
        except DeviceError as error:
            return "closed" in error.message

    with ThreadPoolExecutor(len(waits)) as pool:
        found = list(pool.map(act, waits))
    assert all(answer for wait, answer in zip(waits, found, strict=True) if wait in (None, "call"))
    assert encoder.close()
    assert session.closed == 1
    assert not session.closed_while_running
    assert session.most <= (len(waits) if thread_safe else 1)


def test_a_session_that_fails_to_close_leaves_none_open(tiny):
    class Stuck(Slow):
        def close(self):
            super().close()
            self.closed = True
            raise OSError("the device is gone")

    sessions = [Stuck(True), Stuck(True)]
    with open_encoder(tiny, backend="onnxrt") as encoder:
        programs = [replace(encoder.programs[0], session=session) for session in sessions]
    with pytest.raises(OSError, match="gone"):
        Encoder(encoder.tower, "slow", programs, Registry()).close()
    assert all(session.closed for session in sessions)


def test_what_the_host_fails_at_is_a_device_error(tiny):
    with open_encoder(tiny, backend="onnxrt") as encoder:
        opened = encoder.programs[0]
        broken = type("Broken", (), {"inputs": lambda *_: 1 / 0})()
        broken_encoder = Encoder(encoder.tower, "onnxrt", [replace(opened, host=broken)], Registry())
        with pytest.raises(DeviceError, match="division by zero"):
            broken_encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])


BAD_RUNS = {
    "missing output": "return {}",
    "wrong shape": "return {'embeddings': np.zeros((3, 24), 'float32')}",
    "wrong dtype": "return {'embeddings': np.zeros((4, 24), 'float64')}",
    "nan": "return {'embeddings': np.full((4, 24), np.nan, 'float32')}",
}


@pytest.mark.parametrize("run", BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_backend_that_breaks_its_promise_is_found_out(tiny, tmp_path, monkeypatch, run):
    source = "import numpy as np\n" + ECHO.format(name="liar", score=1).replace(
        'raise RuntimeError("echo cannot compute")', run
    )
    monkeypatch.syspath_prepend(install(tmp_path, f"acme-liar-{abs(hash(run))}", "liar", source))
    encoder = open_encoder(tiny, backend="liar", registry=Registry())
    with pytest.raises(OutputError, match="backend 'liar' returned"):
        encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])


def test_whatever_a_backend_raises_becomes_a_device_error(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, "acme-echo", "echo", ECHO.format(name="echo", score=1)))
    encoder = open_encoder(tiny, backend="echo", registry=Registry())
    with pytest.raises(DeviceError, match=r"'echo' on grids 1x4x4 failed with RuntimeError: echo cannot compute"):
        encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])


@pytest.mark.parametrize(("kind", "copied"), [(CHECKPOINT, True), ("acme.graph", True), ("acme.compiled", False)])
def test_weights_are_copied_unless_they_are_known_to_be_in_the_program(tiny, tmp_path, monkeypatch, kind, copied):
    source = ECHO.format(name="acme", score=1)
    source = source.replace("    def probe", '    formats_with_weights = frozenset({"acme.compiled"})\n    def probe')
    source = source.replace('"checkpoint"', '"acme.graph", "acme.compiled", "checkpoint"')
    monkeypatch.syspath_prepend(install(tmp_path, "acme-graphs", "acme", source))
    held = []
    monkeypatch.setattr(opening, "hold_source", lambda source, weights: held.append(weights) or source)
    tower = open_tower(tiny)
    (program,) = tower.programs([CHECKPOINT])
    monkeypatch.setattr(tower, "programs", lambda formats: (replace(program, format=kind),))
    open_encoder(tower, backend="acme", registry=Registry()).close()
    assert bool(held) is copied


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_observers_get_a_report_and_cannot_break_an_encode(tiny, caplog, error):
    registry = Registry()
    reports: list[EncodeReport] = []

    class Observer:
        @hookimpl
        def visionaccel_encoded(self, report):
            reports.append(report)
            raise error("observer is broken")

    registry.plugins.register(Observer())
    grids = [(1, 4, 4), (2, 6, 4), (1, 4, 4)]
    with open_encoder(tiny, backend="onnxrt", registry=registry) as encoder:
        assert len(encoder.encode(random_patches(grids), grids)) == 20
    (report,) = reports
    assert (report.backend, report.device, report.patches, report.tokens) == ("onnxrt", "cpu", 80, 20)
    assert min(report.check_seconds, report.prepare_seconds, report.run_seconds, report.finish_seconds) > 0
    assert "observer is broken" in caplog.text


def test_bfloat16_arithmetic_is_near_the_reference(tiny):
    grids = [(1, 12, 10)]
    patches = random_patches(grids)
    with open_encoder(tiny, backend="torch_ref", options={"dtype": "bfloat16"}) as encoder:
        assert encoder.capabilities.precision == "bfloat16"
        ours, exact = encoder.encode(patches, grids), reference(tiny, patches, grids)
    cosine = (ours * exact).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("level", ["all", "extended", "basic", "none"])
def test_every_optimization_level_of_onnx_runtime_gives_the_same(tiny, level):
    grids = [(1, 12, 10), (2, 4, 6)]
    patches = random_patches(grids)
    with open_encoder(tiny, backend="onnxrt", options={"optimization": level, "threads": 1}) as encoder:
        np.testing.assert_allclose(encoder.encode(patches, grids), reference(tiny, patches, grids), rtol=0, atol=2e-5)
