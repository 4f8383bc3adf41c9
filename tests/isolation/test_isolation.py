"""Devices in processes of their own: what dies there costs the call in flight, and nothing outlives its parent."""

import contextlib
import gc
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fake_plugins import install
from gated import wait_until
from processes import has_ended
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.backends import Registry
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import CHECKPOINT, ONNX, FixedGrid, Program
from visionaccel.encoder import OpenProgram, open_tower
from visionaccel.encoder.encoder import close_programs
from visionaccel.errors import ConfigurationError, DeviceError, DeviceLostError, InputError, SettingsError
from visionaccel.isolation import IsolatedSession, Limits, process
from visionaccel.isolation.messages import OpenRequest, packed
from visionaccel.isolation.process import DeviceProcess
from visionaccel.isolation.shared_arrays import SharedArrays
from visionaccel.trust import ChainLink, GuardedEncoder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="devices live in processes of their own on Linux only")

TRICKS = '''
import ctypes, logging, os, sys, time
from pathlib import Path
import numpy as np
from visionaccel.backends import Accepted, Capabilities, Options, Session, VisionBackend, hookimpl
from visionaccel.errors import ConfigurationError, DeviceError, InputError

class OwnError(DeviceError):
    pass

def do(trick):
    if trick == "abort":
        print("about to abort", flush=True)
        os.abort()
    elif trick == "exit":
        os._exit(3)
    elif trick == "quit":
        sys.exit(4)
    elif trick == "segfault":
        ctypes.string_at(0)
    elif trick == "hang":
        time.sleep(100)
    elif trick == "hang in C":
        ctypes.PyDLL(None).sleep(100)
    elif trick == "raise":
        raise OSError("the device went away")
    elif trick == "wrong input":
        raise InputError("this is no picture.", hint="Send another.")
    elif trick == "own error":
        raise OwnError("of the plug-in.", hint="Ask its author.")
    elif trick == "configuration":
        raise ConfigurationError("no driver.", hint="Install one.")
    elif trick == "fork and abort":
        if os.fork() == 0:
            time.sleep(100)
        os.abort()
    elif trick == "talk":
        print("from Python")
        print("to stderr", file=sys.stderr)
        os.write(1, b"half a line")
        os.write(1, b" and its end\\n")
        ctypes.CDLL(None).puts(b"from C")
        logging.getLogger("vendor.sdk").warning("%d degrees", 90, extra={"core": 3})
        logging.getLogger("vendor.sdk").debug("chatter")
        try:
            1 / 0
        except ZeroDivisionError:
            logging.getLogger("vendor.sdk").exception("oops")
    elif trick == "objects":
        return {"x": np.array([object()])}
    elif trick:
        raise AssertionError(trick)

class TricksOptions(Options):
    folder: Path
    polite: bool = True

class TricksSession(Session):
    def __init__(self, folder, polite, device):
        self.folder, self.polite, self.buffer = folder, polite, {}
        self.capabilities = Capabilities(device=device, precision="float32", thread_safe=True, takes_tensors=True)

    def run(self, inputs):
        tell(self.folder, "run")
        made = do(take(self.folder / "run"))
        if made:
            return made
        if "pixel_values" in inputs:
            return {"embeddings": np.tile(np.arange(7, 31, dtype="float32"), (len(inputs["pixel_values"]) // 4, 1))}
        for name, array in inputs.items():
            if name not in self.buffer or self.buffer[name].shape != array.shape:
                self.buffer[name] = np.empty_like(array)
            self.buffer[name][...] = array
        return self.buffer

    def close(self):
        if not self.polite:
            time.sleep(100)
        tell(self.folder, "close")

def take(path):
    """The first of the tricks that a file lists; the rest stay."""
    if not path.exists():
        return ""
    first, _, rest = path.read_text().partition(",")
    path.write_text(rest) if rest else path.unlink()
    return first

def tell(folder, what):
    with (folder / "events").open("a") as file:
        file.write(f"{what} {os.getpid()}\\n")

class Tricks(VisionBackend):
    name = "tricks"
    formats = frozenset({"checkpoint"})
    options = TricksOptions
    isolation = "process"
    def probe(self, program, device):
        return Accepted(1)
    def open(self, program, device, options):
        tell(options.folder, "open")
        trick = take(options.folder / "open")
        if trick.startswith("device="):
            device = trick.removeprefix("device=")
        else:
            do(trick)
        return TricksSession(options.folder, options.polite, device or "nowhere")

@hookimpl
def visionaccel_backends():
    return [Tricks]
'''

