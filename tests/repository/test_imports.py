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

from syntax import at_run_time

ROOT = Path(__file__).resolve().parents[2]
PROVIDED = packages_distributions()
HOSTS = {"vllm", "dynamo"}
"""What loads the core as its plug-in; it is never installed for the core."""

FOLDERS = {
    "core": (ROOT, ROOT / "src"),
    **{folder.parent.name: (folder.parent, folder.parent) for folder in sorted(ROOT.glob("plugins/*/pyproject.toml"))},
}


EAGER = {
    "core": {
        r"visionaccel/cli/": {"rich", "typer"},
        r"visionaccel/(backends/onnx_|towers/onnx/)": {"onnx"},
        r"visionaccel/(core/packed_products\.py|integrations/vllm/)": {"torch"},  # vLLM and torch_ref bring it
        r"visionaccel/integrations/transformers/": {"torch", "transformers"},
    },
    "flexmlrt": {
        r"visionaccel_flexmlrt/(import_)?commands?\.py": {"rich", "typer"},
        r"visionaccel_flexmlrt/vitisai/": {"onnx"},
    },
}
"""What belongs to an extra and is imported with a file, not in its functions: only files that need the extra may."""


def required(folder):
    """Names of the distributions that a distribution always requires, and its own."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return {canonicalize_name(Requirement(text).name) for text in (project["name"], *project["dependencies"])}


def declared(folder):
    """Names of the distributions that a distribution requires, always or by an extra."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    stated = [text for extra in project.get("optional-dependencies", {}).values() for text in extra]
    names = required(folder) | {canonicalize_name(Requirement(text).name) for text in stated}
    build = folder / "hatch_build.py"  # where the core's extras are
    if build.exists():
        found = re.findall(r'"([\w.-]+)>=|"(visionaccel-[\w-]+)"', build.read_text())
        names |= {canonicalize_name(name) for pair in found for name in pair if name}
    return names


def sources(folder):
    """The syntax of each file of a distribution, by its path."""
    for path in sorted(folder.rglob("*.py")):
        if not {"build", "templates"} & set(path.relative_to(folder).parts):
            yield path.relative_to(folder).as_posix(), ast.parse(path.read_text())


def eager(nodes):
    """What runs when a file is imported: nothing in functions, or for type checkers alone."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from eager(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from eager(ast.iter_child_nodes(node))


def imported(folder, nodes_of=ast.walk):
    """Modules that the code imports, their distributions, and where."""
    for path, tree in sources(folder):
        for node in nodes_of(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for module in (name.partition(".")[0] for name in names):
                if module not in sys.stdlib_module_names and module not in HOSTS:
                    providers = PROVIDED.get(module, [module, f"visionaccel-{module}"])
                    yield module, {canonicalize_name(name) for name in providers}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("distribution", FOLDERS)
def test_what_is_imported_is_declared(distribution):
    folder, code = FOLDERS[distribution]
    allowed = declared(folder)
    undeclared = [(module, place) for module, providers, place in imported(code) if providers.isdisjoint(allowed)]
    assert undeclared == []


@pytest.mark.parametrize("distribution", FOLDERS)
def test_what_belongs_to_an_extra_is_imported_where_the_extra_is_needed(distribution):
    folder, code = FOLDERS[distribution]
    places = EAGER.get(distribution, {})
    always, misplaced, used = required(folder), [], set()
    for module, providers, place in imported(code, lambda tree: eager(tree.body)):
        if providers.isdisjoint(always):
            matching = [
                pattern for pattern, modules in places.items() if module in modules and re.match(pattern, place)
            ]
            misplaced += [] if matching else [(module, place)]
            used |= set(matching)
    assert misplaced == []
    assert used == set(places), "each row of the table has its use"


def test_vllm_is_imported_in_one_package():
    """Elsewhere its names stand for types only, so that another release of vLLM is a change of that package alone."""
    home = ROOT / "src" / "visionaccel" / "integrations" / "vllm" / "compat"
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [ast.literal_eval(argument) for argument in imported_by_name(node)]
            if any(name.split(".")[0] == "vllm" for name in names) and home not in path.parents:
                found.append(path.relative_to(home.parents[2]).as_posix())
    assert set(found) == {
        "cli/diagnosis/children.py",  # doctor looks whether vLLM can be imported
        "integrations/vllm/__init__.py",  # after an error, vLLM is to load its plug-ins again
    }


def imported_by_name(node):
    """The literal that `import_module` is called with."""
    called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    return [each for each in node.args if isinstance(each, ast.Constant)] if called else []
