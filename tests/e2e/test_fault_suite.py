"""Faults planted behind real servers: a part of what `visionaccel faults` plants, with every check of it."""

import pytest

from forked import servers
from visionaccel_bench.faultsuite.cells import Cell, Serving, every_cell
from visionaccel_bench.faultsuite.suite import SuiteImages, images_needed, run_suite

SERVINGS = {
    Serving("inline", "none", True): {("nan", "beside"), ("hang", "alone"), ("drift", "alone"), ("raise", "repeated")},
    Serving("pipelined", "process", True): {
        ("zeros", "beside"), ("hang", "alone"), ("drift", "beside"), ("exit", "repeated"), ("abort", "restart"),
    },
    Serving("pipelined", "process", True, faulty=True): {("raise", "unopened"), ("exit", "both")},
}  # fmt: skip


def cells_of(serving):
    """The cells of a kind of server that are tested here."""
    return [cell for cell in every_cell() if cell.serving == serving and (cell.fault, cell.moment) in SERVINGS[serving]]


def test_the_matrix_has_every_fault_moment_mode_and_isolation():
    cells = every_cell()
    assert len(cells) == len(set(cells)) >= 40
    kinds = {(cell.serving.mode, cell.serving.isolation) for cell in cells}
    assert kinds == {(mode, isolation) for mode in ("inline", "pipelined") for isolation in ("none", "process")}
    assert {cell.expected for cell in cells} == {"answer", "error"}
    assert all(len(cells_of(serving)) == len(some) for serving, some in SERVINGS.items())


@pytest.fixture(scope="module")
def images():
    cells = [cell for serving in SERVINGS for cell in cells_of(serving)]
    with servers():
        yield SuiteImages.asked_of_stock(images_needed(cells), print)


def name_of(serving):
    return f"{serving.mode}-{serving.isolation}" + ("-faulty" if serving.faulty else "")


@pytest.mark.parametrize("serving", SERVINGS, ids=name_of)
def test_every_planted_fault_is_answered_correctly_and_nothing_is_lost(images, serving, record_property):
    rows = [row for _, row in run_suite(cells_of(serving), images, print)]
    assert len(rows) == len(SERVINGS[serving])
    for row in rows:
        assert row.passed, row
        assert (row.answered, row.lost, row.wrong) == ("right answer", 0, 0)
        assert row.recovery_seconds is not None
    shown = "faults planted behind real servers, in-line and pipelined: no request lost, no answer wrong"
    record_property(f"evidence: {shown}", len(rows))


def test_a_suite_whose_fault_does_not_strike_does_not_pass(images):
    """The checks of the suite can fail: here the fault is lifted before the first request."""
    cell = Cell(Serving("pipelined", "process", True), "raise", "alone")

    class Harmless(SuiteImages):
        def rule(self, fault, victim, others):
            return {"share": 0, "do": "raise"}

    harmless = Harmless(images.checkpoint, images.pictures, images.expected)
    wrong = [(tokens[0] + 1, *tokens[1:]) for tokens in images.expected[:1]]
    harmless.expected = (*wrong, *images.expected[1:])
    ((_, row),) = run_suite([cell], harmless, print)
    assert not row.passed
    assert "The fault did not occur." in row.detail
    assert row.answered == "a wrong answer"
    assert row.wrong >= 1