PROGRAM = Program(
    name="any", family="any", format=CHECKPOINT, folder=Path("/"), inputs=(), outputs=(), weights={},
    uniform_frames=False,
)  # fmt: skip
QUICK = Limits(run=20, opening=60, closing=5, first_delay=1.0, longest_delay=2.0)
X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
DEADLY = {
    "abort": "was ended by SIGABRT",
    "exit": "ended with status 3",
    "quit": "ended with status 4",
    "segfault": "was ended by SIGSEGV",
}


class Device:
    """Opens sessions of the trick backend, and tells it what to do wrong."""

    def __init__(self, folder):
        self.folder = folder
        self.options = {"folder": folder}
        self.opened = []

    def open(self, limits=QUICK, device=None, **options):
        session = IsolatedSession("tricks", PROGRAM, device, {**self.options, **options}, limits=limits)
        self.opened.append(session)
        return session

    def will(self, *tricks, at="run"):
        (self.folder / at).write_text(",".join(tricks))

    def events(self, what):
        path = self.folder / "events"
        words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [int(pid) for event, pid in words if event == what]

    def wait_for(self, what, count=1):
        wait_until(lambda: len(self.events(what)) >= count)
        return self.events(what)[-1]


@pytest.fixture
def device(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "site", "acme-tricks", "tricks", TRICKS))
    device = Device(tmp_path)
    yield device
    for session in device.opened:
        session.close()


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def runs(session):
    same(session.run(X), X)


# Answers


@pytest.mark.parametrize("dtype", ["float32", ">f8", "float16", ml_dtypes.bfloat16, "int64", "uint8", "bool", "c8"])
def test_arrays_of_every_dtype_order_and_size_come_back_as_they_were(device, dtype):
    session = device.open()
    whole = np.arange(24).reshape(4, 6).astype(dtype)
    given = {"whole": whole, "none": whole[:0], "one": whole[1, 2], "columns": whole[:, ::2], "turned": whole.T}
    same(session.run(given), {name: np.asarray(array) for name, array in given.items()})


def test_the_memory_grows_and_stays_for_smaller_calls(device):
    session = device.open()
    rng = np.random.default_rng(0)
    for rows in (1, 5000, 3, 40000, 40001, 0, 7):
        given = {"a": rng.standard_normal((rows, 13)), "b": rng.integers(0, 9, (rows + 1,), dtype=np.int32)}
        same(session.run(given), given)


def test_answers_belong_to_the_caller_although_the_backend_uses_its_buffer_again(device):
    session = device.open()
    first = session.run(X)["x"]
    kept = first.copy()
    second = session.run({"x": X["x"] + 1})["x"]
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)
    first[:] = 0
    np.testing.assert_array_equal(second, X["x"] + 1)


def test_input_may_be_read_only(device):
    array = X["x"].copy()
    array.flags.writeable = False
    same(device.open().run({"x": array}), X)


def test_a_session_says_what_the_child_is_but_takes_arrays_one_call_at_a_time(device):
    capabilities = device.open(device="npu").capabilities
    assert (capabilities.device, capabilities.precision) == ("npu", "float32")
    assert not capabilities.thread_safe
    assert not capabilities.takes_tensors


