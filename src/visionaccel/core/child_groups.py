"""Child processes. Each leads a process group, so that the processes it starts end with it."""

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
"""Seconds to wait for a killed child to die."""


class ChildGroup:
    """A child process and the process group that it leads. Its process id is not reused before `reap`.

    It leads a group so that Ctrl-C, a hang-up or a signal to the parent's group does not reach it, and so that the
    processes that vendor code starts can be killed with it. It does not lead a session: Linux schedules by session, and
    an engine that waits by yielding, as vLLM's does, can keep a child in a separate session from running for minutes.

    Args:
        command: The command line to run.
        output: Where its stdout and stderr go: a file, a descriptor, or `subprocess.PIPE` to read `printed`.
        environment: Its environment variables; None for those of this process.
        pass_fds: Descriptors that it inherits.
        guarded: End the group if this process is killed. Not needed for a child that calls `end_with_parent` and
            starts no processes.
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
        self._process = subprocess.Popen(  # noqa: S603 - callers run this interpreter, or a command the user chose
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
            except BaseException:  # without a watcher, nothing would end the group if this process is killed
                self.end()
                if self.printed is not None:
                    self.printed.close()
                raise

    @property
    def status(self) -> int | None:
        """Exit status, or minus the number of the signal that ended the child; None until it is reaped."""
        return self._process.returncode

    def exited(self) -> bool:
        """Return whether the child is dead or has been killed; it may not be reaped yet."""
        return self._killed or self._dead()

    def exits_within(self, seconds: float) -> bool:
        """Wait for the child to die or be killed; return whether it did. Does not reap it."""
        return _within(seconds, self.exited)

    def ask_to_end(self) -> None:
        """Send SIGTERM to the child only; the child must end the processes that it started."""
        with self._reaping:
            if self._process.returncode is None:
                # Not with Popen, which reaps a dead child first: the rest of its group would never be killed.
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the child and the processes that it started."""
        with self._reaping:
            if self._process.returncode is None:
                self._killed = True
                self._kill_group()

    def reap(self) -> int:
        """Wait for the child to die, without a limit, kill the rest of its group, and return its status."""
        if self._process.returncode is not None:  # its process id may have been reused
            return self._process.returncode
        with suppress(ChildProcessError):  # other code in this process waited for any child and reaped it
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            with self._reaping:
                if self._process.returncode is None:
                    self._kill_group()  # its process id is still taken
        with self._reaping:
            status = self._process.wait()
        self._guard.close()
        return status

    def end(self, seconds: float = 0.0) -> bool:
        """Give the child some time to end by itself, then kill its group; return whether it ended by itself.

        The child is reaped, unless it hangs in a driver's system call and does not die within a few seconds.
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
    """Poll `happened` for that many seconds at most; return its last answer."""
    limit, pause = time.monotonic() + seconds, 0.001
    while not (found := happened()) and (left := limit - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
    return found


def how_it_ended(status: int) -> str:
    """Describe a child's status, such as `ended with status 3` or `was ended by SIGKILL`."""
    return f"ended with status {status}" if status >= 0 else f"was ended by {signal_name(-status)}"


def signal_name(number: int) -> str:
    """Return the name of a signal, such as `SIGKILL`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; `parent` is the parent's process id.

    A thread that watches the parent could not run while vendor code hangs and holds the interpreter's lock. The kernel
    sends the signal when the parent's thread that started this process ends, so that thread must outlive this process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It ended before the line above.
        os._exit(1)
