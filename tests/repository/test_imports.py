"""Each distribution declares what it imports: no module relies on what another distribution happens to install."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROVIDED = packages_distributions()
HOSTS = {"vllm"}
"""What loads the core as its plug-in; it is never installed for the core."""

FOLDERS = {
    "core": (ROOT, ROOT / "src"),
    **{folder.parent.name: (folder.parent, folder.parent) for folder in sorted(ROOT.glob("plugins/*/pyproject.toml"))},
}


def declared(folder):
    """Names of the distributions that a distribution requires, always or by an extra."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    stated = [*project.get("dependencies", ()), *(text for extra in extras for text in extra)]
    names = {canonicalize_name(Requirement(text).name) for text in stated}
    build = folder / "hatch_build.py"  # where the core's extras are
    if build.exists():
        found = re.findall(r'"([\w.-]+)>=|"(visionaccel-[\w-]+)"', build.read_text())
        names |= {canonicalize_name(name) for pair in found for name in pair if name}
    return names | {canonicalize_name(project["name"])}


def imported(folder):
    """Modules that the code imports, at any depth, and where."""
    for path in sorted(folder.rglob("*.py")):
        if {"build", "templates"} & set(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for name in names:
                yield name.partition(".")[0], f"{path.relative_to(folder)}:{node.lineno}"


@pytest.mark.parametrize("distribution", FOLDERS)
def test_what_is_imported_is_declared(distribution):
    folder, code = FOLDERS[distribution]
    allowed = declared(folder)
    undeclared = {}
    for module, place in imported(code):
        if module in sys.stdlib_module_names or module in HOSTS:
            continue
        providers = {canonicalize_name(name) for name in PROVIDED.get(module, [module, f"visionaccel-{module}"])}
        if providers.isdisjoint(allowed):
            undeclared.setdefault(module, place)
    assert undeclared == {}
