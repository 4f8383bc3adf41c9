"""Faults planted behind real servers: a part of what `visionaccel faults` plants, with every check of it."""

import pytest

from visionaccel_bench.faultsuite.matrix import Serving, cells_of, every_serving
from visionaccel_bench.faultsuite.suite import SuiteImages, images_needed, run_suite, suite_of

SERVINGS = {
    Serving("inline", "none", True): {("nan", "beside"), ("hang", "alone"), ("drift", "alone"), ("raise", "repeated")},
    Serving("pipelined", "process", True): {
        ("zeros", "beside"), ("hang", "alone"), ("drift", "beside"), ("exit", "repeated"), ("abort", "restart"),
    },
    Serving("pipelined", "process", True, faulty=True): {("raise", "unopened"), ("exit", "both")},
}  # fmt: skip


def wanted(cell):
    return (cell.fault, cell.moment) in SERVINGS.get(cell.serving, ())


def test_the_matrix_has_every_fault_moment_mode_and_isolation():
    cells = [cell for serving in every_serving() for cell in cells_of(serving)]
    assert len(cells) == len(set(cells)) >= 40
    kinds = {(cell.serving.mode, cell.serving.isolation) for cell in cells}
    assert kinds == {(mode, isolation) for mode in ("inline", "pipelined") for isolation in ("none", "process")}
    assert {cell.expected for cell in cells} == {"answer", "error"}
    assert all(sum(map(wanted, cells_of(serving))) == len(some) for serving, some in SERVINGS.items())


@pytest.fixture(scope="module")
def images():
    return SuiteImages.asked_of_stock(images_needed(SERVINGS, wanted), lambda _: None)


def name_of(serving):
    return f"{serving.mode}-{serving.isolation}" + ("-faulty" if serving.faulty else "")


@pytest.mark.parametrize("serving", SERVINGS, ids=name_of)
def test_every_planted_fault_is_answered_rightly_and_nothing_is_lost(images, serving):
    outcomes = run_suite([serving], images, wanted=wanted)
    assert len(outcomes) == len(SERVINGS[serving])
    for row in suite_of(outcomes, "now").rows:
        assert row.passed, row
        assert (row.answered, row.lost, row.wrong) == ("right answer", 0, 0)
        assert row.recovery_seconds is not None


def test_a_suite_whose_fault_does_not_strike_does_not_pass(images):
    """The checks of the suite can fail: here the fault is taken back before anybody asks."""
    serving = Serving("pipelined", "process", True)

    class Harmless(SuiteImages):
        def rule(self, fault, victim, others):
            return {"share": 0, "do": "raise"}

    harmless = Harmless(images.checkpoint, images.pictures, images.expected)
    wrong = [(tokens[0] + 1, *tokens[1:]) for tokens in images.expected[:1]]
    harmless.expected = (*wrong, *images.expected[1:])
    (outcome,) = run_suite([serving], harmless, wanted=lambda cell: (cell.fault, cell.moment) == ("raise", "alone"))
    assert "The fault did not strike." in outcome.problems
    assert outcome.answered == "a wrong answer"
    assert outcome.wrong >= 1
