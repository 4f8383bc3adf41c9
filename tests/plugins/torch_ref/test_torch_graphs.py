"""Calls that are replayed give what was computed, in memory of their own, or are not replayed. Captures are simulated
on the CPU; those of CUDA are run where there is a GPU."""

import logging

import numpy as np
import pytest
import torch

from towers import random_patches
from visionaccel import open_encoder
from visionaccel.core.grid import as_grids
from visionaccel.core.program import CHECKPOINT
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel_torch_ref.graphs import GraphedTower
from visionaccel_torch_ref.linear import sdpa
from visionaccel_torch_ref.tower import FastTower

GRIDS = [(1, 12, 10), (3, 6, 18), (1, 16, 16)]
OTHERS = [[(1, 2, 2 * i)] for i in range(1, 20)]


class SimulatedCapture:
    """What CUDA does, simulated: a replay computes from the memory that was captured into memory that stays."""

    def __init__(self):
        self.captured, self.replays = 0, 0

    def __call__(self, compute):
        self.captured += 1
        answer = compute().clone()

        def replay():
            self.replays += 1
            answer.copy_(compute())

        return replay, answer


@pytest.fixture
def capture():
    return SimulatedCapture()


@pytest.fixture(scope="module")
def tower(tiny):
    (program,) = open_tower(tiny).programs([CHECKPOINT])
    return FastTower(program, dtype=torch.float32, attention=sdpa, device="cpu")


def call(tower, grids, seed=0):
    patches = torch.from_numpy(random_patches(grids, seed=seed))
    with torch.no_grad():
        return tower(patches, as_grids(np.array(grids)))


def test_grids_that_come_again_are_captured_and_then_replayed(tower, capture):
    graphed = GraphedTower(tower, capture)
    for time in range(5):
        assert torch.equal(call(graphed, GRIDS, time), call(tower, GRIDS, time))
        assert capture.captured == (0 if time == 0 else 1)
    assert capture.replays == 1 + 3, "once to compare, and then each call"


def test_an_answer_is_the_callers(tower, capture):
    graphed = GraphedTower(tower, capture)
    answers = [call(graphed, GRIDS, time) for time in range(5)]
    for answer in answers:
        answer.zero_()
    assert torch.equal(call(graphed, GRIDS), call(tower, GRIDS))
    kept = call(graphed, GRIDS, 1)
    before = kept.clone()
    call(graphed, GRIDS, 2)
    assert torch.equal(kept, before)


def test_a_graph_outlives_the_tables_that_the_tower_keeps(tower, capture):
    graphed = GraphedTower(tower, capture)
    for _ in range(3):
        call(graphed, GRIDS)
    for grids in OTHERS[:14]:
        call(graphed, grids)
    for grids in OTHERS:  # more than the tower keeps layouts
        call(tower, grids)
    assert torch.equal(call(graphed, GRIDS, 7), call(tower, GRIDS, 7))
    assert capture.captured == 1


def test_only_the_latest_are_kept(tower, capture):
    graphed = GraphedTower(tower, capture)
    for _ in range(3):
        for grids in OTHERS:  # more than are kept, so each is forgotten before it comes again
            assert torch.equal(call(graphed, grids), call(tower, grids))
    assert capture.captured == 0


def test_what_a_graph_computes_wrongly_is_never_answered(tower, capture, caplog):
    def wrong(compute):
        replay, answer = capture(compute)

        def off_by_little():
            replay()
            answer[0, 0] += 1e-3

        return off_by_little, answer

    graphed = GraphedTower(tower, wrong)
    with caplog.at_level(logging.WARNING):
        for time in range(5):
            assert torch.equal(call(graphed, GRIDS, time), call(tower, GRIDS, time))
    assert caplog.text.count("CUDA graphs are not used from now on") == 1
    assert capture.captured == 1


def test_a_wrong_graph_ends_the_replays_of_those_before_it(tower, capture):
    bad = []

    def sometimes(compute):
        replay, answer = capture(compute)
        return (lambda: answer.zero_()) if bad else replay, answer

    graphed = GraphedTower(tower, sometimes)
    for _ in range(3):
        call(graphed, GRIDS)
    replays = capture.replays
    bad.append(True)
    for _ in range(2):
        call(graphed, OTHERS[0])
    assert torch.equal(call(graphed, GRIDS, 3), call(tower, GRIDS, 3))
    assert capture.replays == replays


def test_answers_that_cannot_be_compared_are_not_captured_and_others_still_are(tower, capture):
    graphed = GraphedTower(tower, capture)
    patches = torch.full_like(torch.from_numpy(random_patches(GRIDS)), torch.nan)
    with torch.no_grad():
        for _ in range(3):
            graphed(patches, as_grids(np.array(GRIDS)))
    assert capture.captured == 0
    call(graphed, GRIDS)
    assert capture.captured == 1


def test_where_memory_runs_out_other_grids_are_captured_later(tower, capture, caplog):
    full, tried = [True], []

    def short(compute):
        tried.append(compute)
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(compute)

    graphed = GraphedTower(tower, short)
    for _ in range(4):
        assert torch.equal(call(graphed, GRIDS), call(tower, GRIDS))
    assert len(tried) == 1
    full.clear()
    for _ in range(2):
        call(graphed, OTHERS[0])
    assert capture.captured == 1
    assert not caplog.records


def test_what_was_captured_in_inference_mode_is_replayed_outside_it(tower, capture):
    graphed = GraphedTower(tower, capture)
    patches = torch.from_numpy(random_patches(GRIDS))
    with torch.inference_mode():
        for _ in range(2):
            graphed(patches + 0, as_grids(np.array(GRIDS)))
    assert torch.equal(call(graphed, GRIDS, 4), call(tower, GRIDS, 4))
    assert capture.replays == 2


def test_a_capture_that_fails_leaves_the_call_as_it_is(tower, caplog):
    def failing(compute):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedTower(tower, failing)
    with caplog.at_level(logging.WARNING):
        for time in range(4):
            assert torch.equal(call(graphed, GRIDS, time), call(tower, GRIDS, time))
    assert caplog.text.count("cannot capture the tower: operation not permitted") == 1


@pytest.mark.parametrize("options", [{}, {"implementation": "transformers"}], ids=["fast", "transformers"])
def test_graphs_are_refused_where_there_are_none(tiny, options):
    with pytest.raises(ConfigurationError, match=r"not support CUDA graphs.*on device 'cpu'.*Leave out"):
        open_encoder(tiny, backend="torch_ref", options={"graphs": True, **options})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cuda_replayed_calls_are_those_that_are_not(tiny, dtype, monkeypatch):
    """In any order, and with more lists of grids than are kept."""
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    options = {"dtype": dtype}
    with (
        open_encoder(tiny, backend="torch_ref", device="cuda", options={**options, "graphs": True}) as graphed,
        open_encoder(tiny, backend="torch_ref", device="cuda", options=options) as plain,
    ):
        for grids in (GRIDS, GRIDS, *OTHERS[:9], *OTHERS[:9], *reversed(OTHERS[:9]), GRIDS, GRIDS, *OTHERS, *OTHERS):
            patches = random_patches(grids, seed=len(replays))
            np.testing.assert_array_equal(graphed.encode(patches, grids), plain.encode(patches, grids))
    assert len(set(replays)) == 10
    assert len(replays) == 10 + 9 + 2, "each once to compare, and those that came again"