def test_threads_may_share_a_session_all_the_same(device):
    session = device.open()
    given = [{"x": np.full((100 * i, 3), i, np.float32)} for i in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(session.run, given), given, strict=True):
            same(got, expected)


@pytest.mark.parametrize("backend", ["onnxrt", "torch_ref"])
def test_real_backends_answer_the_same_in_a_process_of_their_own(tiny, backend):
    grids = [(1, 6, 10), (2, 4, 4)]
    patches = random_patches(grids)
    with (
        open_encoder(tiny, backend=backend, isolation="process") as apart,
        open_encoder(tiny, backend=backend, isolation="none") as here,
    ):
        assert isinstance(apart.programs[0].session, IsolatedSession)
        assert not isinstance(here.programs[0].session, IsolatedSession)
        np.testing.assert_allclose(apart.encode(patches, grids), here.encode(patches, grids), rtol=0, atol=1e-6)


def test_programs_of_a_bundle_run_in_a_process_each(tiny, tmp_path):
    requests = [ProgramRequest(FixedGrid(Grid(1, 4, side))) for side in (4, 6)]
    bundle = export_bundle(open_tower(tiny), tmp_path / "bundle", requests)
    grids = [(1, 4, 6), (1, 4, 4)]
    patches = random_patches(grids)
    with (
        open_encoder(bundle, backend="onnxrt", isolation="process") as apart,
        open_encoder(bundle, backend="onnxrt") as here,
    ):
        assert len({opened.session.pid for opened in apart.programs}) == 2
        np.testing.assert_allclose(apart.encode(patches, grids), here.encode(patches, grids), rtol=0, atol=1e-6)


# What goes wrong in the child


@pytest.mark.parametrize(("trick", "fate"), DEADLY.items(), ids=DEADLY)
def test_a_death_fails_the_call_in_flight_and_the_next_one_works(device, trick, fate, monkeypatch):
    for limit in ("_LINGERING", "_REAPING"):  # dying takes longer where the machine is busy
        monkeypatch.setattr(process, limit, 20.0)
    session = device.open()
    runs(session)
    former = session.pid
    device.will(trick)
    with pytest.raises(DeviceLostError, match=fate) as caught:
        session.run(X)
    assert "VISIONACCEL_FALLBACK" in caught.value.hint
    runs(session)
    assert session.pid != former
    assert session.restarts == 1
    assert has_ended(former)


def test_the_error_quotes_the_last_output_with_the_stack(device):
    session = device.open()
    device.will("abort")
    with pytest.raises(DeviceLostError) as caught:
        session.run(X)
    assert "about to abort" in str(caught.value)
    assert "acme_tricks.py" in str(caught.value)


def test_a_kill_from_outside_during_a_call_fails_that_call(device):
    session = device.open()
    device.will("hang")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.run, X)
        os.kill(device.wait_for("run"), signal.SIGKILL)
        with pytest.raises(DeviceLostError, match="SIGKILL"):
            running.result()
    runs(session)


def test_a_kill_from_outside_between_calls_fails_none(device):
    session = device.open()
    former = session.pid
    os.kill(former, signal.SIGKILL)
    wait_until(lambda: session.restarts == 1)
    runs(session)
    assert session.pid != former


@pytest.mark.parametrize("trick", ["hang", "hang in C"])
def test_a_hang_ends_at_the_deadline_and_the_next_call_works(device, trick):
    session = device.open(Limits(run=1.5))
    former = session.pid
    device.will(trick)
    started = time.monotonic()
    with pytest.raises(DeviceLostError, match=r"did not answer within 1.5 s and was killed") as caught:
        session.run(X)
    assert 1.5 <= time.monotonic() - started < 3
    assert "VISIONACCEL_DEADLINE" in caught.value.hint
    runs(device.open())
    wait_until(lambda: session.restarts == 1 and session.pid is not None)
    runs(session)
    assert has_ended(former)


