"""Building the plug-in as users do: with and without an SDK, from a clone and from its source distribution.

AMD's SDK cannot be had here. The simulator stands in for it, built as the library and laid out as the SDK is.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import onnx
import pytest

from simulated import small_model
from visionaccel_flexmlrt.runtime import openvino_library
from visionaccel_flexmlrt.simulator import compile_partition

ROOT = Path(__file__).parents[3]
OPENVINO = openvino_library().parents[1]
CMAKE = Path(sys.executable).with_name("cmake")
CONFIG = """
add_library(flexmlrt::flexmlrt SHARED IMPORTED)
get_filename_component(root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set_target_properties(flexmlrt::flexmlrt PROPERTIES
  IMPORTED_LOCATION "${root}/lib/libflexmlrt.so" INTERFACE_INCLUDE_DIRECTORIES "${root}/include")
"""

AMD = "import os; amd = runtime.AmdEnvironment.read(os.environ)"
MODEL = """
import numpy
model = runtime.load('npu', amd).Model(
    path={path!r}, single_file=True, inputs=[('x', 'float32', [1, 16])], outputs=[('y', 'float32', [1, 2])],
    device_name='', subgraph='', cache_dir='.', execute_mode=2, preemption=True)
print(model.run([numpy.ones((1, 16), 'float32')])[0].tolist())
"""
REFUSED = """
from visionaccel.errors import ConfigurationError
try:
    runtime.load('npu', amd)
except ConfigurationError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def sdk(tmp_path_factory):
    """What stands in for an installed SDK of version 9.9.9."""
    root = tmp_path_factory.mktemp("sdk")
    for folder in ("include", "lib", "share/cmake/FlexmlRT"):
        (root / folder).mkdir(parents=True)
    sources = ROOT / "cpp" / "simulator"
    shutil.copy(sources / "include" / "FlexMLClient.h", root / "include")
    (root / "__init__.py").write_text('"""The SDK."""\nVERSION = "9.9.9"\n')
    (root / "share/cmake/FlexmlRT/FlexmlRTConfig.cmake").write_text(CONFIG)
    (root / "lib" / "libopenvino_c.so").symlink_to(openvino_library())
    options = ["-std=c++17", "-shared", "-fPIC", "-Wl,-soname,libflexmlrt.so", f"-I{sources}/include"]
    command = ["c++", *options, f"-I{OPENVINO}/include", *map(str, sources.glob("*.cpp")), "-ldl"]
    subprocess.run([*command, "-o", root / "lib" / "libflexmlrt.so"], check=True)
    return root


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files of the plug-in and the C++ sources, as a clone has them."""
    root = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "cpp", "plugins/flexmlrt"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name, follow_symlinks=False)
    return root


def environment(**given):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLEXMLRT_", "RYZEN_AI_"))}
    return {**kept, **{name: str(value) for name, value in given.items()}}


@pytest.fixture(scope="module")
def sdist(clone, tmp_path_factory):
    """The source distribution that the clone builds."""
    output = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(output)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone / "plugins" / "flexmlrt", check=True, capture_output=True)
    (built,) = output.glob("*.tar.gz")
    return built


def wheel(source, output, **given):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", output]
    # Without optimisation and debugging information, and each module as one source: it compiles in half the time.
    faster = {"SKBUILD_CMAKE_BUILD_TYPE": "Plain", "SKBUILD_CMAKE_DEFINE": "CMAKE_UNITY_BUILD=ON"}
    variables = environment(**faster, **given)
    done = subprocess.run([*command, source], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = Path(output).glob("*.whl")
    return found


@pytest.mark.parametrize("way", ["package", "folders"])
def test_the_sdk_is_found_in_each_documented_way(sdk, tmp_path, way):
    root = tmp_path / "sdk"
    shutil.copytree(sdk, root)
    if way != "package":
        shutil.rmtree(root / "share")
    given = {
        "package": {"CMAKE_PREFIX_PATH": root},
        "folders": {"FLEXMLRT_INCLUDE_DIR": root / "include", "FLEXMLRT_LIB_DIR": root / "lib"},
    }[way]
    pybind11 = Path(sysconfig.get_path("purelib"), "pybind11", "share", "cmake", "pybind11")
    command = [CMAKE, "-S", ROOT / "cpp", "-B", tmp_path / "build", f"-Dpybind11_DIR={pybind11}"]
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    # First without: a build folder must not remember that.
    for variables, modules in (({}, "simulator"), (given, "simulator;SDK 9.9.9")):
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"FlexMLRT bridge for {modules}\n" in done.stdout


def test_an_sdk_that_is_named_and_not_there_is_an_error(tmp_path):
    command = [CMAKE, "-S", ROOT / "cpp", "-B", tmp_path / "build", "-DVISIONACCEL_PYTHON=OFF"]
    done = subprocess.run(command, env=environment(FLEXMLRT_ROOT=tmp_path), capture_output=True, text=True)
    assert done.returncode != 0
    assert "holds no FlexMLClient.h" in " ".join(done.stderr.split())


def test_a_header_with_more_dtypes_and_other_getters_compiles(sdk, tmp_path):
    """Of the bridge alone, as with a later SDK: more enumerators, and a getter that is not const."""
    header = (sdk / "include" / "FlexMLClient.h").read_text()
    changed = header.replace("UInt32 }", "UInt32, Int64, Int4 }").replace(
        "& getMetadata() const {", "& getMetadata() {"
    )
    assert changed != header
    (tmp_path / "FlexMLClient.h").write_text(changed)
    features = [f"-DFLEXMLRT_HAS_{name}" for name in ("GOOD", "GET_IO_TENSORS", "SUBGRAPH_NAME", "EXT_OPTIONS")]
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", f"-I{tmp_path}", *features]
    subprocess.run([*command, ROOT / "cpp" / "bridge" / "bridge.cpp"], check=True)


def test_the_source_distribution_contains_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"cpp/CMakeLists.txt", "cpp/bridge/bridge.cpp", "visionaccel_flexmlrt/backend.py", "README.md"} <= names


def test_a_wheel_of_it_with_the_sdk_imports_without_it_and_says_what_is_missing(sdk, sdist, tmp_path):
    built = wheel(sdist, tmp_path, FLEXMLRT_ROOT=sdk)
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "unpacked")
    package = tmp_path / "unpacked" / "visionaccel_flexmlrt"
    assert {path.name.partition(".")[0] for path in package.glob("*.so")} == {"_sdk", "_simulator"}

    said = run(tmp_path / "unpacked", "lacking = runtime.missing('npu', amd); print(lacking.reason, lacking.hint)")
    assert "libflexmlrt.so was not found" in said
    assert "set RYZEN_AI_INSTALLATION_PATH" in said

    linked = {"LD_LIBRARY_PATH": f"{sdk / 'lib'}:{OPENVINO / 'libs'}"}
    said = run(tmp_path / "unpacked", "m = runtime.load('npu', amd); print(m.sdk_version, m.features)", **linked)
    assert said == "9.9.9 good, getIOTensors, subgraphName, extOptions\n"

    ran = run(tmp_path / "unpacked", MODEL.format(path=str(small_artifact(tmp_path))), **linked)
    assert ran == "[[16.0, 16.0]]\n"

    other = tmp_path / "other"
    shutil.copytree(sdk, other, symlinks=True)
    (other / "__init__.py").write_text('VERSION = "1.0.0"\n')
    said = run(tmp_path / "unpacked", REFUSED, FLEXMLRT_ROOT=other, LD_LIBRARY_PATH=OPENVINO / "libs")
    assert "was built with FlexMLRT 9.9.9" in said
    assert "belongs to 1.0.0" in said


def small_artifact(folder):
    model = small_model(rows=1, outputs=2)
    onnx.save(model, folder / "small.onnx")
    compile_partition(folder / "small.onnx", folder / "small.rai")
    return folder / "small.rai"


def run(unpacked, code, **given):
    """What some code prints where the plug-in comes from an unpacked wheel and not from this environment."""
    paths = [str(unpacked), str(ROOT / "src"), sysconfig.get_path("purelib")]
    lines = f"import sys\nsys.path[:0] = {paths}\nfrom visionaccel_flexmlrt import runtime\n{AMD}\n{code}"
    done = subprocess.run([sys.executable, "-S", "-c", lines], env=environment(**given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
