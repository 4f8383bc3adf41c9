"""Hostile input is refused by an error of this package or read, and nothing else; and the harness would tell.

`make hostile` reads ten times as many.
"""

from pathlib import Path

import pytest

from hostile import planted
from hostile.every_kind import KINDS
from hostile.fuzz_runs import TARGETS, fuzz_all
from hostile.harness import findings, run, shares, table
from hostile.seeds import make_seeds

CASES = 1000
FOLDER = Path(__file__).parent
REFUSED_WHOLE = {"image: other formats"}


@pytest.fixture(scope="module")
def accounts(tmp_path_factory):
    """What became of the cases of every kind."""
    work = tmp_path_factory.mktemp("hostile")
    make_seeds(work / "seeds")
    return run(work / "seeds", work, shares(CASES, {name: kind.share for name, kind in KINDS.items()}))


def test_no_hostile_input_does_more_than_to_be_refused_or_read(accounts, record_property):
    found = findings(accounts)
    assert not found, "\n\n".join([table(accounts), *found])
    cases = sum(account.cases for account in accounts.values())
    assert cases >= CASES
    record_property(
        "evidence: hostile files (bundles, checkpoints, images, models) refused with an error of ours, or read", cases
    )


def test_what_is_not_hostile_is_read(accounts):
    refused = {name for name, account in accounts.items() if account.whole != "read"}
    assert refused == REFUSED_WHOLE


def test_every_kind_has_input_that_is_refused_and_nearly_every_one_has_some_that_is_read(accounts):
    """Or else the input would not reach what it is for."""
    assert all(account.outcomes.total() > account.outcomes["read"] for account in accounts.values())
    assert {name for name, account in accounts.items() if not account.outcomes["read"]} <= REFUSED_WHOLE


def test_memory_stays_within_its_bound(accounts):
    assert all(account.peak < 1.5 * 2**30 for account in accounts.values())
    assert any(account.peak > 2**26 for account in accounts.values()), "it is measured"


def test_fuzz_targets_end_without_a_finding(tmp_path):
    fuzzed = fuzz_all(tmp_path, {"images": 100, "contexts": 100})
    assert [each.finding for each in fuzzed.values()] == ["", ""]
    assert all(each.runs >= 100 for each in fuzzed.values())
    assert {path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz_*.py")} - {"runs", "planted"} == set(TARGETS)


def test_a_fault_that_a_fuzz_target_meets_is_a_finding(tmp_path):
    fuzzed = fuzz_all(tmp_path, {"planted": 100})
    assert "KeyError: 'none of ours'" in fuzzed["planted"].finding
    assert fuzzed["planted"].finding.startswith("status 77 after")


@pytest.fixture(scope="module")
def planted_accounts(tmp_path_factory):
    """What the harness finds of readers that do what none may."""
    work = tmp_path_factory.mktemp("planted")
    (work / "seeds").mkdir()
    return run(work / "seeds", work, dict.fromkeys(planted.KINDS, 4), kinds="hostile.planted", seconds=0.5)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("foreign", "foreign error"), ("greedy", "out of memory"), ("crashing", "death with status -11"),
        ("turning", "hang in case 2"), ("waiting", "hang in case 2"), ("leaving", "death with status 0"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(planted_accounts, name, finding):
    (found,) = planted_accounts[name].findings
    assert found.startswith(finding)


def test_a_good_reader_has_no_findings(planted_accounts):
    account = planted_accounts["good"]
    assert not account.findings
    assert (account.cases, dict(account.outcomes)) == (4, {"read": 3, "InputError": 1})
    assert "InputError 1" in table({"good": account})