def test_what_the_child_forked_does_not_hide_its_death_and_dies_too(device):
    session = device.open()
    group = session.pid
    device.will("fork and abort")
    started = time.monotonic()
    with pytest.raises(DeviceLostError, match="SIGABRT"):
        session.run(X)
    assert time.monotonic() - started < 10
    runs(session)
    with pytest.raises(ProcessLookupError):
        wait_until(lambda: os.killpg(group, 0))


def test_an_exception_is_a_device_error_and_the_child_lives_on(device):
    session = device.open()
    former = session.pid
    device.will("raise")
    with pytest.raises(DeviceError, match="'tricks' failed: OSError: the device went away") as caught:
        session.run(X)
    assert not isinstance(caught.value, DeviceLostError)
    assert "acme_tricks.py" in caught.value.__notes__[0]
    runs(session)
    assert session.pid == former


@pytest.mark.parametrize(
    ("trick", "kind", "text"),
    [("wrong input", InputError, "this is no picture. Send another."), ("own error", DeviceError, "of the plug-in.")],
)
def test_errors_of_the_hierarchy_keep_type_message_and_hint(device, trick, kind, text):
    session = device.open()
    former = session.pid
    device.will(trick)
    with pytest.raises(kind) as caught:
        session.run(X)
    assert text in str(caught.value)
    assert not isinstance(caught.value, DeviceLostError)
    runs(session)
    assert session.pid == former


def test_arrays_of_objects_are_refused_on_both_sides(device):
    session = device.open()
    former = session.pid
    with pytest.raises(TypeError, match="'x' has dtype object; only numbers"):
        session.run({"x": np.array([None])})
    device.will("objects")
    with pytest.raises(DeviceError, match="only numbers"):
        session.run(X)
    runs(session)
    assert session.pid == former


def test_a_call_that_comes_after_the_end_writes_into_no_file_that_was_opened_since(device, tmp_path):
    process = DeviceProcess("tricks", packed(OpenRequest("tricks", PROGRAM, None, device.options)))
    process.opened(60)
    same(process.run(X, 20), X)
    numbers = {process._inputs.fd, process._outputs.fd}
    process.kill()
    process.reap()
    with contextlib.ExitStack() as files:
        paths = [tmp_path / f"file{number}" for number in range(max(numbers) + 1)]
        taken = {files.enter_context(path.open("w+b")).fileno() for path in paths}
        assert numbers <= taken
        with pytest.raises(DeviceLostError, match="was ended by SIGKILL") as caught:
            process.run(X, 20)
        process.end(0.1, time.monotonic())
    assert "VISIONACCEL_FALLBACK" in caught.value.hint
    assert {path.read_bytes() for path in paths} == {b""}


def test_shared_memory_is_of_no_use_once_closed(tmp_path):
    memory = SharedArrays.create("test")
    (place,) = memory.write(X)
    number = memory.fd
    memory.close()
    with (tmp_path / "file").open("w+b") as file:
        assert file.fileno() == number
        with pytest.raises(ValueError, match="closed"):
            memory.write(X)
        with pytest.raises(ValueError, match="closed"):
            memory.view(place)
        memory.close()
        file.write(b"still open")
    assert (tmp_path / "file").read_bytes() == b"still open"


def test_a_death_harms_no_other_session(device):
    session, other = device.open(), device.open()
    untouched = other.pid
    device.will("abort")
    with pytest.raises(DeviceLostError):
        session.run(X)
    runs(other)
    assert other.pid == untouched


# Opening


def test_a_refusal_to_open_keeps_its_type_and_leaves_no_process(device):
    device.will("configuration", at="open")
    with pytest.raises(ConfigurationError, match=r"no driver. Install one."):
        device.open()
    assert has_ended(device.wait_for("open"))


def test_an_exception_in_opening_says_what_could_not_be_opened(device):
    device.will("raise", at="open")
    with pytest.raises(
        DeviceError, match="opening program 'any' of any with backend 'tricks' failed with OSError: the device"
    ):
        device.open()


