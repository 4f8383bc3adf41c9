"""What the documentation says is what the package does."""

import importlib.util
import re

import pytest
from typer.main import get_command

from doc_pages import PAGES, ROOT, blocks, commands, rows
from docsite.catalogue import GAP, classes, explained, raised_errors, templates
from docsite.commands import command_reference, commands_of
from docsite.tables import backend_options, backend_table
from visionaccel.backends import default_registry
from visionaccel.cli.app import app
from visionaccel.settings import PREFIX, Settings, make_settings
from visionaccel_flexmlrt.commands import app as flexmlrt_app

COMMANDS = dict(commands_of(get_command(app)))
CONSOLE = [block for page in PAGES for block in blocks(page) if block.language == "console"]
WRITTEN = [command for block in CONSOLE for command in commands(block)]

OF_TESTS = {"VISIONACCEL_RYZEN_AI"}
"""Variables that the tests read, and visionaccel does not."""


def test_what_is_made_from_data_is_as_the_data_has_it():
    from write_tables import written  # of what vLLM's integration states, which not every run has

    for file, text in written().items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `python tools/write_tables.py`"


def test_every_command_and_option_in_a_page_exists():
    groups = {name.partition(" ")[0] for name in COMMANDS if " " in name}
    mentioned = set()
    for page in PAGES:
        for line in page.read_text().splitlines():
            for name, rest in re.findall(r"\bvisionaccel ([a-z]+(?:-[a-z]+)*)\b((?: [^`|]*)?)", line):
                if name in groups:
                    own, _, rest = rest.strip().partition(" ")
                    name = f"{name} {own}"
                if name in COMMANDS:
                    mentioned.add(name)
                    known = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
                    rest = re.sub(r"'[^']*'", "", rest)  # what is quoted may be options of another program
                    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= known, f"{page}: {line}"
    assert mentioned == set(COMMANDS), "every command is in some page"


@pytest.mark.parametrize(
    "words",
    [command.words for command in WRITTEN if command.words and command.words[0].startswith("visionaccel")],
    ids=" ".join,
)
def test_the_command_line_takes_what_a_page_types(words):
    program, *arguments = words
    known = COMMANDS if program == "visionaccel" else dict(commands_of(get_command(flexmlrt_app)))
    name = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in known)
    known[name].make_context(name, arguments[len(name.split()) :])  # raises what is wrong, and runs nothing


def test_settings_in_pages_exist_and_take_these_values():
    given = [command.environment for command in WRITTEN]
    plain = [block.code for page in PAGES for block in blocks(page) if block.language == "sh"]
    given += [dict(re.findall(r"^(\w+)='?(.*?)'?$", code, re.MULTILINE)) for code in plain]
    checked = 0
    for environment in given:
        names = [name for name in environment if name.startswith(PREFIX) and name not in OF_TESTS]
        settings = make_settings(**{name.removeprefix(PREFIX).lower(): environment[name] for name in names})
        checked += len(names)
        if settings.options:
            default_registry().load(settings.backend).options.model_validate(settings.options)
    assert checked > 30
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OF_TESTS
    for page in PAGES:
        assert set(re.findall(r"\bVISIONACCEL_[A-Z_]*[A-Z]", page.read_text())) <= known, page


def test_targets_benchmarks_and_extras_in_pages_exist():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    hatch = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(hatch)
    hatch.loader.exec_module(module)
    benchmarks = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"(?:`|\$ )make ([a-z\d-]+)", text)) <= targets, page
        assert set(re.findall(r"python -m benchmarks ([a-z_]+)", text)) <= benchmarks, page
        extras = {one for each in re.findall(r"(?:visionaccel|'\.)\[([a-z_,]+)\]", text) for one in each.split(",")}
        of_a_template = {"test"}  # of the project that `visionaccel init backend` writes
        assert extras <= {*module.PLUGINS, "cli", "images", "onnx", "transformers", *of_a_template}, page


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_class_of_errors_says_when_and_what_to_do():
    for kind in classes():
        assert all(explained(kind)), kind


def test_the_catalogue_has_the_messages_of_the_sources():
    found = {(each.error, each.message): each.hint for each in raised_errors()}
    assert found["GridError", "no grid was given."] == "Pass one (t, h, w) for each image or video."
    gone = f"patches of image {GAP} (grid {GAP}) contain NaN or infinity, first in row {GAP}."
    assert found["NonFiniteError", gone] == "Check the image and its normalisation."


TROUBLES = ROOT / "docs" / "troubleshooting.md"
MESSAGES = [
    message
    for symptom, *_ in rows(TROUBLES)
    for message in re.findall(r"`([^`]+)`", symptom)
    if GAP in message or message.endswith(".")
]


def says(template: str, message: str) -> bool:
    """Whether a text of the sources has a message's words, in their order; a gap in either stands for anything."""
    text = re.sub(r"%[a-z.\d]*[a-z]", GAP, template)
    at = 0
    for piece in filter(None, (piece.strip() for piece in message.split(GAP))):
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def test_there_are_enough_troubles():
    assert len(list(rows(TROUBLES))) >= 20
    assert len(MESSAGES) >= 20


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_the_troubleshooting_page_are_in_the_sources(message):
    assert any(says(template, message) for template in templates())


def test_tables_show_every_backend_option_and_command():
    table, options, reference = backend_table(), backend_options(), command_reference()
    for entry in default_registry().entries:
        assert f"| `{entry.name}` | `{entry.distribution}` |" in table
        assert f"## {entry.name}\n" in options
    assert (
        "| `optimization` | `'all' or 'extended' or 'basic' or 'none'` | `'all'` | Graph optimisation level. |"
        in options
    )
    assert "| `threads` | `int` | unset | Threads within an operator. Unset: one for each available core. |" in options
    assert "## bench serve\n" in reference
    assert all(f"## {name}\n" in reference for name in COMMANDS)
    assert "| `--grid <list[str]>` | A program of fixed shapes for this grid" in reference


def test_the_plug_ins_pages_name_their_options():
    for entry in default_registry().entries:
        page = (
            ROOT / "docs" / "simulated.md" if entry.name == "simulated" else ROOT / "plugins" / entry.name / "README.md"
        )
        for option in default_registry().load(entry.name).options.model_fields:
            assert f"`{option}`" in page.read_text(), f"{page}: {option}"


def test_pictures_are_those_that_their_script_draws():
    folder = ROOT / "docs" / "pictures"
    spec = importlib.util.spec_from_file_location("draw", folder / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert {path.name for path in folder.glob("*.svg")} == set(draw.PICTURES)
    for name, picture in draw.PICTURES.items():
        assert (folder / name).read_text() == picture(), f"run {folder / 'draw.py'}"
