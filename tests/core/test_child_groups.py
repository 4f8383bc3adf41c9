"""Child processes and what they start end together, when they are asked to and when this process is gone."""

import os
import signal
import subprocess
import sys

import pytest

from gated import wait_until
from processes import has_ended
from visionaccel.core.child_groups import ChildGroup, how_it_ended

SLEEPS = "import time; time.sleep(60)"
STARTS = f"""
import subprocess, sys
other = subprocess.Popen([sys.executable, "-c", {SLEEPS!r}])
print(other.pid, flush=True)
other.wait()
"""


def started(code, **settings):
    return ChildGroup([sys.executable, "-c", code], output=subprocess.PIPE, **settings)


def test_a_child_that_ends_by_itself_has_its_status():
    child = started("import sys; print('hello'); sys.exit(3)")
    assert child.end(30.0)
    assert child.status == 3
    with child.printed as printed:
        assert printed.read() == b"hello\n"


def test_a_child_that_does_not_end_is_killed_with_what_it_started():
    child = started(STARTS)
    other = int(child.printed.readline())
    assert not child.exits_within(0.05)
    assert not child.end(0.05)
    assert child.status == -signal.SIGKILL
    wait_until(lambda: has_ended(other))
    child.printed.close()


def test_a_child_that_was_asked_to_end_ends():
    child = started("import signal; print('ready', flush=True); signal.pause()")
    child.printed.readline()
    child.ask_to_end()
    assert child.end(30.0)
    assert child.status == -signal.SIGTERM
    child.printed.close()


def test_what_a_dead_child_started_ends_although_the_child_is_asked_to_end():
    leaves = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]).pid, flush=True)"
    child = started(leaves)
    other = int(child.printed.readline())
    assert child.exits_within(30.0)
    child.ask_to_end()
    assert child.end()
    assert child.status == 0
    wait_until(lambda: has_ended(other))
    child.printed.close()


def test_a_child_that_is_dead_keeps_its_number_until_it_is_reaped():
    child = started("")
    assert child.exits_within(30.0)
    assert child.status is None
    assert os.getpgid(child.pid) == child.pid
    assert child.reap() == 0
    assert child.exited()
    child.kill()  # another process may have the number by now
    child.printed.close()


def test_what_cannot_be_started_is_an_error_of_the_system():
    with pytest.raises(FileNotFoundError):
        ChildGroup(["/no/such/program"], output=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "ended with status 0"), (-9, "was ended by SIGKILL"), (-300, "was ended by signal 300")],
)
def test_an_ending_in_words(status, words):
    assert how_it_ended(status) == words


def test_a_child_that_cannot_be_guarded_does_not_stay(monkeypatch):
    def no_watcher(leader):
        pids.append(leader)
        raise OSError("no process can be started")

    pids = []
    monkeypatch.setattr("visionaccel.core.child_groups.guarded_group", no_watcher)
    with pytest.raises(OSError, match="no process can be started"):
        started(SLEEPS)
    wait_until(lambda: has_ended(*pids))
    with pytest.raises(ChildProcessError):
        os.waitpid(*pids, os.WNOHANG)


def test_ending_a_child_that_does_not_die_of_sigkill_does_not_hang(monkeypatch):
    """As one does that hangs in a driver; here the signal is not sent."""
    child = started(SLEEPS)
    monkeypatch.setattr("visionaccel.core.child_groups._DYING", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", lambda *_: None)
        assert not child.end()
        assert child.status is None
    os.killpg(child.pid, signal.SIGKILL)
    assert child.reap() == -signal.SIGKILL
    child.printed.close()
