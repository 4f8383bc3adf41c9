"""What a result of transformers' tests says about an encoder, and which of these tests are left out."""

import pytest

from doc_pages import ROOT
from transformers_tests.outcomes import Row, left_out_rules, reason_to_leave_out, report, verdict

LEFT_OUT = (ROOT / "tools" / "transformers_tests" / "left_out.toml").read_text()


def row(**values):
    return Row(**{"family": "f", "test": "FModelTest::test_generate", "group": "Mixin", "outcome": "passed", **values})


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ({"requests": 2, "ours": 2}, "passed"),
        ({}, "passed without an image"),
        ({"requests": 2}, "failed"),
        ({"requests": 2, "ours": 1, "theirs": 1}, "failed"),
        ({"requests": 2, "theirs": 2, "replaced": False}, "passed"),
        ({"outcome": "failed", "requests": 1, "ours": 1}, "failed"),
        ({"outcome": "failed", "own_tower": "passed"}, "failed"),
        ({"outcome": "failed", "own_tower": "failed"}, "failed with either tower"),
        ({"outcome": ""}, "failed"),
        ({"outcome": "skipped"}, "skipped"),
        ({"outcome": "left out"}, "left out"),
    ],
)
def test_a_test_has_passed_only_if_our_encoder_made_all_embeddings(values, column):
    assert verdict(row(**values)) == column


def test_the_report_counts_tests_by_the_class_they_come_from_and_says_why_some_failed():
    text = report([row(requests=1, ours=1), row(), row(group="Other", outcome="failed", detail="no such tensor")])
    assert "| `f` | Mixin | 1 | 1 | 0 | 0 | 0 | 0 |\n| `f` | Other | 0 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| `f` | all | 1 | 1 | 0 | 0 | 0 | 1 |" in text
    assert text.endswith("failed:\n- no such tensor\n  f FModelTest::test_generate")


def test_a_rule_is_about_names_of_tests_of_its_families():
    text = '[[rule]]\ntests = ["test_gen*", "Other::*"]\nfamilies = ["f"]\nreason = "it trains"\n'
    rules = left_out_rules(text)
    assert reason_to_leave_out(rules, row()) == "it trains"
    assert reason_to_leave_out(rules, row(test="Other::test_x")) == "it trains"
    assert reason_to_leave_out(rules, row(test="FModelTest::test_x")) is None
    assert reason_to_leave_out(rules, row(family="g")) is None


def test_every_test_that_is_left_out_has_a_reason_of_a_sentence():
    for rule in left_out_rules(LEFT_OUT):
        assert rule.tests
        assert len(rule.reason.split()) > 4