def test_a_backend_that_exits_in_opening_is_an_error_at_once(device):
    device.will("quit", at="open")
    with pytest.raises(DeviceError, match="SystemExit: 4"):
        device.open()
    assert has_ended(device.wait_for("open"))


@pytest.mark.parametrize(
    ("trick", "text"),
    [*((t, text) for t, text in DEADLY.items() if t != "quit"), ("hang in C", "did not open the program within 3 s")],
)
def test_a_child_that_dies_or_hangs_in_opening_is_an_error_at_once(device, trick, text):
    device.will(trick, at="open")
    with pytest.raises(DeviceLostError, match=text) as caught:
        device.open(Limits(opening=3))
    assert ("VISIONACCEL_OPEN_DEADLINE" in caught.value.hint) == (trick == "hang in C")
    assert has_ended(device.wait_for("open"))
    assert len(device.events("open")) == 1


def test_a_program_that_cannot_be_sent_is_refused(device):
    from dataclasses import replace

    with pytest.raises(ConfigurationError, match="'any' cannot be sent to another process"):
        IsolatedSession("tricks", replace(PROGRAM, model=lambda: b""), None, device.options)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e10])
def test_limits_are_times(seconds):
    with pytest.raises(SettingsError, match="not a valid time limit for 'run'"):
        Limits(run=seconds)


# Starting again


def test_delays_double_up_to_the_longest():
    limits = Limits()
    assert [limits.delay(failures) for failures in range(1, 10)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert limits.delay(10_000) == 60


def test_calls_fail_at_once_during_a_delay_and_work_after_it(device):
    session = device.open(Limits(run=20, first_delay=3))
    device.will("abort", "abort")
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="SIGABRT"):
            session.run(X)
    started = time.monotonic()
    error = failure(session)
    assert time.monotonic() - started < 1.5
    assert re.search(r"lost 2 times in a row and restarts in (3\.0|2\.\d) s", str(error))
    assert "SIGABRT" in str(error)
    assert len(device.events("open")) == 2
    wait_until(lambda: failure(session) is None)
    assert time.monotonic() - started > 2
    device.will("abort")
    with pytest.raises(DeviceLostError):
        session.run(X)
    runs(session)  # The success in between did away with the delay.


def failure(session):
    try:
        session.run(X)
    except DeviceLostError as error:
        return error
    return None


def test_failed_restarts_are_repeated_with_delays_until_one_works(device):
    session = device.open(Limits(run=20, first_delay=0.3))
    device.will("abort", "configuration", "", at="open")
    (device.folder / "run").write_text("abort")
    with pytest.raises(DeviceLostError, match="SIGABRT"):
        session.run(X)
    wait_until(lambda: session.restarts == 1)
    assert len(device.events("open")) == 4
    runs(session)


def test_a_call_waits_for_a_restart_only_as_long_as_a_call_may_take(device):
    session = device.open(Limits(run=1.0))
    device.will("hang", at="open")
    device.will("abort")
    with pytest.raises(DeviceLostError):
        session.run(X)
    with pytest.raises(DeviceLostError, match="has been starting for 1 s"):
        session.run(X)
    started = time.monotonic()
    with pytest.raises(DeviceLostError, match="has been starting"):
        session.run(X)
    assert time.monotonic() - started < 0.2


def test_another_device_after_a_restart_is_not_accepted(device):
    session = device.open(Limits(run=20, first_delay=1.0))
    device.will("device=simulator", at="open")
    device.will("abort")
    with pytest.raises(DeviceLostError):
        session.run(X)
    with pytest.raises(DeviceLostError, match=r"after a restart, the device is .*simulator"):
        session.run(X)
    wait_until(lambda: failure(session) is None)
    assert session.capabilities.device == "nowhere"


# The end


