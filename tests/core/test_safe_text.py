"""Text from files, plug-ins and devices is shown and not obeyed: in errors, logs, the command's output and reports."""

import io
import json
import logging
import os
import subprocess

import pytest
from rich.table import Table
from typer.testing import CliRunner

from command_line import COMMAND
from fake_plugins import ECHO, install
from visionaccel.cli.app import app
from visionaccel.cli.output import messages, progress, results, status
from visionaccel.core.safe_text import lines, one_line, safe_logger, visible
from visionaccel.errors import BundleError, VisionAccelError
from visionaccel_bench.blocks import Table as PageTable
from visionaccel_bench.blocks import Text
from visionaccel_bench.reporting.page import Report, Section

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07 [red]red[/red] [/x] :smile: <script>alert('1')</script> \u202edesrever \x9b31m\r\x00\u2028"
)
OBEYED = "\x1b\x07\x9b\r\x00\u202e\u2028"


def is_safe(text):
    return not set(text) & set(OBEYED)


def test_what_cannot_be_printed_is_replaced():
    assert visible("a\x1b[31mb\u202ec\td\ne") == "a?[31mb?c d\ne"
    assert one_line("a\n\x1bb\u202e") == "a ?b?"
    assert len(one_line("x" * 10_000)) == 2000
    assert is_safe(visible(HOSTILE))


def test_a_further_line_cannot_pass_for_a_message():
    assert lines("one\nERROR all is lost\n  two") == "one\n  ERROR all is lost\n  two"
    assert lines(lines(HOSTILE + "\nx")) == lines(HOSTILE + "\nx")


def test_an_error_shows_and_carries_safe_text():
    error = BundleError(f"program {HOSTILE}\nINFO fine", hint=f"Fetch {HOSTILE} again.")
    for text in (str(error), error.message, error.hint, repr(error)):
        assert is_safe(text)
    assert "\n  INFO fine" in str(error)
    assert "[red]red[/red]" in str(error)


def test_log_records_are_safe(caplog):
    logger = safe_logger("visionaccel.test_safe_text")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("device %s\nWARNING forged", HOSTILE)
        logger.info("%d images", 3)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("it failed")
    assert is_safe(caplog.text)
    assert "\n  WARNING forged" in caplog.text
    assert caplog.records[1].args == (3,)


def test_every_logger_of_the_package_is_safe(pytestconfig):
    package = pytestconfig.rootpath / "src" / "visionaccel"
    plain = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if "= logging.getLogger(__name__)" in file.read_text()
    }
    assert not plain


@pytest.fixture
def terminal(monkeypatch):
    """What the command's two consoles print, as on a terminal without colours."""
    shown = io.StringIO()
    for console in (results, messages):
        monkeypatch.setattr(console, "_file", shown)
    return shown


def test_the_commands_output_is_safe(terminal):
    grid = Table("a", HOSTILE, title=HOSTILE)
    grid.add_row(HOSTILE, "b")
    results.print(grid)
    results.print(HOSTILE, soft_wrap=True)
    messages.print(HOSTILE, soft_wrap=True)
    with status(HOSTILE) as tell:
        tell(HOSTILE)
    from rich.progress import TextColumn

    with progress(TextColumn("", markup=False)) as advance:
        advance(HOSTILE, 1, 2)
    assert is_safe(terminal.getvalue().replace("\r", ""))
    assert "[red]red[/red] [/x] :smile:" in terminal.getvalue()


def test_a_page_holds_no_markup_but_its_own():
    def page(text):
        blocks = (Text(text), PageTable((text,), ((text,),), text))
        return Report(text, text, text, (Section("key", text, "pass", text, blocks),)).page()

    made = page(HOSTILE)
    assert is_safe(made)
    assert "<script" not in made
    assert made.count("'") == page("").count("'"), "those of the page itself"


NOISY = """
import atexit, ctypes, os, sys
print('printed on import')
os.write(1, b'written on import\\n')
ctypes.CDLL(None).puts(b'from C on import, buffered')
atexit.register(os.write, 1, b'written at the end\\n')
""" + ECHO.format(name="noisy", score=1).replace(
    "def open", "def devices(self):\n        print('asked'); return ('\\x1b[31mred\\u202e', '[bold]')\n    def open"
)


def run(site, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_what_a_plug_in_prints_does_not_reach_stdout(tmp_path):
    site = install(tmp_path / "site", "acme-noisy", "noisy", NOISY)
    done = run(site, "backends", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["noisy"]["devices"] == ["\x1b[31mred\u202e", "[bold]"]
    assert is_safe(done.stdout)
    for said in ("printed on import", "written on import", "from C on import", "asked", "written at the end"):
        assert said in done.stderr


def test_an_error_is_one_json_document_whatever_prints(tmp_path, tiny):
    site = install(tmp_path / "site", "acme-noisy", "noisy", NOISY)
    done = run(site, "explain", tmp_path / "no\x1b[31mwhere", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]
    assert is_safe(done.stderr)


@pytest.mark.parametrize("arguments", [("inspect",), ("export", "x"), ("explain",), ("strip", "x")], ids=" ".join)
def test_hostile_names_of_files_reach_errors_safely(tmp_path, arguments):
    command, *rest = arguments
    result = CliRunner().invoke(app, [command, str(tmp_path / "a\x1b[31m\u202e[red]"), *rest])
    assert isinstance(result.exception, VisionAccelError)
    assert is_safe(str(result.exception))
