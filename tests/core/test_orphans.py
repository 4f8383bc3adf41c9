"""A command that is killed leaves neither processes nor folders."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fake_plugins import install
from gated import wait_until
from processes import has_ended
from visionaccel.core.orphans import temporary_folder

OWNER = """
import subprocess, sys, time
from pathlib import Path
from visionaccel.core.orphans import guarded_folder, guarded_group, temporary_folder
ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_DFL); print(1, flush=True); time.sleep(60)"
kept = Path(sys.argv[1]); kept.mkdir()
with temporary_folder("visionaccel-test-") as folder, guarded_folder(Path(sys.argv[2])):
    Path(sys.argv[2]).mkdir()
    (folder / "file").write_text("x")
    child = subprocess.Popen([sys.executable, "-c", ignoring], process_group=0, stdout=subprocess.PIPE)
    with guarded_group(child.pid):
        child.stdout.readline()
        with guarded_folder(kept):
            pass
        print(folder, child.pid, flush=True)
        if len(sys.argv) > 3:
            child.kill(); child.wait()
        else:
            time.sleep(60)
print("done", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_a_killed_process_started_and_made_goes(tmp_path, number):
    kept, partial = tmp_path / "kept", tmp_path / "partial"
    command = [sys.executable, "-c", OWNER, str(kept), str(partial)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        folder, child = owner.stdout.readline().split()
        owner.send_signal(number)
        owner.wait(20)
    wait_until(lambda: has_ended(int(child)) and not Path(folder).exists() and not partial.exists())
    assert kept.is_dir()


def test_an_ordinary_end_leaves_no_watcher(tmp_path):
    command = [sys.executable, "-c", OWNER, str(tmp_path / "kept"), str(tmp_path / "partial"), "ends"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("done\n"), done.stderr
    assert (tmp_path / "partial").is_dir()
    before = _children()
    with temporary_folder("visionaccel-test-") as folder:
        watchers = _children() - before  # tests before this one may have left processes of their libraries
        assert watchers
    assert not folder.exists()
    assert not watchers & _children()


def _children():
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export_leaves_no_partial_folder(tiny, tmp_path, number):
    slow = (
        "import sys, time, visionaccel.bundle.export as export\n"
        "def hold(*a, **k): print('writing', flush=True, file=sys.stderr); time.sleep(60)\n"
        "export._write_program = hold\n"
        "from visionaccel.cli import main; main()"
    )
    command = [sys.executable, "-c", slow, "export", str(tiny), str(tmp_path / "bundle"), "--dynamic"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as owner:
        while "writing" not in (line := owner.stderr.readline()):
            assert line, "it ended"
        assert any(".partial-" in entry.name for entry in tmp_path.iterdir())
        owner.send_signal(number)
        owner.wait(20)
    wait_until(lambda: not any(tmp_path.iterdir()))


SERVE = """
import sys
from pathlib import Path
from visionaccel_bench.server import serve
child = "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
child += f"open({sys.argv[1]!r}, 'w').write(str(os.getpid())); time.sleep(99)"
with serve(Path("."), {}, command=(sys.executable, "-c", child)):
    pass
"""

DOCTOR = """
import sys
sys.argv = ["visionaccel", "doctor", "--no-vllm", "--backend", "hanging"]
from visionaccel.cli import main
main()
"""


@pytest.mark.parametrize("program", [SERVE, DOCTOR], ids=["a server", "doctor"])
def test_a_killed_command_leaves_neither_its_children_nor_its_folders(tmp_path, program):
    note, temporary = tmp_path / "pid", tmp_path / "temporary"
    temporary.mkdir()
    hanging = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(99)\n"
    site = install(tmp_path / "site", "acme-hanging", "hanging", hanging)
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(site)}
    with subprocess.Popen([sys.executable, "-c", program, str(note)], env=environment) as owner:
        wait_until(lambda: note.exists() and note.read_text(), 60)
        assert any(entry.name.startswith("visionaccel-") for entry in temporary.iterdir())
        owner.kill()
        owner.wait(20)
    leader = int(note.read_text())
    wait_until(lambda: has_ended(leader) and not any(temporary.iterdir()))
    with pytest.raises(ProcessLookupError):
        os.killpg(leader, 0)