def test_closing_lets_the_backend_close_and_later_calls_say_so(device):
    session = device.open()
    child = session.pid
    session.close()
    session.close()
    assert device.events("close") == [child]
    assert has_ended(child)
    with pytest.raises(DeviceError, match="closed"):
        session.run(X)


def test_a_backend_that_does_not_close_is_killed(device, caplog):
    session = device.open(Limits(closing=0.5), polite=False)
    child = session.pid
    started = time.monotonic()
    session.close()
    assert time.monotonic() - started < 3
    assert has_ended(child)
    assert "did not close within 0.5 s" in caplog.text


def test_the_programs_of_an_encoder_end_side_by_side(device):
    sessions = [device.open(Limits(closing=2), polite=False) for _ in range(3)]
    children = [session.pid for session in sessions]
    started = time.monotonic()
    close_programs(OpenProgram(PROGRAM, None, session) for session in sessions)
    assert 2 <= time.monotonic() - started < 4
    assert all(map(has_ended, children))


@pytest.mark.parametrize("trick", ["hang", "hang in C"])
def test_closing_during_a_hang_ends_both_promptly(device, trick):
    session = device.open()
    child = session.pid
    device.will(trick)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.run, X)
        device.wait_for("run")
        started = time.monotonic()
        session.close()
        with pytest.raises(DeviceLostError, match="closed during the call"):
            running.result()
        assert time.monotonic() - started < 3
    assert has_ended(child)


def test_closing_while_a_restart_hangs_ends_it_promptly(device):
    session = device.open()
    device.will("hang in C", at="open")
    os.kill(session.pid, signal.SIGKILL)
    child = device.wait_for("open", 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session.run, X)
        time.sleep(0.1)
        started = time.monotonic()
        session.close()
        with pytest.raises(DeviceError, match="closed"):
            waiting.result()
    assert time.monotonic() - started < 3
    assert has_ended(child)


def test_closing_during_a_delay_is_prompt(device):
    session = device.open(Limits(first_delay=50))
    device.will("abort", "abort")
    for _ in range(2):
        with pytest.raises(DeviceLostError):
            session.run(X)
    started = time.monotonic()
    session.close()
    assert time.monotonic() - started < 3
    assert len(device.events("open")) == 2


def test_a_session_that_is_dropped_gives_back_its_device(device):
    session = device.open()
    child = session.pid
    device.opened.clear()
    del session
    gc.collect()
    wait_until(lambda: has_ended(child))
    assert device.events("close") == [child]


def test_nothing_is_left_of_sessions_that_were_closed_or_lost(device):
    def held():
        gc.collect()
        children = [child for own in Path("/proc/self/task").glob("*/children") for child in own.read_text().split()]
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(children)

    def cycle(trick):
        session = device.open()
        device.opened.clear()
        if trick:
            device.will(trick)
            failure(session)
        runs(session)
        session.close()

    cycle("")
    before = held()
    for trick in ("", "abort", "", "exit", "", ""):
        cycle(trick)
    device.will("configuration", at="open")
    with pytest.raises(ConfigurationError):
        device.open()
    assert held() == before


# Parents

PARENT = """
import sys, threading
from pathlib import Path
import numpy as np
from visionaccel.isolation import IsolatedSession
from visionaccel.core.program import CHECKPOINT, Program

sys.path.insert(0, sys.argv[1])
program = Program(name="any", family="any", format=CHECKPOINT, folder=Path("/"), inputs=(), outputs=(),
                  weights={}, uniform_frames=False)

def open_here():
    global session
    session = IsolatedSession("tricks", program, None, {"folder": sys.argv[2]})

thread = threading.Thread(target=open_here)  # The child outlives the thread that opened it.
thread.start()
thread.join()
print(session.run({"x": np.ones(3)})["x"].sum(), session.pid, flush=True)
if sys.argv[3]:
    Path(sys.argv[2], "run").write_text(sys.argv[3])
    session.run({"x": np.ones(3)})
"""


