"""What `make lint` and `make audit` decide by."""

import json
from importlib.metadata import Distribution

import pytest

import check_words
from audit import verdict
from check_pins import differences, pins, unmet


def test_what_no_file_pins_and_what_is_of_another_version_differs():
    pinned = pins("# a comment\nNumPy==2.0  # why\nruamel.yaml==1.0\n")
    assert differences({"numpy": "2.0", "ruamel-yaml": "1.0", "pip": "1"}, pinned) == []
    found = differences({"numpy": "2.1", "new": "3"}, pinned)
    assert [line.split(",")[0] for line in found] == ["new 3 is installed", "numpy 2.1 is installed"]


@pytest.fixture
def distribution(tmp_path):
    """Returns a function that makes the metadata of an installed distribution."""

    def make(name, version, *requires):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in requires), "", ""]
        (folder / "METADATA").write_text("\n".join(lines))
        return Distribution.at(folder)

    return make


def test_a_requirement_that_no_distribution_meets_is_reported(distribution):
    server = distribution("server", "1.0", "loop>=2; extra == 'fast'", "absent; python_version < '3'", "Wire.Format<3")
    found = [server, distribution("wire_format", "2.5rc1", "triton")]
    assert unmet(found, ["server"]) == []
    assert unmet(found, ["server[fast]"]) == ['server needs loop>=2; extra == "fast", but none is installed.']
    assert unmet(found, ["server>1", "other"]) == [
        "requirements.txt needs other, but none is installed.",
        "requirements.txt needs server>1, but 1.0 is installed.",
    ]


def audit_of(*dependencies):
    return json.dumps({"dependencies": list(dependencies)})


GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}


def test_a_vulnerability_fails_the_audit_and_is_named():
    failed, text = verdict(audit_of(GOOD, BAD), "")
    assert failed
    assert "bad 2: CVE-1, fixed in 3" in text


def test_an_audit_without_vulnerabilities_passes_and_says_what_was_not_looked_at():
    failed, text = verdict(audit_of(GOOD, UNKNOWN), "")
    assert not failed
    assert "1 distributions audited, 0 vulnerabilities. The service does not know unknown." in text


def test_an_audit_without_a_service_is_skipped_and_says_so():
    for output, errors in (("", "Traceback\nConnectionError: no route"), (audit_of(UNKNOWN), "")):
        failed, text = verdict(output, errors)
        assert not failed
        assert text.startswith("AUDIT SKIPPED")
    assert "no route" in verdict("", "Traceback\nConnectionError: no route")[1]


def test_an_audit_that_cannot_run_fails():
    for errors in (
        "usage: pip-audit [-h]\npip-audit: error: no such option",
        "Traceback (most recent call last):\nTypeError: x",
    ):
        failed, text = verdict("", errors)
        assert failed
        assert text.startswith("AUDIT FAILED TO RUN")


WORDS = """# a comment
told: knows
of its own: separate
is no: is not a; except there is no, is no longer
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is Told so.", [(1, "'Told': write 'knows'")]),
        ("fine\n# a process of\n# its own", [(2, "'of # its own': write 'separate'")]),
        ("It is no file, and there is no hint.", [(1, "'is no': write 'is not a'")]),
        ("There is\nno hint, and it is no longer needed.", []),
        ("retold, self._told, is normal", []),
        ("the option `told`  # words: allowed", []),
    ],
)
def test_an_avoided_word_is_found_whole_and_with_its_line(text, found):
    assert list(check_words.avoided(text, WORDS)) == found


def test_a_page_with_an_avoided_word_fails_the_check(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("All is well.\n")
    monkeypatch.setattr(check_words, "ROOT", tmp_path)
    assert check_words.main() == 0
    page.write_text("All is well.\nNobody knows.\n")
    assert check_words.main() == 1
    assert capsys.readouterr().out == "docs/page.md:2: 'Nobody': write 'name the role'\n"
