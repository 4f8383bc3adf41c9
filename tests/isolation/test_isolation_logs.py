"""What a device's process prints and logs cannot make this process allocate, format, or stop reading."""

import json
import logging
import os
import select
import threading
import time
import tracemalloc

import numpy as np
import pytest

from gated import wait_until
from visionaccel.isolation.log_records import OutputReader, RecordSender
from visionaccel.isolation.shared_arrays import ArrayPlace, SharedArrays

RECORD = {"name": "vendor.sdk", "level": 30, "text": "hot", "path": "/a.py", "line": 3, "function": "f", "process": 7}


class Pipes:
    """A reader, and the ends that a device's process would write to."""

    def __init__(self):
        (read_printed, self.printed), (read_records, self.records) = os.pipe(), os.pipe()
        self.reader = OutputReader("acme", read_printed, read_records)

    def send(self, **changes):
        os.write(self.records, json.dumps({**RECORD, **changes}).encode() + b"\n")

    def end(self):
        for fd in (self.printed, self.records):
            os.close(fd)
        self.reader.close(10)


@pytest.fixture
def pipes():
    return Pipes()


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO)
    return lambda name: [record for record in caplog.records if record.name == name]


def test_a_record_arrives_with_its_place(pipes, logged):
    pipes.send()
    pipes.end()
    (record,) = logged("vendor.sdk")
    assert (record.getMessage(), record.levelno, record.filename, record.lineno) == ("hot", 30, "a.py", 3)
    assert (record.funcName, record.process) == ("f", 7)


def test_nothing_is_formatted_here(pipes, logged):
    pipes.send(text="%(message)999999999d %s %1000000000d")
    pipes.send(args=["x"], text="%s")
    pipes.send(msg="%s", args={"a": 1})
    pipes.end()
    (record,) = logged("vendor.sdk")
    assert record.getMessage() == "%(message)999999999d %s %1000000000d"


