"""A bundle is written whole or not at all, in little memory; and the command that writes it."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bundle_tools import CERTIFICATE, DYNAMIC, FIXED, GRID, TRIPLE, assert_close, encode, forge
from bundles import document
from command_line import run_command
from towers import random_patches, reference
from visionaccel.bundle import MANIFEST, export_bundle, json_schema, open_bundle, write_golden
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, hollow_checkpoint, random_checkpoint


class Interrupted(Exception):  # noqa: N818 - what a caller's own code raises
    pass


def stages(tower, folder):
    """Every call of the progress of an export."""
    calls = []
    export_bundle(tower, folder, [FIXED, DYNAMIC], self_contained=True, progress=lambda *call: calls.append(call))
    return calls


def test_progress_counts_up_to_the_whole_in_every_stage(tmp_path):
    calls = stages(open_tower(random_checkpoint(tmp_path / "checkpoint")), tmp_path / "bundle")
    by_stage = {stage: [(done, total) for name, done, total in calls if name == stage] for stage, *_ in calls}
    assert list(by_stage) == ["digest of the weights", "weights", "programs"]
    for counted in by_stage.values():
        assert [done for done, _ in counted] == sorted(done for done, _ in counted)
        assert counted[-1][0] == counted[-1][1]


@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt, OSError])
def test_an_exception_on_the_way_leaves_nothing_at_all(tmp_path, kind):
    tower = open_tower(random_checkpoint(tmp_path / "checkpoint"))
    calls = len(stages(tower, tmp_path / "whole"))
    shutil.rmtree(tmp_path / "whole")
    for last in (1, calls // 2, calls):
        count = iter(range(1, calls + 1))

        def fail(*_, last=last, count=count):
            if next(count) == last:
                raise kind

        with pytest.raises(ConfigurationError if kind is OSError else kind):
            export_bundle(tower, tmp_path / "bundle", [FIXED, DYNAMIC], self_contained=True, progress=fail)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_exception_on_the_way_leaves_the_bundle_that_was_there(tiny, bundle, monkeypatch):
    def fail(*_):
        raise Interrupted

    with pytest.raises(Interrupted):
        export_bundle(open_tower(tiny), bundle, [DYNAMIC], force=True, progress=fail)
    assert len(open_bundle(bundle).manifest.programs) == 3

    rename = Path.rename

    def second_fails(self, target):
        if Path(target) == bundle and ".partial-" in self.name:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        export_bundle(open_tower(tiny), bundle, [DYNAMIC], force=True)
    assert len(open_bundle(bundle).manifest.programs) == 3
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.encoder import open_tower
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid

checkpoint, root = sys.argv[1], Path(sys.argv[2])
tower = open_tower(checkpoint)
old, new = ([ProgramRequest(coverage)] for coverage in (AnyGrid(), FixedGrid(Grid(1, 10, 18))))

def export(folder, requests, progress=None):
    export_bundle(tower, folder, requests, self_contained=True, force=True, progress=progress)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child

def waited(child):
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def place(name, over):
    folder = root / name / "output"
    folder.parent.mkdir(parents=True)
    if over:
        export(folder, old)
    return folder

started = time.perf_counter()
export(place("warm", False), new)
started = time.perf_counter()
export(root / "warm" / "output", new)
seconds = time.perf_counter() - started

for over in (False, True):  # at every change of the file system
    number, killed = 0, True
    while killed:
        number += 1
        folder = place(f"change-{over}-{number}", over)
        def work(count=iter(range(1, number + 1))):
            def see(event, arguments):
                changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
                if event in changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                    if str(arguments[0]).startswith(str(root)) or event in ("os.remove", "os.rmdir"):
                        if next(count) == number:
                            die()
            sys.addaudithook(see)
            export(folder, new)
        killed = waited(in_child(work))
    print("changes", number - 1)

for number in range(12):  # at any moment
    folder = place(f"moment-{number}", number % 2)
    child = in_child(lambda: export(folder, new))
    time.sleep(seconds * number / 10)
    os.kill(child, signal.SIGKILL)
    waited(child)

calls = []
export(root / "warm" / "output", new, lambda *call: calls.append(call))
firsts = [number for number, call in enumerate(calls) if not number or calls[number - 1][0] != call[0]]
for last in {*firsts, *(first - 1 for first in firsts[1:]), len(calls) - 1}:  # in every stage
    folder = place(f"stage-{last}", False)
    def tell(*call, count=iter(range(len(calls)))):
        if next(count) == last:
            die()
    assert waited(in_child(lambda: export(folder, new, tell)))
    assert not folder.exists()
"""


