"""The memory that processes share, in which a worker reports to the scheduler the items that it could not encode."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from visionaccel.core.grid import Grid
from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm.shared_memory import _VARIABLE as MEMORY
from visionaccel.integrations.vllm.shared_memory import (
    ALL_ITEMS,
    FAULTS,
    LOST,
    METRICS,
    REPLACED,
    Area,
    Fault,
    FaultReader,
    make_shared_memory,
    report_fault,
    shared_memory,
)
from visionaccel.service import item_key

WORKER = "from visionaccel.integrations.vllm.shared_memory import Fault, report_fault\n"


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setenv(MEMORY, "")
    make_shared_memory()
    return shared_memory()


def run(code, *, check=True, **settings):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=check, capture_output=True, text=True, env=os.environ | settings).stdout


def test_no_scheduler_listens_before_a_reader_is_made(shared):
    assert not report_fault(Fault("k", "m"), "e")
    reader = FaultReader("e")
    assert report_fault(Fault("k", "m"), "e")
    reader.close()
    assert not report_fault(Fault("k", "m"), "e")


def test_no_scheduler_listens_without_memory(monkeypatch):
    monkeypatch.delenv(MEMORY, raising=False)
    assert FaultReader("e").new() == []
    assert not report_fault(Fault("k", "m"), "e")


def test_each_fault_is_read_once(shared):
    reader = FaultReader("e")
    assert reader.new() == []
    report_fault(Fault("a", "first\nline"), "e")
    report_fault(Fault("b", "naïve \udc80"), "e")
    assert reader.new() == [Fault("a", "first\nline"), Fault("b", "naïve ?")]
    assert reader.new() == []
    report_fault(Fault("c", "third"), "e")
    assert reader.new() == [Fault("c", "third")]


def test_a_long_message_is_cut(shared):
    reader = FaultReader("e")
    report_fault(Fault("k", "é" * 100_000), "e")
    (fault,) = reader.new()
    assert fault.key == "k"
    assert 2000 < len(fault.message) < FAULTS.capacity
    assert set(fault.message) == {"é"}


def test_a_worker_process_reaches_its_parents_reader(shared):
    reader = FaultReader("e")
    run(WORKER + "assert report_fault(Fault('k', 'from a worker'), 'e')")
    assert reader.new() == [Fault("k", "from a worker")]


def test_several_workers_and_threads_lose_no_report(shared):
    reader = FaultReader("e")
    code = WORKER + (
        "import sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    assert all(pool.map(lambda i: report_fault(Fault(f'{sys.argv[1]}-{i}', 'm' * i), 'e'), range(100)))\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(3)]
    found = []
    while any(worker.poll() is None for worker in workers):
        found += reader.new()
    found += reader.new()
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sorted(fault.key for fault in found) == sorted(f"{n}-{i}" for n in range(3) for i in range(100))


def test_what_another_process_counts_is_never_read_half_written(shared):
    reader = shared.claim(FAULTS, "counted")
    code = (
        "from contextlib import nullcontext\n"
        "from visionaccel.integrations.vllm.shared_memory import FAULTS, shared_memory\n"
        "(area,) = shared_memory().areas(FAULTS)\n"
        "shared_memory().alone = lambda *_: nullcontext()\n"  # the only writer: without locks it writes faster
        "for _ in range(100_000):\n"
        "    area.append(b'')\n"
    )
    worker, last, smaller = subprocess.Popen([sys.executable, "-c", code]), 0, 0
    while worker.poll() is None:
        for _ in range(1000):
            written = reader.written
            smaller += written < last
            last = written
    assert worker.returncode == 0
    assert (smaller, reader.written) == (0, 100_000)


def test_a_fault_is_reported_whole_where_no_file_can_be_written(shared, tmp_path):
    reader = FaultReader("e")
    run(
        WORKER + "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "for i in range(40):\n"
        "    assert report_fault(Fault(f'k{i}', 'no file of this process may be larger than 20 bytes'), 'e')\n",
        TMPDIR=str(tmp_path / "absent"),
    )
    assert [fault.key for fault in reader.new()] == [f"k{i}" for i in range(40)]


def test_a_report_that_cannot_be_read_is_a_fault_of_everything(shared):
    reader = FaultReader("e")
    (area,) = shared.areas(FAULTS)
    for number in range(3):
        report_fault(Fault(f"k{number}", "m"), "e")
    place = area.start + FAULTS.slot_bytes + 17
    shared.memory[place] ^= 1
    found = reader.new()
    assert found[:3] == [Fault("k0", "m"), Fault("k2", "m"), LOST]
    assert [fault.key for fault in found[3:]] == [ALL_ITEMS]
    report_fault(Fault("later", "m"), "e")
    assert reader.new() == [Fault("later", "m")]


def test_more_reports_than_there_is_room_for_are_a_fault_of_everything(shared):
    reader = FaultReader("e")
    for number in range(FAULTS.slots):
        report_fault(Fault(f"k{number}", "m"), "e")
    assert len(reader.new()) == FAULTS.slots
    for number in range(FAULTS.slots + 1):
        report_fault(Fault(f"k{number}", "m"), "e")
    found = reader.new()
    assert found[0] == Fault("k1", "m")
    assert found[-2] is LOST
    assert found[-1].key == ALL_ITEMS


def test_what_an_earlier_engine_left_is_not_read(shared):
    reader = FaultReader("e")
    report_fault(Fault("old", "of an engine that has ended"), "e")
    reader.close()
    reader = FaultReader("e")
    assert reader.new() == []
    report_fault(Fault("new", "m"), "e")
    assert reader.new() == [Fault("new", "m")]


def test_the_place_of_a_killed_engine_is_used_again(shared):
    run(
        "import os, signal\n"
        "from visionaccel.integrations.vllm.shared_memory import FaultReader\n"
        "reader = FaultReader('e')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        check=False,
    )
    (area,) = shared.areas(FAULTS)
    assert area.ended
    reader = FaultReader("e")
    assert reader.new() == []
    assert [area.owner for area in shared.areas(FAULTS)] == [os.getpid()]


def test_each_engine_of_a_server_reads_its_own_workers_alone(shared):
    reader = FaultReader("e")
    worker = WORKER + 'assert report_fault(Fault("k", "m"), "e")'
    code = (
        "import subprocess, sys\n"
        "from visionaccel.integrations.vllm.shared_memory import FaultReader\n"
        "reader = FaultReader('e')\n"
        f"subprocess.run([sys.executable, '-c', {worker!r}])\n"
        "print([fault.key for fault in reader.new()])\n"
    )
    assert run(code) == "['k']\n"
    assert reader.new() == []


def test_engines_of_one_process_read_their_own_workers_alone(shared):
    policy, reference = FaultReader("policy"), FaultReader("reference")
    assert report_fault(Fault(REPLACED, "new weights"), "policy")
    assert report_fault(Fault("k", "m"), "reference")
    assert [fault.key for fault in policy.new()] == [REPLACED]
    assert [fault.key for fault in reference.new()] == ["k"]
    policy.close()
    assert not report_fault(Fault("k", "m"), "policy")
    assert report_fault(Fault("last", "m"), "reference")
    assert [fault.key for fault in reference.new()] == ["last"]


def test_engines_of_one_process_are_told_apart_by_a_worker_process_too(shared):
    readers = {name: FaultReader(name) for name in ("policy", "reference")}
    run(WORKER + "assert report_fault(Fault('k', 'm'), 'reference')")
    assert {name: len(reader.new()) for name, reader in readers.items()} == {"policy": 0, "reference": 1}


def test_a_second_reader_of_one_engine_is_refused_until_the_first_has_ended(shared):
    reader = FaultReader("e")
    with pytest.raises(ConfigurationError, match="two engines of process"):
        FaultReader("e")
    del reader  # an engine that was given up without a shutdown
    assert FaultReader("e").new() == []


def test_more_engines_than_there_is_room_for_are_refused(shared):
    for index in range(FAULTS.areas):
        Area(shared, FAULTS, index).give_to(os.getppid())
    with pytest.raises(ConfigurationError, match="all 64 slots for the faults"):
        FaultReader("e")


def test_of_processes_with_the_same_number_the_last_is_the_one_that_runs(shared):
    areas = [shared.claim(METRICS) for _ in range(2)]
    assert [area.ended for area in areas] == [True, False]


def _report_from_a_fork():
    assert report_fault(Fault("k", "from a fork"), "e")


def test_a_fork_does_not_wait_for_a_lock_that_its_parent_held(shared):
    reader = FaultReader("e")
    with shared.alone(FAULTS.start, 1):
        fork = multiprocessing.get_context("fork").Process(target=_report_from_a_fork)
        fork.start()
        fork.join(20)
        fork.kill()
    fork.join()
    assert fork.exitcode == 0
    assert reader.new() == [Fault("k", "from a fork")]


def test_memory_is_not_inherited_by_another_launcher_unless_it_asks(shared):
    named = os.environ[MEMORY]
    make_shared_memory()
    assert os.environ[MEMORY] == named
    code = (
        "import os\nfrom visionaccel.integrations.vllm.shared_memory import make_shared_memory\n"
        "make_shared_memory({})\nprint(os.environ['{}'])"
    )
    other = run(code.format("", MEMORY)).strip()
    assert other
    assert other != named
    assert run(code.format("inherit=True", MEMORY)).strip() == named
    os.environ[MEMORY] = other
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        shared_memory()


def test_memory_of_another_process_with_the_same_number_is_refused(shared, monkeypatch):
    owner, _, device, inode = os.environ[MEMORY].split(":")
    with Path("/dev/zero").open("rb") as other:
        monkeypatch.setenv(MEMORY, f"{owner}:{other.fileno()}:{device}:{inode}")
        with pytest.raises(ConfigurationError, match="does not hold it"):
            shared_memory()


def test_memory_that_the_system_does_not_give_refuses_the_start(monkeypatch):
    monkeypatch.setenv(MEMORY, "")

    def refuse(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ConfigurationError, match="cannot be created: Operation not permitted"):
        make_shared_memory()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "stopped"])
def test_a_launcher_that_ends_leaves_no_file_and_its_processes_go_on_without_a_warning(tmp_path, end):
    worker = WORKER + (
        "import sys, time\n"
        "from visionaccel.integrations.vllm.shared_memory import FaultReader\n"
        "from visionaccel.integrations.vllm.published_metrics import publish\n"
        "metrics = publish()\n"
        "reader = FaultReader('e')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "metrics.processed(1.0)\n"
        "assert report_fault(Fault('k', 'm'), 'e')\n"
        "print(reader.new()[0].key, flush=True)\n"
        "time.sleep(1.5)\n"
        "print('the end', flush=True)\n"
    )
    launcher = (
        "import signal, subprocess, sys, time\n"
        "from visionaccel.integrations.vllm.shared_memory import make_shared_memory\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a job in the background ignores
        "make_shared_memory()\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    temporary, log = tmp_path / "temporary", tmp_path / "log"
    temporary.mkdir()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", launcher],
            env=os.environ | {"TMPDIR": str(temporary), MEMORY: ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process.stdin, process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(end)
        process.wait()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "k\n"
        assert process.stdout.readline() == "the end\n"
    assert list(temporary.iterdir()) == []
    assert "metrics" not in log.read_text()


def test_keys_depend_on_pixels_and_grid_and_on_nothing_else():
    pixels = np.arange(32, dtype=np.float32).reshape(8, 4)
    key = item_key(pixels, Grid(1, 2, 4))
    assert key == item_key(torch.from_numpy(pixels.copy()), Grid(1, 2, 4))
    assert key == item_key(np.asfortranarray(pixels), Grid(1, 2, 4))
    assert key != item_key(pixels, Grid(1, 4, 2))
    assert key != item_key(pixels + 1, Grid(1, 2, 4))
    bfloat = torch.from_numpy(pixels.copy()).bfloat16()
    assert item_key(bfloat, Grid(1, 2, 4)) == item_key(bfloat.clone(), Grid(1, 2, 4))
