"""The page of what ran shows the results as they are, and says why a combination is missing."""

import json
import re

import pytest

from doc_pages import ROOT
from docsite import matrix
from docsite.evidence import Evidence
from visionaccel.families import family_for, supported_architectures
from visionaccel_testing.checkpoints import TINY_TOWERS

FAMILIES = {family_for(name).name for name in supported_architectures()}


def test_a_form_that_only_other_families_ran_is_an_error(monkeypatch):
    ran = {"a: onnxrt": ["any grid", "bucket"], "b: onnxrt": ["any grid"]}
    monkeypatch.setattr(matrix, "committed", lambda: Evidence({}, {}, ran))
    with pytest.raises(ValueError, match="no result of onnxrt, bucket and b"):
        matrix.form_table("ab")
    monkeypatch.setattr(matrix, "committed", lambda: Evidence({}, {}, {**ran, "b: onnxrt": ["any grid", "bucket"]}))
    assert matrix.form_table("ab").splitlines() == [
        "| backend | form | `a` | `b` |",
        "| --- | --- | --- | --- |",
        "| `onnxrt` | any grid | yes | yes |",
        "| `onnxrt` | bucket | yes | yes |",
    ]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The lines of the table of some results in vLLM."""
    usual = {"family": "f", "backend": "onnxrt", "mode": "in-line", "precision": "float32", "prompts": 28, "equal": 28}

    def table(*rows):
        (tmp_path / "families.json").write_text(json.dumps([{**usual, "difference": 2e-6, **row} for row in rows]))
        monkeypatch.setattr(matrix, "SERVED", tmp_path / "families.json")
        return matrix.served_table().splitlines()

    return table


def test_a_model_has_what_it_answered_in_each_way(served):
    rows = {"architecture": "A"}, {"architecture": "A", "precision": "bfloat16", "equal": 27, "difference": 0.02}
    assert served(*rows) == [
        "| architecture | family | task | `onnxrt`, in-line, float32 | `onnxrt`, in-line, bfloat16 |",
        "| --- | --- | --- | --- | --- |",
        "| `A` | `f` | generate | 28 of 28, 2e-06 | 27 of 28, 2e-02 |",
    ]


def test_checkpoints_of_one_architecture_and_task_are_counted_together(served):
    rows = {"architecture": "A", "task": "embed"}, {"architecture": "A", "task": "embed", "prompts": 2, "equal": 1}
    assert served(*rows, {"architecture": "A"})[2:] == [
        "| `A` | `f` | embed | 29 of 30, 2e-06 |",
        "| `A` | `f` | generate | 28 of 28, 2e-06 |",
    ]


def test_a_model_that_was_not_asked_in_a_way_is_an_error(served):
    rows = {"architecture": "A"}, {"architecture": "B"}, {"architecture": "B", "mode": "pipelined"}
    with pytest.raises(ValueError, match="no result of A and `onnxrt`, pipelined, float32"):
        served(*rows)


def test_every_family_and_every_model_that_we_serve_is_on_the_page():
    from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES

    assert TINY_TOWERS.keys() == FAMILIES
    rows = json.loads(matrix.SERVED.read_text())
    page = (ROOT / "docs" / "matrix.md").read_text()
    assert [name for name in ARCHITECTURES if f"`{name}`" not in page] == []
    for row in rows:
        if row["precision"] == "float32":
            assert row["equal"] == row["prompts"] >= 20
            assert row["difference"] <= 1e-4


def test_the_readme_lists_every_family():
    assert set(re.findall(r"^\| `(\w+)` \| [^|`]+ \|$", (ROOT / "README.md").read_text(), re.MULTILINE)) >= FAMILIES