def test_a_killed_export_leaves_no_bundle_or_a_whole_one(tiny, tmp_path):
    command = [sys.executable, "-c", KILLED, tiny, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plain, replacing = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert 7 <= plain < replacing, "the file system changes at many moments"
    patches = random_patches(TRIPLE)
    exact = reference(tiny, patches, TRIPLE)
    found = {}
    stages = [folder for folder in tmp_path.iterdir() if folder.name.startswith("stage")]
    until = time.monotonic() + 20
    while any(any(stage.iterdir()) for stage in stages) and time.monotonic() < until:
        time.sleep(0.1)
    assert stages
    assert not any(any(stage.iterdir()) for stage in stages), "what was begun goes with a killed export"
    for folder in sorted(tmp_path.iterdir()):
        output = folder / "output"
        if output.exists():
            opened = open_bundle(output)
            assert_close(encode(opened, patches=patches), exact)
            found[folder.name] = opened.manifest.programs[0].name
        for leftover in folder.iterdir():
            if leftover == output:
                continue
            assert leftover.name.startswith((".output.partial-", ".output.replaced-"))
    assert [name for name in found if name.startswith("change-False")] == [f"change-False-{plain + 1}"], "not killed"
    assert set(found.values()) == {"dynamic", "10x18"}
    assert sum(name.startswith("change-True") for name in found) == replacing, "none but between two renames"
    assert not [name for name in found if name.startswith("stage")]


def test_an_existing_bundle_is_replaced_only_by_force(tiny, bundle):
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(ConfigurationError, match="--force"):
        export_bundle(open_tower(tiny), bundle, [FIXED])
    assert (bundle / MANIFEST).read_bytes() == before
    export_bundle(open_tower(tiny), bundle, [FIXED], force=True)
    assert sorted(file.name for file in bundle.iterdir()) == ["10x18.onnx", MANIFEST]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_never_replaced(tiny, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious").write_text("text")
    file.write_text("text")
    for output in (folder, file, tiny):
        for force in (False, True):
            with pytest.raises(ConfigurationError, match="exists"):
                export_bundle(open_tower(tiny), output, [FIXED], self_contained=True, force=force)
    assert (folder / "precious").read_text() == file.read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_appears_where_a_bundle_is_being_written_stays(tiny, tmp_path):
    output = tmp_path / "bundle"

    def meanwhile(*_):
        output.mkdir(exist_ok=True)
        (output / "precious").touch()

    for force in (False, True):
        with pytest.raises(ConfigurationError, match="exists"):
            export_bundle(open_tower(tiny), output, [FIXED], force=force, progress=meanwhile)
        assert [file.name for file in output.iterdir()] == ["precious"]
        shutil.rmtree(output)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_with_the_manifest_is_named_and_nothing_is_left(tiny, bundle, tmp_path, monkeypatch):
    def fill_up(path, data):
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("visionaccel.bundle.folder.write_file", fill_up)
    with pytest.raises(ConfigurationError, match="No space left") as refused:
        export_bundle(open_tower(tiny), tmp_path / "new", [FIXED])
    assert "space" in refused.value.hint
    before = sorted(bundle.iterdir())
    with pytest.raises(ConfigurationError, match="No space left"):
        write_golden(open_bundle(bundle), (), {"certificate": None})
    assert sorted(bundle.iterdir()) == before
    assert not (tmp_path / "new").exists()


def test_a_device_is_named_by_its_kind(tiny, tmp_path):
    with pytest.raises(ConfigurationError, match="not a device kind"):
        export_bundle(open_tower(tiny), tmp_path / "bundle", [FIXED], device="cuda:0")


def test_a_bundle_behind_a_link_is_replaced_through_it(tiny, bundle, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle)
    export_bundle(open_tower(tiny), link, [FIXED], force=True)
    assert link.is_symlink()
    assert open_bundle(bundle).grids == open_bundle(link).grids == (GRID,)
    assert sorted(file.name for file in bundle.iterdir()) == ["10x18.onnx", MANIFEST]


def test_a_bundle_is_never_replaced_by_references_to_its_own_weights(tiny, bundle):
    with pytest.raises(ConfigurationError, match="contains the weights themselves"):
        export_bundle(open_tower(bundle), bundle, [FIXED], force=True)
    export_bundle(open_tower(bundle), bundle, [FIXED], self_contained=True, force=True)
    assert_close(encode(bundle), reference(tiny, random_patches(TRIPLE), TRIPLE))


@pytest.mark.parametrize("output", ["/proc/nowhere/bundle", "{tiny}/config.json/bundle", "{tmp}/" + "x" * 300])
def test_a_place_that_cannot_be_written_is_an_error_of_this_package(tiny, tmp_path, output):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        export_bundle(open_tower(tiny), Path(output.format(tiny=tiny, tmp=tmp_path)), [FIXED])


def test_a_bundle_may_be_read_by_others(contained):
    assert contained.stat().st_mode & 0o777 == 0o755


MEASURED = """
import sys
from pathlib import Path
def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
from visionaccel.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(peak() - before)
"""


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    folder = hollow_checkpoint(tmp_path_factory.mktemp("hollow"), QWEN2_5_VL_7B)
    assert (folder / "model.safetensors").stat().st_size > 2.4 * 2**30
    yield folder
    shutil.rmtree(folder)


def memory_of_export(*arguments):
    command = [sys.executable, "-c", MEASURED, "export", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])  # stdout is the command's


def test_a_referring_7b_bundle_is_written_in_little_memory(hollow, tmp_path):
    grown = memory_of_export(hollow, tmp_path / "bundle", "--grid", "58x74", "--grid", "74x58", "--dynamic")
    assert 0 < grown < 0.5 * 2**30
    assert [program["name"] for program in document(tmp_path / "bundle")["programs"]] == ["58x74", "74x58", "dynamic"]


def test_a_contained_7b_bundle_is_written_in_less_memory_than_its_weights(hollow, tmp_path):
    if shutil.disk_usage(tmp_path).free < 4 * 2**30:
        pytest.skip("a packed 7B tower needs more disk than there is")
    output = tmp_path / "bundle"
    try:
        grown = memory_of_export(hollow, output, "--grid", "58x74", "--self-contained", "--precision", "bfloat16")
        packed = (output / "model.safetensors").stat().st_size
    finally:
        shutil.rmtree(output, ignore_errors=True)
    assert packed > 1.2 * 2**30
    assert 0 < grown < min(1.3 * packed, 2**30)


def run(*arguments, status=0):
    done = run_command(*arguments, environment=os.environ)
    assert done.returncode == status, done.stderr
    return done


def test_the_command_writes_a_bundle_and_shows_what_it_wrote(tiny, tmp_path):
    output = tmp_path / "bundle"
    arguments = ("--grid", "10x18", "--bucket", "20x22", "--dynamic", "--split-host", "--self-contained")
    exported = json.loads(run("export", tiny, output, *arguments, "--device", "npu", "--json").stdout)
    shown = json.loads(run("inspect", output, "--full", "--json").stdout)
    assert exported["manifest"] == shown["manifest"] == document(output)
    assert [(row["name"], row["takes"]) for row in shown["programs"]] == [
        ("10x18", "10x18"),
        ("bucket-440x9", "up to 440 patches in 9 windows"),
        ("dynamic", "any grid"),
    ]
    assert [row["host"] for row in shown["programs"]] == [["patch_embed.proj.weight"]] * 2 + [[]]
    assert {row["device"] for row in shown["programs"]} == {"npu"}
    assert shown["programs"][0]["opset"] == {"ai.onnx": 17}
    assert sum(shown["programs"][0]["operators"].values()) == shown["programs"][0]["nodes"]
    text = run("inspect", output).stdout
    assert "pixel_values" in text
    assert "visionaccel validate" in text, "it has no certificate"


def test_the_command_writes_one_program_for_any_grid_if_none_is_named(tiny, tmp_path):
    assert "dynamic" in run("export", tiny, tmp_path / "bundle").stdout
    assert [program.name for program in open_bundle(tmp_path / "bundle").programs(["onnx"])] == ["dynamic"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("export", "/nowhere", "{tmp}/x"), "CheckpointError"),
        (("export", "{tiny}", "{contained}", "--dynamic"), "ConfigurationError"),
        (("export", "{tiny}", "{tiny}", "--force"), "ConfigurationError"),
        (("export", "{tiny}", "{tmp}/x", "--grid", "10x19"), "GridError"),
        (("export", "{tiny}", "{tmp}/x", "--split-host"), "ConfigurationError"),
        (("inspect", "{tiny}"), "BundleError"),
        (("inspect",), "ConfigurationError"),
    ],
)
def test_errors_of_the_command_are_one_message_and_status_2(tiny, contained, tmp_path, arguments, error):
    places = {"tiny": tiny, "contained": contained, "tmp": tmp_path}
    done = run(*(argument.format(**places) for argument in arguments), "--json", status=2)
    assert json.loads(done.stdout)["error"] == error
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.strip().startswith(error)
    assert not list(tmp_path.iterdir())