@contextlib.contextmanager
def parent(device, trick=""):
    """A script without a __main__ guard that opens a session, prints the child, and calls it once more for a trick."""
    script = device.folder / "script.py"
    script.write_text(PARENT)
    command = [sys.executable, script, device.folder / "site", device.folder, trick]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        answer, child = process.stdout.readline().split()
        assert answer == "3.0"
        yield process, int(child)
        process.kill()


@pytest.mark.parametrize("trick", ["hang", "hang in C"])
def test_a_child_dies_with_a_killed_parent_even_if_it_hangs(device, trick):
    with parent(device, trick) as (process, child):
        device.wait_for("run", 2)
        assert not has_ended(child)
        process.kill()
        process.wait()
        wait_until(lambda: has_ended(child), 5)


def test_a_script_without_a_guard_may_end_without_closing(device):
    with parent(device) as (process, child):
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
        wait_until(lambda: has_ended(child), 5)
    assert device.events("close") == [child]


def test_an_interrupt_of_the_terminal_does_not_reach_the_child(device):
    session = device.open()
    assert os.getpgid(session.pid) == session.pid != os.getpgrp()
    os.kill(session.pid, signal.SIGINT)
    runs(session)
    assert session.restarts == 0


def test_the_child_shares_the_processor_with_this_session(device):
    """Linux gives each session its share, and a child in a separate one may get none next to a busy engine."""
    session = device.open()
    assert os.getsid(session.pid) == os.getsid(0)


def run_in_daemon(folder, results):
    with contextlib.suppress(Exception):
        session = IsolatedSession("tricks", PROGRAM, None, {"folder": folder})
        results.send(float(session.run({"x": np.ones(3)})["x"].sum()))
        session.close()


def test_it_works_in_a_daemonic_process_which_may_have_no_children_of_its_own_kind(device):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_in_daemon, args=(device.folder, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == 3.0
    process.join(20)
    assert process.exitcode == 0
    process.close()
    ours.close()
    theirs.close()


def test_a_fork_of_the_parent_can_neither_use_nor_close_the_device(device):
    session = device.open()
    child = session.pid
    pid = os.fork()
    if pid == 0:  # Nothing may be raised here: pytest would go on twice.
        status = 1
        with contextlib.suppress(BaseException):
            with contextlib.suppress(DeviceError):
                session.run(X)
                os._exit(2)
            session.close()
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    runs(session)
    assert session.pid == child


def test_a_fork_of_a_parent_that_closes_the_device_does_not_close_it_too(device):
    session = device.open(polite=False)
    child = session.pid
    session.begin_close()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            session.close()
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.2)
    assert not has_ended(child)


# What it says


def test_output_and_records_arrive_in_logging_and_nowhere_else(device, capfd, caplog):
    with caplog.at_level(logging.INFO):
        session = device.open()
        device.will("talk")
        runs(session)
        session.close()
    printed = [r.getMessage() for r in caplog.records if r.name == "visionaccel.device.tricks"]
    assert sorted(printed) == ["from C", "from Python", "half a line and its end", "to stderr"]
    warning, error = (record for record in caplog.records if record.name == "vendor.sdk")
    assert (warning.levelname, warning.getMessage(), warning.funcName) == ("WARNING", "90 degrees", "do")
    assert error.levelname == "ERROR"
    assert "ZeroDivisionError" in error.getMessage()
    assert warning.process == device.events("open")[0]
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_child_imports_no_framework(device):
    session = device.open()
    maps = Path(f"/proc/{session.pid}/maps").read_text()
    assert "numpy" in maps
    # By their modules: vLLM puts a library of its own into LD_PRELOAD, which children inherit.
    modules = ("libtorch_python", "onnx_cpp2py_export", "onnxruntime_pybind11_state", "/vllm/_C")
    assert not [name for name in modules if name in maps]


# Encoders


def encoder_of(device, tiny, **arguments):
    return open_encoder(tiny, backend="tricks", options=device.options, registry=Registry(), **arguments)


