"""The kit's faces: pytest's options, reports and badges, and the project to start from."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from typer.testing import CliRunner

from docsite.evidence import found_in
from docsite.tables import check_table
from visionaccel.cli.app import app
from visionaccel.errors import ConfigurationError
from visionaccel_testing.conformance import CHECKS, BackendUnderTest, Outcome, Tolerance
from visionaccel_testing.conformance.report import badge_of, write_report
from visionaccel_testing.templates import write_backend_project


def outcomes(**changed):
    """One for each check, passed unless a keyword, its name with underscores, gives another status."""
    return [
        Outcome(c.name, c.level, status, "" if status == "passed" else "a reason")
        for c in CHECKS
        for status in [changed.get(c.name.replace("-", "_"), "passed")]
    ]


def pytest_in(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_command_line_alone_runs_the_suite_and_writes_a_report(tmp_path):
    done = pytest_in(tmp_path, "--visionaccel-backend=onnxrt", "--visionaccel-options=threads=1",
                     "--visionaccel-report=out", "-k", "L0")  # fmt: skip
    level = [check.name for check in CHECKS if check.level == 0]
    assert f"{len(level) - 1} passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "visionaccel conformance of onnxrt?threads=1: none" in done.stdout  # the other levels were not run
    report = json.loads((tmp_path / "out" / "conformance-onnxrt-threads=1.json").read_text())
    assert [(result["check"], result["status"]) for result in report["results"]] == [
        (name, "not applicable" if name == "L0-foreign-families" else "passed") for name in level
    ]
    assert report["distribution"].startswith("visionaccel-onnxrt ")
    assert "L1-rows was not run" in report["missing"]


def test_a_file_of_two_lines_runs_it_too(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "from visionaccel_testing.conformance import BackendUnderTest, conformance_suite\n"
        "TestConformance = conformance_suite(BackendUnderTest('onnxrt', capabilities={'device': 'npu'}))\n"
    )
    done = pytest_in(tmp_path, "-k", "L0-capabilities or L0-options")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "This does not hold: An open session declares its capabilities" in done.stdout
    assert "the session declares device='cpu'; expected 'npu'." in done.stdout


def test_without_the_option_nothing_is_collected(tmp_path):
    assert pytest_in(tmp_path).returncode == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize(
    ("changed", "badge"),
    [
        ({}, "Gold"),
        ({"L1_padding": "not applicable", "L6_floor": "not applicable"}, "Gold"),
        ({"L6_floor": "failed"}, "Silver"),
        ({"L4_fork": "known failure"}, "Silver"),
        ({"L3_calls": "failed"}, "Bronze"),
        ({"L2_cosines": "failed", "L6_floor": "failed"}, "Bronze"),
        ({"L0_probe": "failed"}, "none"),
    ],
)
def test_badges(changed, badge):
    assert badge_of(outcomes(**changed)) == badge


def test_a_level_that_was_not_run_is_not_held():
    assert badge_of([outcome for outcome in outcomes() if outcome.check != "L2-digits"]) == "Bronze"


def test_reports_say_why_a_badge_is_no_better(tmp_path):
    report = write_report("mine/npu:0?a=1", outcomes(L3_calls="failed", L1_padding="not applicable"), tmp_path)
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "For the next badge: L3-calls: a reason." in text
    assert "| L1-padding | not applicable: a reason |" in text
    (picture,) = tmp_path.glob("*.svg")
    assert picture.name in text
    assert "Bronze" in ElementTree.parse(picture).getroot().get("aria-label")
    (badge,) = found_in(tmp_path, tmp_path).badges.values()
    assert badge == ("Bronze", len(CHECKS) - 2, len(CHECKS) - 1, report.missing)
    assert "L3-calls: a reason" in report.missing


def test_a_report_says_what_its_author_eased(tmp_path):
    eased = BackendUnderTest("mine", tolerances={"float32": Tolerance(0.5, 0.5, 0.5, 1.0)}, speed_floor=None)
    strict = write_report("mine", outcomes(), tmp_path / "a", [BackendUnderTest("mine").stated(0)])
    report = write_report("mine", outcomes(), tmp_path / "b", [eased.stated(7)])
    texts = [next((tmp_path / name).glob("*.md")).read_text() for name in ("a", "b")]
    line = "Its author declared different tolerances in float32 and no least speed"
    assert [line in text for text in texts] == [False, True]
    assert report.digest != strict.digest
    assert report.declared[0]["tolerances"]["float32"]["lowest"] == 0.5
    assert report.declared[0]["seed"] == 7


def test_a_failure_counts_where_two_suites_have_one_label(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "from visionaccel_testing.conformance import BackendUnderTest, conformance_suite\n"
        "TestA = conformance_suite(BackendUnderTest('onnxrt', capabilities={'device': 'npu'}))\n"
        "TestB = conformance_suite(BackendUnderTest('onnxrt'))\n"
    )
    done = pytest_in(tmp_path, "-k", "L0-capabilities", "--visionaccel-report=out")
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    (path,) = (tmp_path / "out").glob("*.json")
    (result,) = json.loads(path.read_text())["results"]
    assert result["status"] == "failed"


def test_the_digest_depends_on_what_was_found_and_not_on_when(tmp_path):
    first, again = (write_report("mine", outcomes(), tmp_path / name) for name in ("a", "b"))
    other = write_report("mine", outcomes(L3_calls="failed"), tmp_path / "c")
    assert first.digest == again.digest != other.digest


def test_the_table_of_checks_names_each_once():
    rows = check_table().splitlines()[2:]
    assert len(rows) == len(CHECKS) == len({check.name for check in CHECKS})
    assert all(check.title and check.title[0].isupper() for check in CHECKS)


def test_a_project_is_written_once_and_says_what_is_next(tmp_path):
    folder = tmp_path / "new"
    done = CliRunner().invoke(app, ["init", "backend", "acme_npu", "--output", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "pip install --editable '.[test]'" in done.output
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"pyproject.toml", ".github/workflows/test.yml", "visionaccel_acme_npu/__init__.py"} <= names
    assert not any(
        "$name" in path.read_text() or "${class_name" in path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    )
    code = (folder / "visionaccel_acme_npu" / "__init__.py").read_text()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40
    with pytest.raises(ConfigurationError, match="is not an empty folder"):
        write_backend_project("acme_npu", folder)


@pytest.mark.parametrize("name", ["Acme", "acme-npu", "7up", "a__b", "", "acme npu", "../acme"])
def test_names_that_are_none_are_refused(name, tmp_path):
    with pytest.raises(ConfigurationError, match="not a valid backend name"):
        write_backend_project(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_name_of_an_installed_backend_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is already installed"):
        write_backend_project("onnxrt", tmp_path / "new")
