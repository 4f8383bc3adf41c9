"""The child: `python -m visionaccel.isolation.child PARENT SOCKET INPUTS OUTPUTS RECORDS`, started by `process`.

The arguments are the parent's process id and inherited file descriptors: a socket for small messages, two memory files
for arrays, and a pipe for log records. The first memory file holds what is to be opened.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import BinaryIO

from visionaccel.backends import Session, default_registry
from visionaccel.backends.sessions import open_session
from visionaccel.core.arrays import Array
from visionaccel.core.child_groups import end_with_parent
from visionaccel.core.memory_files import MemoryFile
from visionaccel.errors import DeviceError, VisionAccelError
from visionaccel.isolation.answers import Opened, Places, encoded, failure_of
from visionaccel.isolation.log_records import RecordSender
from visionaccel.isolation.request import OpenRequest, ParentState
from visionaccel.isolation.shared_arrays import SharedArrays

_LINE_BUFFERED = 1


def main(arguments: Sequence[str]) -> None:
    """Open what the parent asks for, then run it until the parent hangs up."""
    parent, *fds = map(int, arguments)
    end_with_parent(parent)
    # Not for programs that the vendor's code starts: they would keep the socket open after this process died.
    for fd in fds:
        os.set_inheritable(fd, False)
    # Ctrl-C is for the parent, which ends this process in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()  # Python's stack at a crash is among the last lines that the parent quotes.
    _flush_lines()
    socket, inputs, outputs, records = fds
    with Connection(socket) as connection:
        _serve(connection, SharedArrays(inputs), SharedArrays(outputs), records)


def _flush_lines() -> None:
    """Make C's stdout flush each line, although it is a pipe: what is in its buffer is lost when a process aborts."""
    libc = ctypes.CDLL(None)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, _LINE_BUFFERED, 0)


def _serve(connection: Connection, inputs: SharedArrays, outputs: SharedArrays, records: int) -> None:
    try:
        request, session = _open(inputs.fd, records)
    except Exception as error:
        _answer(connection, _failure(error, "the device's process could not open the program"))
        return
    try:
        _answer(connection, encoded(Opened(session.capabilities)))
    except Exception as error:
        _answer(connection, _failure(error, f"backend {request.backend!r} does not say what its session is"))
        return
    while True:
        try:
            call = connection.recv()
        except (EOFError, OSError):
            break
        if call is None:
            break
        try:
            answer = encoded(_run(session, call, inputs, outputs))
        except Exception as error:
            answer = _failure(error, f"backend {request.backend!r} failed")
        _answer(connection, answer)
    try:
        session.close()
    except Exception:  # Nobody waits for an answer any more.
        logging.getLogger(__name__).exception("Backend %r failed to close.", request.backend)


def _run(session: Session, call: Places, inputs: SharedArrays, outputs: SharedArrays) -> Places:
    given: Mapping[str, Array] = {place.name: inputs.view(place) for place in call.arrays}
    found = session.run(given)
    started = time.monotonic()
    places = outputs.write(found)
    return Places(places, time.monotonic() - started)


def _open(inputs: int, records: int) -> tuple[OpenRequest, Session]:
    """Open what the memory file holds: first the parent's state, without which the rest may not unpickle."""
    with open(inputs, "rb", closefd=False) as file:
        file.seek(0)  # The parent, whose descriptor this is, wrote to the end.
        parent_state: ParentState = pickle.load(file)  # noqa: S301  # nosec B301 # from the parent
        _adopt(parent_state, records)
        request: OpenRequest = _Unpickler(file).load()
    backend = default_registry().load(request.backend)
    options = backend.options.model_validate(dict(request.options))
    return request, open_session(backend, request.program, request.device, options)


class _Unpickler(pickle.Unpickler):  # from the parent
    """Reads a request, whose memory files this process has inherited under the numbers that they have in its parent."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._files: dict[int, MemoryFile] = {}

    def persistent_load(self, pid: tuple[int, str]) -> MemoryFile:
        fd, digest = pid
        if fd not in self._files:
            self._files[fd] = MemoryFile.inherited(fd, digest)
        return self._files[fd]


def _adopt(parent_state: ParentState, records: int) -> None:
    sys.path[:] = parent_state.search_path
    # Set for this interpreter's start only; another one that the vendor's code starts would choke on these modules.
    os.environ.pop("PYTHONPATH", None)
    if parent_state.python_path is not None:
        os.environ["PYTHONPATH"] = parent_state.python_path
    logging.basicConfig(level=parent_state.log_level, handlers=[RecordSender(records)], force=True)


def _failure(error: Exception, what: str) -> bytes:
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, VisionAccelError):
        error = DeviceError(
            f"{what}: {type(error).__name__}: {error}",
            hint="Set VISIONACCEL_FALLBACK to let another backend take over.",
        )
    return encoded(failure_of(error, trace))


def _answer(connection: Connection, answer: bytes) -> None:
    try:
        connection.send_bytes(answer)
    except OSError:  # The parent hung up; the next receive says so.
        return


if __name__ == "__main__":
    main(sys.argv[1:])
