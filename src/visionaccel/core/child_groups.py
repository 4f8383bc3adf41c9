"""Child processes. Each leads a group, so that what it started in turn ends with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import IO

from visionaccel.core.orphans import guarded_group

_PR_SET_PDEATHSIG = 1
_LONGEST_PAUSE = 0.05
_DYING = 5.0
"""Seconds that a killed child has to be dead."""


class ChildGroup:
    """A child process and the process group that it leads. Its process id is not reused before `reap`.

    It leads a group so that Ctrl-C, a hang-up or a signal to the parent's group does not reach it before the parent
    decides, and so that what vendor code starts can be killed with it. It does not lead a session: Linux schedules by
    session, and an engine that waits by yielding, as vLLM's does, then keeps a child in a separate session from running
    for minutes.

    Args:
        command: What to run.
        output: Where what it prints goes: a file, a descriptor, or `subprocess.PIPE` for `printed`.
        environment: Its environment; None for this process's.
        pass_fds: Descriptors that it inherits.
        guarded: Have the group ended if this process is killed. A child that calls `end_with_parent` and starts
            nothing does not need it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: int | IO[bytes],
        environment: Mapping[str, str] | None = None,
        pass_fds: Collection[int] = (),
        guarded: bool = True,
    ) -> None:
        self._reaping = threading.Lock()
        self._killed = False
        self._process = subprocess.Popen(  # noqa: S603 - callers run this interpreter, or what a user named
            command,
            env=environment,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self.pid = self._process.pid
        self.printed = self._process.stdout
        self._guard = ExitStack()
        if guarded:
            try:
                self._guard.enter_context(guarded_group(self.pid))
            except BaseException:  # without a watcher, nothing would end the group should this process be killed
                self.end()
                if self.printed is not None:
                    self.printed.close()
                raise

    @property
    def status(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None until it is reaped."""
        return self._process.returncode

    def exited(self) -> bool:
        """Whether the child is dead, reaped or not, or has been killed and will be."""
        return self._killed or self._dead()

    def exits_within(self, seconds: float) -> bool:
        """Wait for the child to be dead or killed; whether it is. It is not reaped."""
        return _within(seconds, self.exited)

    def ask_to_end(self) -> None:
        """Send SIGTERM to the child alone, which ends what it started."""
        with self._reaping:
            if self._process.returncode is None:
                # Not by Popen, which reaps a dead child first: what it started would then be left alone.
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the child and what it started, at once."""
        with self._reaping:
            if self._process.returncode is None:
                self._killed = True
                self._kill_group()

    def reap(self) -> int:
        """Wait for the child to die, however long that takes, end what it started, and return its status."""
        if self._process.returncode is not None:  # its number may be another's by now
            return self._process.returncode
        with suppress(ChildProcessError):  # other code in this process waited for any child and reaped it
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            with self._reaping:
                if self._process.returncode is None:
                    self._kill_group()  # what it started; its number is still taken
        with self._reaping:
            status = self._process.wait()
        self._guard.close()
        return status

    def end(self, seconds: float = 0.0) -> bool:
        """Give the child some time to end by itself, then kill the group, and reap it; whether it ended by itself.

        A killed child that hangs in a driver's system call does not die. It is waited for a few seconds and then left
        to the watcher.
        """
        ended = self.exits_within(seconds)
        self.kill()
        if _within(_DYING, self._dead):
            self.reap()
        return ended

    def _dead(self) -> bool:
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        except ChildProcessError:  # other code in this process waited for any child and reaped it
            return True

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _within(seconds: float, happened: Callable[[], bool]) -> bool:
    """Whether something happens within some seconds."""
    limit, pause = time.monotonic() + seconds, 0.001
    while not (found := happened()) and (left := limit - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
    return found


def how_it_ended(status: int) -> str:
    """A child's status in words, such as `ended with status 3` or `was ended by SIGKILL`."""
    return f"ended with status {status}" if status >= 0 else f"was ended by {signal_name(-status)}"


def signal_name(number: int) -> str:
    """The name of a signal, such as `SIGKILL`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of that process id, ends.

    A thread that waits for the parent's end would get no turn while vendor code hangs with the interpreter's lock held.
    The signal comes when the parent's thread that started this process ends, so that thread must outlive this process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It ended before the line above.
        os._exit(1)