def test_isolation_is_the_backends_choice_unless_the_user_says_otherwise(device, tiny):
    patches = random_patches([(1, 4, 4)])
    for isolation, elsewhere in (("auto", True), ("process", True), ("none", False)):
        with encoder_of(device, tiny, isolation=isolation) as encoder:
            assert (encoder.encode(patches, [(1, 4, 4)])[:, 0] == 7).all()
        assert (device.events("run")[-1] != os.getpid()) == elsewhere


def test_the_deadline_reaches_the_device(device, tiny):
    with encoder_of(device, tiny, deadline=1.0) as encoder:
        device.will("hang")
        with pytest.raises(DeviceLostError, match="within 1 s"):
            encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])


def test_the_deadline_of_opening_reaches_the_device(device, tiny):
    for seconds in (2, 8, 32):  # where the machine is busy, a process may not have come to the opening in the first
        device.will("hang", at="open")
        with pytest.raises(DeviceLostError, match=f"did not open the program within {seconds} s"):
            encoder_of(device, tiny, open_deadline=float(seconds))
        if device.events("open"):
            break
    assert has_ended(device.wait_for("open"))


@pytest.mark.parametrize("isolation", ["proces", "Process", "", "thread"])
def test_an_isolation_that_there_is_not_is_refused(device, tiny, isolation):
    with pytest.raises(SettingsError, match=f"unknown isolation '{isolation}'. Choose auto, process or none"):
        encoder_of(device, tiny, isolation=isolation)
    assert device.events("open") == []


def test_a_fallback_takes_over_while_the_device_is_down_and_the_device_after_it(device, tiny):
    grids = [(1, 4, 4)]
    patches = random_patches(grids)
    with encoder_of(device, tiny) as primary, open_encoder(tiny, backend="onnxrt") as second:
        exact = second.encode(patches, grids)
        guarded = GuardedEncoder(primary, [ChainLink("second", second)])
        device.will("abort", "abort")
        for _ in range(3):  # killed, killed again, in the delay
            (answer,) = guarded.encode_items(patches, grids)
            np.testing.assert_array_equal(answer.rows, exact)
        assert (guarded.fallback_items, guarded.failed_items) == (3, 0)
        wait_until(lambda: primary.programs[0].session.pid is not None)
        (answer,) = guarded.encode_items(patches, grids)
        assert (answer.rows[:, 0] == 7).all()
        assert guarded.fallback_items == 3


def test_a_lost_device_fails_only_what_was_in_flight_in_one_call_of_many(device, tiny):
    grids = [(1, 4, 4), (1, 4, 6)]
    with encoder_of(device, tiny) as primary:
        guarded = GuardedEncoder(primary)
        device.will("abort")
        answers = guarded.encode_items(random_patches(grids), grids)
        assert [(answer.rows[:, 0] == 7).all() for answer in answers] == [True, True]
        assert guarded.failed_items == 0


def test_onnx_programs_survive_the_way_to_a_child(tiny):
    import pickle

    (program,) = open_tower(tiny).programs([ONNX])
    sent = pickle.dumps(program)
    assert len(sent) < 100_000
    arrived = pickle.loads(sent)
    assert arrived == program
    assert arrived.model() == program.model()


def test_ending_calls_leaves_a_process_without_a_call_alone(device):
    session = device.open()
    runs(session)
    pid = session.pid
    assert not session.end_calls()
    runs(session)
    assert (session.pid, session.restarts) == (pid, 0)


def test_ending_calls_ends_the_wait_for_a_restart(device):
    session = device.open(Limits(run=60))
    device.will("hang", at="open")
    device.will("abort")
    with pytest.raises(DeviceLostError):
        session.run(X)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session.run, X)
        wait_until(session.end_calls)
        with pytest.raises(DeviceLostError, match=r"has been starting for .* is not ready"):
            waiting.result(10)
