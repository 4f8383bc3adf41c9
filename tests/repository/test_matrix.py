"""The page of what ran shows the results as they are, and says why a combination is missing."""

import re

import pytest

from doc_pages import ROOT
from docsite import matrix
from docsite.evidence import Evidence
from visionaccel.families import family_for, supported_architectures
from visionaccel_testing.checkpoints import TINY_TOWERS

FAMILIES = {family_for(name).name for name in supported_architectures()}


def test_a_form_that_only_other_families_ran_needs_a_reason(monkeypatch):
    ran = {"a: onnxrt": ["any grid", "bucket"], "b: onnxrt": ["any grid"]}
    monkeypatch.setattr(matrix, "committed", lambda: Evidence({}, {}, ran))
    with pytest.raises(ValueError, match="no result of onnxrt, bucket and b"):
        matrix.form_table("ab")
    monkeypatch.setitem(matrix.ABSENT, ("onnxrt, bucket", "b"), "it has one size")
    assert matrix.form_table("ab").splitlines() == [
        "| backend | form | `a` | `b` |",
        "| --- | --- | --- | --- |",
        "| `onnxrt` | any grid | yes | yes |",
        "| `onnxrt` | bucket | yes | it has one size |",
    ]


def test_every_family_is_on_the_page():
    assert TINY_TOWERS.keys() == FAMILIES


def test_the_readme_lists_every_family():
    assert set(re.findall(r"^\| `(\w+)` \| [^|`]+ \|$", (ROOT / "README.md").read_text(), re.MULTILINE)) >= FAMILIES
