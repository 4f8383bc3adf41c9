"""What the documentation says is what the package does."""

import json
import re
from pathlib import Path

from typer.main import get_command

from visionaccel.bundle.manifest import SCHEMA_VERSION, json_schema
from visionaccel.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").glob("*/README.md"))]


def test_the_published_schema_is_the_manifests():
    published = ROOT / "docs" / f"bundle-manifest-v{SCHEMA_VERSION}.schema.json"
    assert json.loads(published.read_text()) == json_schema()


def commands_of(group, before=""):
    """The commands of a group by name; those of a group in it have its name before theirs, as in `bench serve`."""
    found = {}
    for name, command in group.commands.items():
        found |= commands_of(command, f"{before}{name} ") if hasattr(command, "commands") else {before + name: command}
    return found


def test_every_command_and_option_in_a_page_exists():
    commands = commands_of(get_command(app))
    groups = {name.partition(" ")[0] for name in commands if " " in name}
    mentioned = set()
    for page in PAGES:
        for line in page.read_text().splitlines():
            for name, rest in re.findall(r"\bvisionaccel ([a-z]+(?:-[a-z]+)*)\b((?: [^`|]*)?)", line):
                if name in groups:
                    own, _, rest = rest.strip().partition(" ")
                    name = f"{name} {own}"
                if name in commands:
                    mentioned.add(name)
                    known = {option for parameter in commands[name].params for option in parameter.opts}
                    rest = re.sub(r"'[^']*'", "", rest)  # what is quoted may be options of another program
                    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= known, f"{page}: {line}"
                else:
                    assert not line.startswith("$"), f"{page}: {line}"
    assert mentioned == set(commands), "every command is in some page"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
