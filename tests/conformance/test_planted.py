"""The conformance kit itself: it finds each planted fault by name, and nothing in a good backend."""

import sys

import pytest

from conformance.planted import GOOD, PLANTED, Planted, install
from visionaccel.testing.conformance import CHECKS, BackendUnderTest, KnownFailure, run_checks


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the Python path of this process and of those that it starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.startswith("visionaccel_kit_")]:
        del sys.modules[name]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_fault_is_found_by_the_check_that_names_it(planted: Planted, site, tmp_path):
    name = f"kit_{planted.name}"
    install(site, name, planted.source, planted.requires)
    (check,) = (check for check in CHECKS if check.name == planted.check)
    (outcome,) = run_checks(BackendUnderTest(name, source=planted.opens), tmp_path / "work", checks=[check])
    assert outcome.status == "failed"
    assert planted.says in outcome.detail


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_in_a_good_backend(seed, site, tmp_path):
    install(site, GOOD)
    # The digits model and its images do not depend on the seed.
    checks = [check for check in CHECKS if seed == 0 or check.name != "L2-digits"]
    outcomes = run_checks(BackendUnderTest(GOOD), tmp_path / "work", checks=checks, seed=seed)
    assert {outcome.check: outcome.detail for outcome in outcomes if outcome.status == "failed"} == {}
    inapplicable = {outcome.check for outcome in outcomes if outcome.status == "not applicable"}
    # It opens checkpoints, as models in files, for any grid.
    assert inapplicable == {"L0-foreign-families", "L1-padding", "L5-tampered"}


def test_every_level_finds_something():
    assert {planted.check[:2] for planted in PLANTED} == {f"L{level}" for level in range(7)}
    assert len({planted.name for planted in PLANTED}) == len(PLANTED) >= 15


def test_a_known_failure_is_told_apart_and_must_fail(site, tmp_path):
    from datetime import date

    install(site, "kit_known", "on_output(lambda self, inputs, rows: rows.astype(np.float64))")
    known = tuple(KnownFailure(name, date(2026, 11, 1), "the vendor's fault") for name in ("L1-rows", "L0-options"))
    checks = [check for check in CHECKS if check.name in ("L1-rows", "L0-options")]
    outcomes = run_checks(BackendUnderTest("kit_known", known_failures=known), tmp_path / "work", checks=checks)
    found = {outcome.check: outcome for outcome in outcomes}
    assert found["L1-rows"].status == "known failure"
    assert "2026-11-01: the vendor's fault" in found["L1-rows"].detail
    assert found["L0-options"].status == "failed"
    assert "remove that" in found["L0-options"].detail
