"""Backends are found without importing them, and chosen with reasons."""

import ast
import runpy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fake_plugins import ECHO, install
from visionaccel import open_encoder
from visionaccel.backends import Accepted, Registry, Rejected, default_registry, select
from visionaccel.encoder import open_tower
from visionaccel.errors import (
    BackendUnavailableError,
    DeviceError,
    DuplicateBackendError,
    PluginError,
    SettingsError,
    UnknownBackendError,
)

PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the Python path into which distributions can be put."""
    default_registry()  # the process's own is made before, so that it never knows them
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_listing_imports_no_plug_in(site):
    install(site, "acme-explosive", "explosive", "raise SystemExit('imported')")
    names = [entry.name for entry in Registry().entries]
    assert names == sorted(names)
    assert {"explosive", "onnxrt", "torch_ref"} <= set(names)


def test_entries_name_their_distribution(site):
    install(site, "acme-echo", "echo", ECHO.format(name="echo", score=1))
    entry = Registry().entry("echo")
    assert (entry.distribution, entry.version, entry.module) == ("acme-echo", "1.0", "acme_echo")


def test_two_distributions_of_one_name_are_both_named(site):
    install(site, "acme-one", "same", ECHO.format(name="same", score=1))
    install(site, "acme-two", "same", ECHO.format(name="same", score=1))
    with pytest.raises(DuplicateBackendError, match=r"acme-one 1\.0.*acme-two 1\.0|acme-two 1\.0.*acme-one 1\.0"):
        Registry()


@pytest.mark.parametrize(
    ("name", "advice"), [("onnxtr", "Did you mean 'onnxrt'"), ("zzz", "Install the distribution that provides it")]
)
def test_an_unknown_name_lists_what_is_installed(name, advice):
    with pytest.raises(UnknownBackendError, match=f"installed: .*onnxrt.*{advice}"):
        Registry().entry(name)


def test_a_known_plug_in_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr("visionaccel.backends.registry.entry_points", lambda group: [])
    with pytest.raises(UnknownBackendError, match=r"installed: none.*pip install 'visionaccel\[onnxrt\]'"):
        Registry().entry("onnxrt")
    with pytest.raises(UnknownBackendError, match=r"Did you mean 'torch_ref'.*pip install"):
        Registry().entry("torchref")


@pytest.mark.parametrize(
    "source",
    [
        "import vendor_runtime_that_is_missing",
        "1 / 0",
        "",
        ECHO.format(name="other", score=1),
        "from visionaccel.backends import hookimpl\n@hookimpl\ndef visionaccel_backends(wrong): return []",
        ECHO.format(name="broken", score=1).replace("def open", "def opne"),
        ECHO.format(name="broken", score=1).replace("(VisionBackend)", ""),
        ECHO.format(name="broken", score=1).replace("return [Echo]", "return Echo"),
        ECHO.format(name="broken", score=1).replace("return [Echo]", "return 1 / 0"),
        "import sys; sys.exit(3)",
        "class Odd(BaseException): pass\nraise Odd('neither error nor exit')",
        "raise KeyboardInterrupt",
        ECHO.format(name="broken", score=1).replace("return [Echo]", "raise SystemExit"),
    ],
    ids=[
        "import error",
        "any error",
        "no hook",
        "another name",
        "wrong hook signature",
        "missing method",
        "no backend class",
        "no list",
        "hook raises",
        "exits",
        "raises no Exception",
        "interrupts",
        "hook exits",
    ],
)
def test_a_broken_plug_in_is_named_when_it_is_wanted_and_only_then(site, tiny, source):
    install(site, f"acme-broken-{abs(hash(source))}", "broken", source)
    registry = Registry()
    with pytest.raises(PluginError, match="acme-broken"):
        registry.load("broken")
    selection = select(registry, open_tower(tiny))
    verdicts = {candidate.entry.name: candidate.verdict for candidate in selection.candidates}
    assert isinstance(verdicts["broken"], Rejected)
    assert selection.chosen is not None
    assert selection.chosen.entry.name == "onnxrt"


HANGS = "import threading\nthreading.Event().wait(60)"


def test_a_plug_in_that_hangs_is_named_in_time_and_leaves_the_others_alone(site, tiny, monkeypatch):
    monkeypatch.setattr("visionaccel.backends.registry.IMPORT_SECONDS", 1.0)
    install(site, "acme-hanging", "broken", HANGS)
    registry = Registry()
    started = time.monotonic()
    with pytest.raises(PluginError, match=r"acme-hanging 1\.0 cannot be loaded: importing .* took more than 1 s"):
        registry.load("broken")
    selection = select(registry, open_tower(tiny))  # does not wait for it once more
    assert time.monotonic() - started < 5
    assert selection.chosen is not None
    assert selection.chosen.entry.name == "onnxrt"


def test_threads_that_load_a_backend_at_once_get_one_object(site):
    slow = "import time; time.sleep(0.3)\n" + ECHO.format(name="slow", score=1)
    install(site, "acme-slow", "slow", slow)
    registry = Registry()
    with ThreadPoolExecutor(8) as threads:
        assert len({id(backend) for backend in threads.map(registry.load, ["slow"] * 8)}) == 1


@pytest.mark.parametrize("place", ["formats_on(self, device)", "probe(self, program, device)"])
def test_a_backend_that_exits_when_it_is_asked_is_refused_and_the_others_are_used(site, tiny, place):
    source = ECHO.format(name="broken", score=99).replace("def open", f"def {place}: raise SystemExit(0)\n    def open")
    install(site, f"acme-exits-{abs(hash(place))}", "broken", source)
    selection = select(Registry(), open_tower(tiny))
    (asked,) = [candidate for candidate in selection.candidates if candidate.entry.name == "broken"]
    assert isinstance(asked.verdict, Rejected)
    assert "SystemExit: 0" in asked.verdict.reason
    assert selection.chosen is not None
    assert selection.chosen.entry.name == "onnxrt"


def test_every_extra_is_known():
    from visionaccel.backends.registry import EXTRAS

    build = runpy.run_path(str(Path(__file__).parents[2] / "hatch_build.py"))
    assert set(EXTRAS.values()) == set(build["PLUGINS"]) - {"bench"}


def test_auto_takes_the_highest_score(site, tiny):
    install(site, "acme-best", "best", ECHO.format(name="best", score=99))
    selection = select(Registry(), open_tower(tiny))
    assert selection.chosen is not None
    assert selection.chosen.entry.name == "best"
    accepted = {c.entry.name for c in selection.candidates if isinstance(c.verdict, Accepted)}
    assert accepted == {"best", "onnxrt", "openvino", "torch_ref"}


def test_a_probe_that_raises_is_a_refusal(site, tiny):
    source = ECHO.format(name="nervous", score=1).replace(
        'return Accepted(1, "says yes")', "raise OSError('no driver')"
    )
    install(site, "acme-nervous", "nervous", source)
    selection = select(Registry(), open_tower(tiny), "nervous")
    with pytest.raises(BackendUnavailableError, match=r"OSError: no driver\..*authors of acme-nervous"):
        selection.require()


def test_a_backend_of_foreign_formats_is_refused_as_data(site, tiny):
    source = ECHO.format(name="foreign", score=1).replace('"onnx", "checkpoint"', '"acme.blob"')
    install(site, "acme-foreign", "foreign", source)
    (candidate,) = select(Registry(), open_tower(tiny), "foreign").candidates
    assert isinstance(candidate.verdict, Rejected)
    assert "acme.blob" in candidate.verdict.reason


def test_no_backend_at_all_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setattr("visionaccel.backends.registry.entry_points", lambda group: [])
    with pytest.raises(BackendUnavailableError, match="pip install"):
        select(Registry(), open_tower(tiny)).require()


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("onnxrt", "npu", "VitisAIExecutionProvider"),
        ("onnxrt", "toaster", "unknown device 'toaster'"),
        ("onnxrt", "cpu:1", "unknown device 'cpu:1'"),
        ("onnxrt", "cuda:x", "unknown device 'cuda:x'"),
        ("onnxrt", "cuda:1", "CUDAExecutionProvider"),
        ("torch_ref", "cuda:9", "sees 0 CUDA devices"),
        ("torch_ref", "tpu", "unknown device 'tpu'"),
        ("auto", "npu", "onnxrt: .* torch_ref: "),
    ],
)
def test_refusals_give_reason_and_hint(tiny, backend, device, message):
    with pytest.raises(BackendUnavailableError, match=message):
        open_encoder(tiny, backend=backend, device=device)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("onnxrt", {"thread": 1}, "thread: .*Supported options: provider, provider_options, threads"),
        ("onnxrt", {"threads": 0}, "threads: .*greater than or equal to 1"),
        ("torch_ref", {"dtype": "int4"}, "'float32' or 'bfloat16'"),
        ("onnxrt", "threads=1", "are a str, not a mapping"),
    ],
)
def test_invalid_options_list_the_valid_ones(tiny, backend, options, message):
    with pytest.raises(SettingsError, match=message):
        open_encoder(tiny, backend=backend, options=options)


def test_a_provider_that_is_not_there_is_refused_rather_than_replaced_by_the_cpu(tiny):
    from visionaccel.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match=r"CUDA.*Available: .*CPUExecutionProvider"):
        open_encoder(tiny, backend="onnxrt", options={"provider": "CUDAExecutionProvider"})


@pytest.mark.parametrize("raised", ["MemoryError: no room", "SystemExit: no room"])
def test_whatever_open_raises_becomes_a_device_error_with_the_backends_name(site, tiny, raised):
    kind, _, said = raised.partition(": ")
    source = ECHO.format(name="stuck", score=1).replace("return EchoSession()", f"raise {kind}({said!r})")
    install(site, f"acme-stuck-{kind}", "stuck", source)
    with pytest.raises(DeviceError, match=f"opening program .* with backend 'stuck' failed with .*{raised}"):
        open_encoder(tiny, backend="stuck", registry=Registry())


def test_what_is_no_session_is_the_plug_ins_error(site, tiny):
    source = ECHO.format(name="plain", score=1).replace("return EchoSession()", "return object()")
    install(site, "acme-plain", "plain", source)
    with pytest.raises(PluginError, match=r"'plain' opened a object, which is not a visionaccel\.backends\.Session"):
        open_encoder(tiny, backend="plain", registry=Registry())


def test_a_session_that_exits_is_a_device_error(site, tiny):
    source = ECHO.format(name="quits", score=1).replace('RuntimeError("echo cannot compute")', "SystemExit(0)")
    install(site, "acme-quits", "quits", source)
    with (
        open_encoder(tiny, backend="quits", registry=Registry()) as encoder,
        pytest.raises(DeviceError, match=r"'quits' on grids .* failed with .*SystemExit: 0"),
    ):
        encoder.encode(np.zeros((16, encoder.tower.patch_width), np.float32), [(1, 4, 4)])


TOOLS = {"bench", "testing"}
"""Distributions that provide what uses the whole core, and no backend for a device."""

MODULES = [
    file
    for file in sorted(PLUGINS.glob("*/visionaccel_*/**/*.py"))
    if file.relative_to(PLUGINS).parts[0] not in TOOLS
    and "vitisai" not in file.relative_to(PLUGINS).parts  # which writes bundles
    and file.name not in {"commands.py", "import_command.py"}
]
"""Modules of backends' distributions, without their commands."""


@pytest.mark.parametrize("file", MODULES, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_plug_ins_import_only_the_contract_and_the_core_types(file):
    tree = ast.parse(file.read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    core = [name.split(".") for name in imported if name and name.split(".")[0] == "visionaccel"]
    assert all(parts[1] in {"backends", "core", "errors"} for parts in core), imported
    others = {name.split(".")[0] for name in imported if name and name.startswith("visionaccel_")}
    assert others <= {file.parent.name}


def test_the_core_imports_no_other_distribution_of_ours():
    for file in sorted((PLUGINS.parent / "src").rglob("*.py")):
        tree = ast.parse(file.read_text())
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not [name for name in imported if name.startswith("visionaccel_")], file
