"""What a device's process sends is taken for numbers, texts and errors; a process that sends anything else is ended."""

import base64
import contextlib
import json
import os
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_isolation import QUICK, TRICKS, Device, X, runs, same

from fake_plugins import install
from mutations import damage, damaged, mutations
from visionaccel import errors
from visionaccel.backends import Capabilities
from visionaccel.errors import DeviceError, DeviceLostError, InputError, UnfitGridError
from visionaccel.isolation import Limits
from visionaccel.isolation.messages import MOST_BYTES, Failure, Opened, Places, decoded, encoded, failure_of, restored
from visionaccel.isolation.shared_arrays import ArrayPlace, SharedArrays

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="devices live in processes of their own on Linux only")

DTYPES = ["float32", "float16", "float64", "int8", "uint8", "int64", "bool", "complex64", ">f4"]
PLACES = Places(tuple(ArrayPlace(name, np.dtype(name), (2, 3), 64) for name in DTYPES))


@pytest.mark.parametrize(
    "answer",
    [
        Opened(Capabilities("npu", "bfloat16", deterministic=False, batch_patches=7, simulated=True)),
        PLACES,
        Places((ArrayPlace("x", np.dtype(ml_dtypes.bfloat16), (), 0),)),
        Places(()),
        failure_of(UnfitGridError("no program.", hint="Fit it."), "a trace"),
    ],
)
def test_answers_arrive_as_they_were_sent(answer):
    assert decoded(encoded(answer)) == answer


def test_capabilities_of_a_backends_subclass_arrive_as_the_contracts():
    @dataclass(frozen=True)
    class More(Capabilities):
        watts: float = 5.0

    assert decoded(encoded(Opened(More("npu", "int8")))) == Opened(Capabilities("npu", "int8"))


def test_errors_arrive_with_their_type_message_hint_and_trace():
    error = restored(decoded(encoded(failure_of(UnfitGridError("no \udcff program.", hint="Fit it."), "at line 3"))))
    assert type(error) is UnfitGridError
    assert (error.message, error.hint) == ("no ? program.", "Fit it.")
    assert error.__notes__ == ["In the device's process:\nat line 3"]


def test_an_error_of_a_class_that_is_not_loaded_arrives_as_its_nearest_base():
    kind = type("Own", (InputError,), {"__module__": "a_vendor_that_is_not_here"})
    assert type(restored(failure_of(kind("no."), ""))) is InputError


@pytest.mark.parametrize(
    "kind", ["os:system", "builtins:eval", "visionaccel.errors:_rebuild", "builtins:Exception", "nowhere:X", "", "os"]
)
def test_a_name_of_something_else_than_an_error_of_ours_makes_nothing(kind):
    found = restored(Failure((kind,), "touch /tmp/never", None, ""))
    assert type(found) is DeviceError


def test_a_module_whose_import_is_blocked_has_no_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "blocked_here", None)
    assert type(restored(Failure(("blocked_here:X",), "no.", None, ""))) is DeviceError


def test_every_error_of_this_package_can_be_sent():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert type(restored(decoded(encoded(failure_of(kind("a.", hint="b."), ""))))) is kind


@pytest.mark.parametrize("dtype", ["O", "|O", "object", "V8", "M8[s]", "S8", "f3", "f1", "i32", "u1,O", "finfo", "V"])
def test_a_dtype_of_anything_but_numbers_is_no_answer(dtype):
    place = {"name": "x", "dtype": dtype, "shape": [1], "offset": 0}
    with pytest.raises(ValueError, match="dtype"):
        decoded(json.dumps({"arrays": [place]}).encode())


@pytest.mark.parametrize(
    "changes",
    [{"shape": ["1"]}, {"shape": [1.0]}, {"shape": [True]}, {"offset": "0"}, {"offset": -1}, {"more": 1}],
    ids=str,
)
def test_a_place_of_anything_but_whole_numbers_is_no_answer(changes):
    place = {"name": "x", "dtype": "f4", "shape": [1], "offset": 0, **changes}
    with pytest.raises(ValueError, match="arrays"):
        decoded(json.dumps({"arrays": [place]}).encode())


@pytest.mark.parametrize("more", [{"writing_seconds": "1"}, {"kinds": []}, {"message": "no."}], ids=str)
def test_places_with_anything_else_are_no_answer(more):
    with pytest.raises(ValueError, match="validation error"):
        decoded(json.dumps({"arrays": [], **more}).encode())


@pytest.mark.parametrize("dtype", ["M8[s]", "O", "S3", "i4,f4"])
def test_arrays_of_anything_but_numbers_are_not_sent(dtype):
    memory = SharedArrays.create("test")
    with contextlib.closing(memory), pytest.raises(TypeError, match="only numbers"):
        memory.write({"x": np.zeros(3, dtype)})


SENT = [
    encoded(PLACES),
    encoded(Opened(Capabilities("cpu", "float32"))),
    encoded(failure_of(InputError("no."), "here")),
]


