"""What the pages say that the tests show is what the tests of a run recorded."""

import json

import pytest

import evidence
from docsite.evidence import Badge, Evidence, committed, found_in

JUNIT = """<testsuites><testsuite>
<testcase name="a"><properties>
  <property name="evidence: prompts" value="22"/><property name="other" value="5"/>
  <property name="ran: qwen2_vl: onnxrt: split" value="1"/><property name="ran: qwen2_vl: onnxrt: bucket" value="1"/>
</properties></testcase>
<testcase name="b"><properties><property name="evidence: prompts" value="3"/></properties></testcase>
<testcase name="c"><properties><property name="evidence: prompts" value="9"/></properties><failure/></testcase>
<testcase name="d"><properties><property name="evidence: prompts" value="9"/></properties><skipped/></testcase>
</testsuite></testsuites>"""


def test_numbers_of_passing_tests_are_added_up(tmp_path):
    (tmp_path / "unit.xml").write_text(JUNIT)
    (tmp_path / "e2e.xml").write_text(JUNIT)
    assert found_in(tmp_path, tmp_path / "none") == Evidence(
        {"prompts": 50}, {}, {"qwen2_vl: onnxrt": ["bucket", "split"]}
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The tool with this run's results, and with pages that say 25."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "unit.xml").write_text(JUNIT)
    pages = tmp_path / "evidence.json"
    ran = {"qwen2_vl: onnxrt": ["bucket", "split"]}
    pages.write_text(json.dumps({"shown": {"prompts": 25}, "badges": {}, "ran": ran}))
    monkeypatch.setattr(evidence, "VENV", tmp_path)
    monkeypatch.setattr(evidence, "EVIDENCE", pages)
    monkeypatch.setattr("docsite.evidence.EVIDENCE", pages)
    monkeypatch.setattr("sys.argv", ["evidence.py"])
    return tmp_path


def test_a_run_that_shows_what_the_pages_say_passes(run):
    assert evidence.main() == 0


def test_a_run_that_shows_less_fails_and_says_what(run, capsys):
    (run / "results" / "unit.xml").write_text(JUNIT.replace('"22"', '"21"'))
    assert evidence.main() == 1
    assert "prompts: the pages say 25, this run showed 24" in capsys.readouterr().out


def test_a_form_that_did_not_run_fails_and_is_named(run, capsys):
    (run / "results" / "unit.xml").write_text(JUNIT.replace("onnxrt: split", "onnxrt: bucket"))
    assert evidence.main() == 1
    said = "qwen2_vl: onnxrt: the pages say ['bucket', 'split'], this run showed ['bucket']"
    assert said in capsys.readouterr().out


def test_a_badge_that_changed_fails_and_checks_that_do_not_apply_here_do_not(run, monkeypatch, capsys):
    def badges(**found):
        return Evidence({"prompts": 25}, {name: Badge(*badge, "") for name, badge in found.items()}, {})

    monkeypatch.setattr(evidence, "committed", lambda: badges(onnxrt=("Gold", 40, 40), bfloat16=("Gold", 40, 40)))
    monkeypatch.setattr(evidence, "found_in", lambda *_: badges(onnxrt=("Gold", 38, 38)))
    assert evidence.main() == 0
    monkeypatch.setattr(evidence, "found_in", lambda *_: badges(onnxrt=("Silver", 39, 40)))
    assert evidence.main() == 1
    assert "onnxrt: the pages say Gold, this run showed Silver" in capsys.readouterr().out


def test_what_a_run_shows_can_be_written(run, monkeypatch):
    (run / "results" / "unit.xml").write_text(JUNIT.replace('"22"', '"21"'))
    monkeypatch.setattr("sys.argv", ["evidence.py", "--write"])
    assert evidence.main() == 0
    assert committed() == Evidence({"prompts": 24}, {}, {"qwen2_vl: onnxrt": ["bucket", "split"]})
