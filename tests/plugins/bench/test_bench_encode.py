"""The encode benchmark: who takes part, real processes in turns, and what is made of their times."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bundles import write_bundle
from fake_contenders import FakeProcess
from fake_plugins import install
from gated import wait_until
from visionaccel.cli.app import app
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, DeadlineError, DeviceError, SettingsError, UnknownBackendError
from visionaccel_bench.encode import presets
from visionaccel_bench.encode.contenders import (
    PEERS,
    REFERENCE,
    STOCK,
    Contender,
    absence,
    named_backends,
    named_peers,
    parse_contender,
)
from visionaccel_bench.encode.encode_report import make_encode_report
from visionaccel_bench.encode.encoding import (
    TABLE,
    ContenderProcess,
    EncodePlan,
    OnGrid,
    Peak,
    Taken,
    measure_encodes,
)
from visionaccel_bench.encode.presets import preset_checkpoint
from visionaccel_testing.checkpoints import TINY, TINY_TOWERS, tower_shapes
from visionaccel_testing.process_tree import memory, processor_seconds

GRIDS = ("8x8", "12x20")

BROKEN = """
import os, signal
from visionaccel.backends import Accepted, Capabilities, Session, VisionBackend, hookimpl

class Dying(Session):
    capabilities = Capabilities(device="cpu", precision="float32")
    def run(self, inputs):
        if len(inputs["pixel_values"]) > 64:
            print("the vendor's last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("it cannot compute")
    def close(self):
        pass

class Killed(Dying):
    def run(self, inputs):
        print("the vendor's last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

class Broken(VisionBackend):
    name = "broken"
    formats = frozenset({"checkpoint"})
    def probe(self, program, device):
        return Accepted(1, "says yes")
    def open(self, program, device, options):
        return Killed() if device == "dies" else Dying()

@hookimpl
def visionaccel_backends():
    return [Broken]
"""


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def grids():
    return [argument for text in GRIDS for argument in ("--grid", text)]


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """One real run: the command's result, its report, and its plot."""
    folder = tmp_path_factory.mktemp("bench")
    site = install(folder / "site", "broken-backend", "broken", BROKEN)
    backends = ("--backend", "onnxrt", "--backend", "broken", "--backend", "broken@dies")
    files = ("--plot", folder / "latency.png", "--output", folder / "report.json", "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", ":".join(sys.path))
        patch.setattr("visionaccel_bench.encode.contenders.default_registry", _registry)
        patch.setattr("visionaccel_bench.encode.encoding._PAUSE", 0.0)  # these times are not compared
        done = bench(
            "encode", tiny, *backends, "--peer", "transformers", *grids(), "--rounds", "2", "--threads", "1", *files
        )
    assert done.exit_code == 0, done.output
    return done, json.loads(done.stdout), folder


def _registry():
    from visionaccel.backends.registry import Registry

    return Registry()


def test_every_contender_is_measured_on_every_grid(measured):
    _, report, folder = measured
    assert report == json.loads((folder / "report.json").read_text())
    works = {each["label"]: each for each in report["contenders"] if each["name"] != "broken"}
    assert list(works) == ["onnxrt", "transformers float32", "transformers bfloat16"]
    for each in works.values():
        assert each["device"] == "cpu"
        assert each["startup_seconds"] > 0
        assert 0 < each["resident_bytes"] <= each["peak_bytes"]
        assert [found["grid"] for found in each["grids"]] == ["1x8x8", "1x12x20"]
        for found, grid in zip(each["grids"], report["grids"], strict=True):
            assert found["error"] is None
            assert len(found["rounds_seconds"]) == 2 <= found["encodes"]
            assert found["least_seconds"] <= found["median_seconds"] <= found["most_seconds"]
            assert found["patches_per_second"] == pytest.approx(grid["patches"] / found["median_seconds"])
            peaks = report["machine"]["peak_operations_per_second"]
            if each["precision"] in peaks:
                rate = grid["operations"] / found["median_seconds"]
                assert found["share_of_peak"] == pytest.approx(rate / peaks[each["precision"]])
            else:
                assert each["precision"] == "bfloat16", "which not every processor has"
                assert found["share_of_peak"] is None
            assert found["times_transformers"] > 0
            assert found["times_stock"] is None, "vLLM was not there"
    assert [grid["patches"] for grid in report["grids"]] == [64, 240]
    assert all(0 < grid["full_attention_share"] < 1 for grid in report["grids"])


def test_accuracy_is_against_transformers_in_float32(measured):
    _, report, _ = measured
    found = {each["label"]: each["grids"] for each in report["contenders"] if each["error"] is None}
    for on_grid in (*found["onnxrt"], *found["transformers float32"]):
        assert on_grid["accuracy"]["lowest_cosine"] > 0.99999
        assert on_grid["accuracy"]["relative_error"] < 1e-4
    for on_grid in found["transformers bfloat16"]:
        assert on_grid["accuracy"]["lowest_cosine"] <= on_grid["accuracy"]["mean_cosine"] < 1
        assert 1e-4 < on_grid["accuracy"]["relative_error"] < 0.1


def test_a_contender_that_fails_is_a_row_that_says_why(measured):
    _, report, _ = measured
    raising, killed = (each for each in report["contenders"] if each["name"] == "broken")
    assert raising["error"] is None, "it may have taken the second grid, at which it died"
    first, second = raising["grids"]
    assert "it cannot compute" in first["error"]
    assert "SIGKILL" in second["error"]
    assert "SIGKILL" in killed["error"]
    assert "the vendor's last words" in killed["error"]
    assert killed["grids"] == []


def test_the_plot_is_a_picture(measured):
    _, _, folder = measured
    with Image.open(folder / "latency.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 20, "lines of several colours"


def test_without_the_reference_among_them_there_is_accuracy_all_the_same(tiny, monkeypatch):
    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", FakeProcess)
    done = bench("encode", tiny, "--backend", "onnxrt", "--peer", "none", "--grid", "8x8", "--rounds", "1")
    assert done.exit_code == 0, done.output
    assert "1.00000" in done.stdout
    assert "transformers float32" not in done.stdout


def test_names_devices_and_options_of_contenders():
    assert parse_contender("onnxrt", "backend") == Contender("backend", "onnxrt")
    assert parse_contender("onnxrt@cuda:0?threads=2,optimization=basic", "backend") == Contender(
        "backend", "onnxrt", "cuda:0", {"threads": 2, "optimization": "basic"}
    )
    assert parse_contender("simulated@onnxrt@1", "backend").device == "onnxrt@1"
    assert parse_contender('onnxrt?{"provider_options": {"a": "b"}}', "backend").options == {
        "provider_options": {"a": "b"}
    }
    several = named_backends(["torch_ref?dtype=float32", "torch_ref?dtype=bfloat16", "onnxrt"])
    assert [each.label for each in several] == ["torch_ref dtype=float32", "torch_ref dtype=bfloat16", "onnxrt"]


def test_without_names_every_installed_backend_but_simulators_and_every_peer_take_part():
    names = [each.name for each in named_backends([])]
    assert {"onnxrt", "torch_ref"} <= set(names)
    assert "simulated" not in names
    assert [each.label for each in named_peers([])] == [
        f"{peer} {dtype}" for peer in PEERS for dtype in ("float32", "bfloat16")
    ]
    assert named_backends(["none"]) == named_peers(["none"]) == ()
    assert {REFERENCE.label, STOCK.label} <= {each.label for each in named_peers([])}
    assert [each.label for each in named_peers(["vllm?dtype=bfloat16,python=/env/bin/python"])] == [STOCK.label]


@pytest.mark.parametrize(
    ("text", "kind", "error", "said"),
    [
        ("onnxtr", "backend", UnknownBackendError, "onnxrt"),
        ("onnxrt?threads", "backend", SettingsError, "name=value"),
        ("onnxrt?", "backend", SettingsError, "NAME"),
        ("onnxrt@", "backend", SettingsError, "NAME"),
        ("onnxrt?{1", "backend", SettingsError, "NAME"),
        ("onnxrt?bundle=/nowhere", "backend", SettingsError, "/nowhere is not a bundle"),
        ("timm", "peer", SettingsError, "transformers"),
        ("vllm@cuda:0", "peer", SettingsError, "CPU"),
        ("vllm?attention=sdpa", "peer", SettingsError, "enforce_eager"),
        ("vllm?dtype=float16", "peer", SettingsError, "bfloat16"),
    ],
)
def test_what_names_no_contender_is_refused(text, kind, error, said):
    with pytest.raises(error, match=said):
        parse_contender(text, kind)


@pytest.mark.parametrize(("text", "eager"), [("true", True), ("false", False)])
def test_whether_vllms_peer_compiles_is_an_option(text, eager):
    assert parse_contender(f"vllm?enforce_eager={text}", "peer").options == {"enforce_eager": eager}


def test_a_contender_that_is_there_twice_is_refused():
    with pytest.raises(SettingsError, match="given twice"):
        named_peers(["vllm", "vllm?dtype=bfloat16"])


def test_a_peer_that_is_not_installed_is_absent_with_the_fix(monkeypatch):
    monkeypatch.setattr("visionaccel_bench.encode.contenders._importable", lambda module: module != "vllm")
    assert "pip install vllm" in absence(STOCK)
    assert absence(REFERENCE) is None
    assert absence(Contender("peer", "vllm", options={"dtype": "bfloat16", "python": "/env/python"})) is None


def test_an_interpreter_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DeviceError, match=r"/nowhere/python cannot be started.*Check the interpreter"):
        ContenderProcess(tmp_path / "log", 1, "/nowhere/python")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((), SettingsError, "--preset"),
        (("x", "--preset", "qwen2.5-vl-7b"), SettingsError, "not both"),
        (("x", "--depth", "8"), SettingsError, "applies only to a preset"),
        (("--preset", "qwen9"), SettingsError, "qwen2.5-vl-7b"),
        (("--preset", "qwen2.5-vl-7b", "--depth", "33"), SettingsError, "has 32 blocks"),
        (("x", "--grids", "all"), SettingsError, "'table'"),
        (("x", "--backend", "none", "--peer", "none"), SettingsError, "nothing to compare"),
        (("x", "--plot", "/nowhere/plot.png"), ConfigurationError, "not a file in an existing folder"),
        (("x", "--output", "/tmp"), ConfigurationError, "not a file in an existing folder"),
        (("x", "--peer", "vllm?enforce_eager=maybe"), SettingsError, "must be one of true, false"),
        (("{tiny}", "--threads", "4096"), SettingsError, "more than the"),
        (("/nowhere",), Exception, "not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_a_process_starts(monkeypatch, tiny, arguments, error, said):
    monkeypatch.setattr("visionaccel_bench.commands.bench_encode.measure_encodes", None)
    done = bench("encode", *(argument.format(tiny=tiny) for argument in arguments))
    assert isinstance(done.exception, error), done.output
    assert said in str(done.exception)


def test_a_backend_may_open_a_bundle_in_the_place_of_the_source(tiny, tmp_path):
    bundle = write_bundle(tiny, tmp_path / "half", dynamic=True, precision="bfloat16")
    contender = parse_contender(f"onnxrt?bundle={bundle},spinning=true", "backend")
    assert contender.bundle == bundle
    with ContenderProcess(tmp_path / "log", 1) as process:
        assert process.open(contender, tiny, 1, 300)["precision"] == "bfloat16", "the source is of float32"


def test_a_contender_that_takes_too_long_is_ended(tiny, tmp_path):
    with ContenderProcess(tmp_path / "log", 1) as process:
        with pytest.raises(DeadlineError, match=r"longer than 0\.01 s"):
            process.open(REFERENCE, tiny, 1, 0.01)
        assert not process.alive


def test_a_process_that_hangs_up_and_lives_on_is_ended_and_not_blamed_on_memory(tiny, tmp_path):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os, time\nos.closerange(3, 256)\ntime.sleep(60)\n")
    script.chmod(0o755)
    with ContenderProcess(tmp_path / "log", 1, str(script)) as process:
        with pytest.raises(DeviceError, match="closed its connection, kept running, and was ended"):
            process.open(REFERENCE, tiny, 1, 60)
        assert not process.alive


def test_a_contender_that_refuses_the_first_grid_takes_the_others(tiny, monkeypatch):
    class Refusing(FakeProcess):
        def ask(self, request, seconds):
            if self.label == "onnxrt" and request["grid"] == [1, 8, 8]:
                raise DeviceError("no program of this encoder accepts grid 1x8x8")
            return super().ask(request, seconds)

    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", Refusing)
    plan = EncodePlan((Grid(1, 8, 8), Grid(1, 12, 20)), rounds=1, threads=1, turn_seconds=0.0)
    taken, _, missing = measure_encodes(tiny, open_tower(tiny), [Contender("backend", "onnxrt")], plan, lambda _: None)
    assert missing is None
    assert taken[0].error is None
    refused, done = (taken[0].grids[grid] for grid in plan.grids)
    assert "no program of this encoder accepts grid 1x8x8" in refused.error
    assert done.error is None
    assert done.accuracy.lowest_cosine > 0.9999
    assert len(done.rounds) == 1


def test_why_there_is_no_accuracy_is_said(tiny, monkeypatch):
    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", FakeProcess)
    monkeypatch.setattr("visionaccel_bench.encode.contenders._importable", lambda module: module != "transformers")
    plan = EncodePlan((Grid(1, 8, 8),), rounds=1, threads=1, turn_seconds=0.0)
    contender = Contender("backend", "onnxrt")
    taken, peak, missing = measure_encodes(tiny, open_tower(tiny), [contender], plan, lambda _: None)
    assert "transformers not installed" in missing
    report = make_encode_report("it", open_tower(tiny), plan, taken, peak, missing)
    assert any("Accuracy is missing" in note and "not installed" in note for note in report.notes)


def test_the_first_contenders_start_has_no_making_of_patches_in_it(tiny, monkeypatch):
    there = []

    class Starting(FakeProcess):
        def __init__(self, log, threads, python=None):
            super().__init__(log, threads, python)
            there.append(len(list(log.parent.glob("patches-*.npy"))))

    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", Starting)
    plan = EncodePlan((Grid(1, 8, 8),), rounds=1, threads=1, turn_seconds=0.0)
    measure_encodes(tiny, open_tower(tiny), [Contender("backend", "onnxrt")], plan, lambda _: None)
    assert there[0] == 1


@pytest.mark.parametrize("patches", [64, 240], ids=["on the first grid", "later"])
def test_a_reference_that_ends_while_it_writes_costs_no_more_than_the_accuracy(tiny, monkeypatch, patches):
    class Dying(FakeProcess):
        def ask(self, request, seconds):
            answer = super().ask(request, seconds)
            if self.label == REFERENCE.label and len(np.load(request["patches"])) == patches:
                whole = Path(request["save"]).read_bytes()
                Path(request["save"]).write_bytes(whole[:-8])
                self.alive = False
                raise DeviceError("its process ended.")
            return answer

    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", Dying)
    plan = EncodePlan((Grid(1, 8, 8), Grid(1, 12, 20)), rounds=1, threads=1, turn_seconds=0.0)
    taken, _, missing = measure_encodes(tiny, open_tower(tiny), [Contender("backend", "onnxrt")], plan, lambda _: None)
    assert missing == "its process ended."
    first, second = (taken[0].grids[grid] for grid in plan.grids)
    assert first.rounds == second.rounds == [[1.0]]
    assert second.accuracy is None
    assert (first.accuracy is None) == (patches == 64)


def test_embeddings_of_a_reference_that_ended_are_not_compared_with_another_grids(tiny, monkeypatch):
    class EndingAfterwards(FakeProcess):
        def ask(self, request, seconds):
            answer = super().ask(request, seconds)
            if self.label == REFERENCE.label:
                self.alive = False
                raise DeviceError("its process ended.")
            return answer

    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", EndingAfterwards)
    plan = EncodePlan((Grid(1, 8, 8), Grid(1, 12, 20)), rounds=1, threads=1, turn_seconds=0.0)
    taken, _, _ = measure_encodes(tiny, open_tower(tiny), [Contender("backend", "onnxrt")], plan, lambda _: None)
    assert all(found.accuracy is None and found.error is None for found in taken[0].grids.values())


def test_the_peak_leaves_out_what_the_processor_lacks(monkeypatch):
    import torch

    from visionaccel.core.packed_products import why_not_packed
    from visionaccel_bench.encode.contender_main import Work

    threads = torch.get_num_threads()
    why_not_packed.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = Work().products([(64, 32, 48)], threads)["rates"]
    assert list(found) == ["float32"]
    assert found["float32"] > 0
    why_not_packed.cache_clear()


def test_an_interpreter_without_this_package_is_a_row_too(tiny, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no module here\nexit 3\n")
    script.chmod(0o755)
    with ContenderProcess(tmp_path / "log", 1, str(script)) as process:
        with pytest.raises(DeviceError, match=r"(?s)status 3.*no module here"):
            process.open(REFERENCE, tiny, 1, 60)
        assert not process.alive


def test_ratios_are_of_turns_of_the_same_round(tiny):
    plan = EncodePlan((Grid(1, 8, 8),), rounds=3, threads=1)
    opened = {"device": "cpu", "precision": "float32", "about": "", "simulated": False}

    def taken(contender, *rounds):
        return Taken(contender, opened, grids={plan.grids[0]: OnGrid([[seconds] for seconds in rounds])})

    entries = [
        taken(Contender("backend", "onnxrt"), 1.0, 8.0, 2.0),  # The machine was slower in the second round, for all.
        taken(STOCK, 2.0, 16.0, 4.0),
        taken(REFERENCE, 4.0, 40.0, 8.0),
    ]
    peak = Peak({"float32": 2e9})
    report = make_encode_report("it", open_tower(tiny), plan, entries, peak)
    found = report.contenders[0].grids[0]
    assert (found.median_seconds, found.least_seconds, found.most_seconds) == (2.0, 1.0, 8.0)
    assert found.times_stock == 0.5
    assert found.times_transformers == 0.25
    assert found.share_of_peak == pytest.approx(report.grids[0].operations / 2.0 / 2e9)
    assert any("busy with other work" in note for note in report.notes)


def test_a_terminated_benchmark_ends_its_processes_and_leaves_no_folder(tiny, tmp_path):
    code = "from visionaccel.cli import main; main()"
    wanted = ("bench", "encode", tiny, "--backend", "torch_ref", "--peer", "none", "--grid", "8x8", "--rounds", "999")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code, *map(str, wanted)], env=environment) as process:
        until = time.monotonic() + 100
        while not list(tmp_path.glob("visionaccel-bench-*/*.log")) and time.monotonic() < until:
            time.sleep(0.05)
        (log, *_) = tmp_path.glob("visionaccel-bench-*/*.log")
        children = set(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        assert children
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not log.exists()
    assert list(tmp_path.iterdir()) == []
    # The watcher for the case that the command is killed sees its end a moment later.
    wait_until(lambda: not any(Path("/proc", child).exists() for child in children))


def test_memory_and_processor_time_are_those_of_child_processes_too():
    code = "x = bytearray(b'1') * 80_000_000; sum(range(4_000_000)); print(flush=True); input()"
    before, used = memory(), processor_seconds()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        held, after = memory(), processor_seconds()
        child.communicate(b"\n", timeout=60)
    assert held.resident - before.resident > 80_000_000
    assert held.peak - before.peak > 80_000_000
    assert after - used > 0.03


def test_the_table_doubles_from_256_to_16384_patches():
    sizes = [grid.patches for grid in TABLE]
    assert sizes == [256 * 2**i for i in range(7)]


def test_a_preset_is_written_once_and_keeps_its_full_attention(tmp_path, monkeypatch):
    config = {**TINY, "depth": 5, "fullatt_block_indexes": [1, 3]}
    monkeypatch.setattr(presets, "PRESETS", {"small": ("qwen2_5_vl", config)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = preset_checkpoint("small", 2)
    tower = open_tower(folder)
    assert tower.spec.full_blocks == (1,)
    assert set(tower.weights) == set(tower_shapes({**config, "depth": 2}))
    assert {stored.dtype for stored in tower.weights.values()} == {"bfloat16"}
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert preset_checkpoint("small", 2) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert preset_checkpoint("small") != folder
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small-depth2-1", "small-depth5-1"]


def test_a_preset_with_fewer_blocks_keeps_the_deepstack_levels_after_them(tmp_path, monkeypatch):
    config = {**TINY_TOWERS["qwen3_vl"], "depth": 4, "deepstack_visual_indexes": [0, 2, 3]}
    monkeypatch.setattr(presets, "PRESETS", {"small": ("qwen3_vl", config)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tower = open_tower(preset_checkpoint("small", 3))
    assert (tower.family, tower.spec.depth, tower.spec.deepstack) == ("qwen3_vl", 3, (0, 2))
    assert tower.complete


def test_a_cache_that_cannot_be_written_is_an_error_with_the_fix(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="XDG_CACHE_HOME"):
        preset_checkpoint("qwen2.5-vl-7b", 1)