@pytest.mark.parametrize(
    "changes",
    [
        {"level": "30"}, {"level": 10**30}, {"level": -1}, {"line": 2**40}, {"line": 1.5}, {"text": ["hot"]},
        {"text": "x" * 5000}, {"name": "x" * 300}, {"function": "f" * 300}, {"created": 1e300}, {"exc_text": "x"},
        {"stack_info": "x"}, {"process": "7"},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_with_anything_else_is_not_one(pipes, logged, changes):
    pipes.send(**changes)
    pipes.send(text="the next one")
    pipes.end()
    assert [record.getMessage() for record in logged("vendor.sdk")] == ["the next one"]


def test_a_record_that_does_not_end_and_one_that_nests_are_let_go(pipes, logged):
    tracemalloc.start()
    try:
        for _ in range(2000):
            os.write(pipes.records, b"[" * 16_384)
        time.sleep(0.2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    os.write(pipes.records, b"\n")
    pipes.send(text="the next one")
    pipes.end()
    assert [record.getMessage() for record in logged("vendor.sdk")] == ["the next one"]
    assert peak < 4 * 2**20


def test_control_characters_and_forged_lines_do_not_get_through(pipes, logged):
    pipes.send(text="\x1b[31mhot\nERROR all is lost")
    os.write(pipes.printed, b"\x1b]0;title\x07 printed\n")
    pipes.end()
    (record,) = logged("vendor.sdk")
    assert record.getMessage() == "?[31mhot\n  ERROR all is lost"
    (record,) = logged("visionaccel.device.acme")
    assert record.getMessage() == "?]0;title? printed"
    assert sorted(pipes.reader.tail()) == ["?]0;title? printed", "WARNING vendor.sdk: ?[31mhot ERROR all is lost"]


def test_a_flood_is_cut_and_counted_and_its_end_is_kept(pipes, logged):
    count = 100_000
    for start in range(0, count, 1000):
        os.write(pipes.printed, b"".join(b"line %d\n" % number for number in range(start, start + 1000)))
    pipes.end()
    records = logged("visionaccel.device.acme")
    lines = [record for record in records if record.levelno == logging.INFO]
    dropped = sum(record.args[0] for record in records if "were not logged" in record.msg)
    assert 1000 <= len(lines) < 5000
    assert len(lines) + dropped == count
    assert pipes.reader.tail()[-1] == f"line {count - 1}"


def test_a_flood_is_counted_although_the_process_is_quiet_after_it(pipes, logged):
    count = 3000
    os.write(pipes.printed, b"x\n" * count)

    def all_are_logged_or_counted():
        records = logged("visionaccel.device.acme")
        counts = [record.args[0] for record in records if "were not logged" in record.msg]
        return len(records) - len(counts) + sum(counts) == count

    wait_until(all_are_logged_or_counted)
    pipes.end()


def test_pipes_that_a_process_outside_the_childs_group_holds_open_are_closed(pipes, logged):
    os.write(pipes.printed, b"the last word")
    pipes.reader.close(0.1)
    for fd in (pipes.printed, pipes.records):
        wait_until(lambda fd=fd: is_unread(fd))
        os.close(fd)
    wait_until(lambda: not pipes.reader._thread.is_alive())
    (record,) = logged("visionaccel.device.acme")
    assert record.getMessage() == "the last word"


def test_what_a_crash_prints_is_in_the_tail_although_much_was_logged_before(logged):
    (printed, prints), (records, logs) = os.pipe(), os.pipe()
    for number in range(100):
        os.write(logs, json.dumps({**RECORD, "text": f"record {number}"}).encode() + b"\n")
    os.write(prints, b"Fatal Python error: Aborted\n")
    os.close(prints)
    os.close(logs)
    reader = OutputReader("acme", printed, records)
    reader.close(10)
    assert reader.tail()[-2:] == ("WARNING vendor.sdk: record 99", "Fatal Python error: Aborted")


def test_the_pipes_are_read_although_every_record_fails_to_be_logged(pipes, caplog):
    class Broken(logging.Handler):
        def handle(self, record):
            raise RuntimeError("disk full")

    caplog.set_level(logging.DEBUG)
    handler = Broken()
    logging.getLogger().addHandler(handler)
    try:
        for number in range(10):  # fewer than the tail has lines
            os.write(pipes.printed, b"line %d\n" % number)
            pipes.send()
        os.write(pipes.printed, b"the last word\n")
        pipes.end()
    finally:
        logging.getLogger().removeHandler(handler)
    assert not pipes.reader._thread.is_alive()
    assert "the last word" in pipes.reader.tail()


def test_a_process_whose_output_cannot_be_read_for_want_of_threads_leaves_no_pipe(monkeypatch):
    (printed, prints), (records, logs) = os.pipe(), os.pipe()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        OutputReader("acme", printed, records)
    for fd in (prints, logs):
        wait_until(lambda fd=fd: is_unread(fd))
        os.close(fd)


def is_unread(fd):
    """Whether the read end of a pipe is closed."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def test_loggers_that_are_never_given_back_are_bounded(pipes, logged):
    for number in range(600):
        pipes.send(name=f"invented.{number}", level=10)
    pipes.send(name="a" + ".b" * 90)
    pipes.end()
    known = logging.Logger.manager.loggerDict
    assert sum(name.startswith("invented.") for name in known) <= 256
    assert not any(name.startswith("a.b.b") for name in known)
    assert [record.getMessage() for record in logged("visionaccel.device.acme")] == ["hot"]


def test_what_the_sender_sends_arrives(pipes, logged):
    sender = RecordSender(pipes.records)
    try:
        raise OSError("x\udcff" * 5000)
    except OSError:
        record = logging.LogRecord("n" * 300, 35, "/b.py", 9, "%s!", ("\U0001f600" * 5000,), None, "g")
        sender.emit(record)
        sender.emit(logging.LogRecord("vendor.sdk", logging.ERROR, "/b.py", 9, "failed", (), None, None))
    pipes.end()
    (long,) = logged("n" * 200)
    assert long.levelno == 35
    assert long.getMessage().startswith("\U0001f600")
    assert [record.getMessage() for record in logged("vendor.sdk")] == ["failed"]


def test_arrays_that_were_never_written_are_not_copied():
    memory = SharedArrays.create("test")
    try:
        written = {"a": np.arange(5000, dtype=np.float32), "empty": np.empty((0, 3), np.int8)}
        places = memory.write(written)
        for name, copy in memory.copies(places).items():
            np.testing.assert_array_equal(copy, written[name])
        with pytest.raises(ValueError, match=r"arrays of .* bytes in"):
            memory.copies(places * 1000)
        os.ftruncate(memory.fd, 2**40)
        with pytest.raises(ValueError, match="arrays of 1099511627776 bytes in"):
            memory.copies([ArrayPlace("a", np.dtype("u1"), (2**40,), 0)])
    finally:
        memory.close()
