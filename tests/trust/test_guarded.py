"""One item's fault is one item's answer."""

import multiprocessing

import numpy as np
import pytest

from towers import random_patches
from visionaccel import open_encoder
from visionaccel.backends import Session
from visionaccel.errors import DeviceError, InputError, NonFiniteError, PatchesError, VisionAccelError
from visionaccel.trust import ChainLink, GuardedEncoder

GRIDS = [(1, 4, 4), (1, 6, 4), (2, 4, 4)]
ENDS = [16, 40, 72]


class Failing(Session):
    """Wraps a session and fails whenever it is given a grid of six rows; counts its calls."""

    def __init__(self, session):
        self.session = session
        self.calls = 0

    @property
    def capabilities(self):
        return self.session.capabilities

    def run(self, inputs):
        self.calls += 1
        if 6 in inputs["grid_thw"][:, 1]:
            raise OSError("the device went away")
        return self.session.run(inputs)

    def close(self):
        self.session.close()


@pytest.fixture
def healthy(tiny):
    with open_encoder(tiny, backend="torch_ref") as encoder:
        yield encoder


@pytest.fixture
def failing(tiny):
    encoder = open_encoder(tiny, backend="torch_ref")
    encoder.programs[0].session = Failing(encoder.programs[0].session)
    return encoder


def test_without_faults_one_call_serves_all(failing):
    grids = [(1, 4, 4), (2, 4, 4)]
    answers = GuardedEncoder(failing).encode_items(random_patches(grids), grids)
    assert [len(answer.rows) for answer in answers] == [4, 8]
    assert failing.programs[0].session.calls == 1


def test_only_the_item_at_fault_fails(failing, healthy):
    patches = random_patches(GRIDS)
    guarded = GuardedEncoder(failing)
    first, second, third = guarded.encode_items(patches, GRIDS)
    assert isinstance(second, DeviceError)
    assert "the device went away" in str(second)
    np.testing.assert_allclose(first.rows, healthy.encode(patches[:16], GRIDS[:1]), rtol=0, atol=2e-5)
    np.testing.assert_allclose(third.rows, healthy.encode(patches[40:], GRIDS[2:]), rtol=0, atol=2e-5)
    assert guarded.failed_items == 1


def test_the_fallback_takes_over_what_the_device_could_not_do(failing, healthy, caplog):
    opened = []

    def fallback():
        opened.append(True)
        return healthy

    patches = random_patches(GRIDS)
    guarded = GuardedEncoder(failing, [ChainLink("torch_ref", fallback)])
    for _ in range(2):
        answers = guarded.encode_items(patches, GRIDS)
        assert [answer.fallback for answer in answers] == [False, True, False]
        rows = np.concatenate([answer.rows for answer in answers])
        np.testing.assert_allclose(rows, healthy.encode(patches, GRIDS), rtol=0, atol=2e-5)
    assert (guarded.fallback_items, guarded.failed_items, opened) == (2, 0, [True])
    assert "using fallback 'torch_ref' (2 images so far)" in caplog.text


@pytest.mark.parametrize("kind", [DeviceError, MemoryError])
def test_a_failing_fallback_is_reported_with_both_reasons_and_tried_once_more(failing, kind):
    opened = []

    def fallback():
        opened.append(True)
        raise kind("no memory for a second encoder.")

    guarded = GuardedEncoder(failing, [ChainLink("torch_ref", fallback)])
    for _ in range(2):
        (answer,) = guarded.encode_items(random_patches([(1, 6, 4)]), [(1, 6, 4)])
        assert isinstance(answer, DeviceError)
        assert "went away" in str(answer)
        assert "no memory" in str(answer)
    assert opened == [True, True], "once more at once, and then in the background"
    guarded.close()


def test_bad_pixels_are_not_sent_to_the_fallback(healthy):
    patches = random_patches(GRIDS)
    patches[20, 3] = np.nan

    def fallback():
        raise AssertionError("not for bad input")

    first, second, third = GuardedEncoder(healthy, [ChainLink("torch_ref", fallback)]).encode_items(patches, GRIDS)
    assert isinstance(second, NonFiniteError)
    assert not isinstance(first, VisionAccelError)
    assert not isinstance(third, VisionAccelError)


@pytest.mark.parametrize(
    ("count", "grids", "kind"),
    [(71, GRIDS, PatchesError), (72, [(1, 4, 4), (1, 5, 4)], InputError), (72, [(1, 4)], InputError)],
)
def test_where_rows_cannot_be_told_apart_the_error_is_everybodys(healthy, count, grids, kind):
    answers = GuardedEncoder(healthy).encode_items(random_patches(GRIDS)[:count], grids)
    assert len(answers) == len(grids)
    assert all(isinstance(answer, kind) for answer in answers)


def test_closing_closes_both(failing, healthy):
    guarded = GuardedEncoder(failing, [ChainLink("torch_ref", healthy)])
    guarded.encode_items(random_patches([(1, 6, 4)]), [(1, 6, 4)])
    guarded.close()
    for encoder in (failing, healthy):
        with pytest.raises(DeviceError, match="closed"):
            encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])


def _errors_in_a_fork(queue, guarded, patches):
    queue.put([str(answer) for answer in guarded.encode_items(patches, GRIDS)])


def test_a_fork_is_refused_at_once(healthy):
    guarded, patches = GuardedEncoder(healthy), random_patches(GRIDS)
    guarded.encode_items(patches, GRIDS)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    process = fork.Process(target=_errors_in_a_fork, args=(queue, guarded, patches), daemon=True)
    process.start()
    process.join(30)
    assert not process.is_alive()
    assert queue.get() == ["the device was opened by a different process. Open it after the fork."] * 3
    guarded.close()