@given(st.sampled_from(SENT).flatmap(lambda sent: mutations(json.loads(sent)).map(lambda d: json.dumps(d).encode())))
def test_a_changed_answer_is_an_answer_or_none(data):
    try:
        answer = decoded(data)
    except ValueError:
        return
    assert isinstance(answer, Opened | Places | Failure)
    if isinstance(answer, Places):
        assert all(not place.dtype.hasobject and min(place.shape, default=0) >= 0 for place in answer.arrays)


@given(st.binary(max_size=200) | damage(len(SENT[0]) - 1).map(lambda how: damaged(SENT[0], *how)))
def test_any_bytes_are_an_answer_or_none(data):
    try:
        decoded(data)
    except ValueError:
        return


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return os.mkdir, (str(self._file),)


HOSTILE = TRICKS.replace(
    '    elif trick == "objects":',
    """    elif trick.startswith("send "):
        import base64
        os.write(int(sys.argv[2]), base64.b64decode(trick.removeprefix("send ")))
        time.sleep(100)
    elif trick == "enlarge":
        for fd in sys.argv[3:5]:
            os.ftruncate(int(fd), 2**62)
    elif trick == "seal":
        import fcntl
        fcntl.fcntl(int(sys.argv[3]), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    elif trick == "log on":
        while True:
            os.write(int(sys.argv[5]), b"x" * 65536)
    elif trick == "objects":""",
)


@pytest.fixture
def device(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "site", "acme-tricks", "tricks", HOSTILE))
    device = Device(tmp_path)
    yield device
    for session in device.opened:
        session.close()


def framed(data, length=None):
    """A message as `multiprocessing` sends it: its length before it."""
    return (len(data) if length is None else length).to_bytes(4, "big", signed=True) + data


def will_send(device, data):
    device.will("send " + base64.b64encode(data).decode())


OBJECTS = json.dumps({"arrays": [{"name": "x", "dtype": "|O", "shape": [1], "offset": 0}]}).encode()


@pytest.mark.parametrize(
    "data",
    [
        framed(b"{}"), framed(b"\x80\x05."), framed(OBJECTS), framed(b"", MOST_BYTES + 1), framed(b"", 2**31 - 1),
        framed(b"half", 100), b"\xff\xff\xff\xff" + (2**62).to_bytes(8, "big"),
    ],
    ids=["empty", "pickle", "pointers", "too long", "longest", "cut off", "longer than memory"],
)  # fmt: skip
def test_a_process_that_sends_no_answer_is_ended_and_started_anew(device, data, caplog):
    session = device.open()
    former = session.pid
    will_send(device, data)
    started = time.monotonic()
    with pytest.raises(DeviceLostError, match="was ended by SIGKILL"):
        session.run(X)
    assert time.monotonic() - started < QUICK.run, "the deadline was not needed"
    assert "sent an invalid answer" in caplog.text
    runs(session)
    assert session.pid != former


def test_a_process_that_enlarges_the_memory_without_limit_fails_no_call(device):
    session = device.open()
    runs(session)
    device.will("enlarge")
    for rows in (1, 3, 50_000):
        given = {"x": np.arange(rows, dtype=np.float64), "y": np.ones((rows, 7), np.float32)}
        same(session.run(given), given)
    assert session.restarts == 0


def test_a_process_cannot_keep_its_parent_from_enlarging_the_memory(device):
    session = device.open()
    device.will("seal")
    with pytest.raises(DeviceError, match="Operation not permitted"):
        session.run(X)
    runs(session)


@pytest.mark.parametrize(
    ("shape", "offset"), [([2**40], 0), ([1], 2**40), ([0], 2**62), ([1], 2**63 - 1), ([64], 2**63 - 64)], ids=str
)
def test_a_process_whose_arrays_are_not_in_its_memory_is_ended(device, shape, offset, caplog):
    session = device.open()
    runs(session)
    place = {"name": "x", "dtype": "|u1", "shape": shape, "offset": offset}
    will_send(device, framed(json.dumps({"arrays": [place]}).encode()))
    with pytest.raises(DeviceLostError, match="was ended by SIGKILL"):
        session.run(X)
    assert "sent an invalid answer" in caplog.text
    runs(session)


def test_what_would_run_a_command_when_unpickled_runs_none(device, tmp_path):
    session = device.open()
    will_send(device, framed(pickle.dumps(Bomb(tmp_path / "owned"))))
    with pytest.raises(DeviceLostError):
        session.run(X)
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "owned")))
    assert (tmp_path / "owned").exists(), "it would have"


def test_a_record_without_an_end_takes_no_memory_of_the_parent(device):
    session = device.open(Limits(run=4, opening=60, closing=5))
    before = resident()
    device.will("log on")
    with pytest.raises(DeviceLostError, match="did not answer within 4 s"):
        session.run(X)
    assert resident() - before < 64 * 2**20


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