def test_the_schema_describes_a_manifest(bundle):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(run("inspect", "--schema").stdout)
    assert schema == json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    write_golden(open_bundle(bundle), [], {"certificate": CERTIFICATE})
    validator.validate(document(bundle))
    assert not validator.is_valid({**document(bundle), "surprise": 1})
    assert not validator.is_valid({**document(bundle), "schema_version": 3})


def test_a_bundle_is_shown_though_its_checkpoint_moved(tiny, tmp_path):
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    run("export", moved, tmp_path / "bundle")
    moved.rename(tmp_path / "elsewhere")
    assert "needs the vision weights" in run("inspect", tmp_path / "bundle", status=2).stderr
    assert "dynamic" in run("inspect", tmp_path / "bundle", "--checkpoint", tmp_path / "elsewhere").stdout


def test_names_that_a_terminal_would_obey_are_refused(bundle):
    forge(bundle, lambda stated: stated["programs"][0].update(name="\x1b]0;owned\x07"))
    assert "printable" in run("inspect", bundle, status=2).stderr


def test_names_of_a_bundle_are_printed_as_they_are(bundle):
    forge(bundle, lambda stated: stated["programs"][0].update(name="[/x] [red]10x18"))
    assert "[/x] [red]10x18" in run("inspect", bundle).stdout
