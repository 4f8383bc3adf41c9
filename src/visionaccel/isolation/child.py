"""The child: `python -m visionaccel.isolation.child PARENT SOCKET INPUTS OUTPUTS RECORDS`, started by `process`.

The arguments are the parent's process id and inherited file descriptors: a socket for small messages, two memory files
for arrays, and a pipe for log records. The first memory file contains the request to open a program.
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
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from visionaccel.backends import Session, checked_options, default_registry
from visionaccel.backends.sessions import open_session
from visionaccel.core.child_groups import end_with_parent
from visionaccel.errors import DeviceError, VisionAccelError
from visionaccel.isolation import messages
from visionaccel.isolation.log_records import RecordSender
from visionaccel.isolation.shared_arrays import SharedArrays

_LINE_BUFFERED = 1


def main(arguments: Sequence[str]) -> None:
    """Open the program that the parent asks for, then run it until the parent hangs up."""
    parent, *fds = map(int, arguments)
    end_with_parent(parent)
    # Programs that vendor code starts must not inherit them: they would keep the socket open after this process died.
    for fd in fds:
        os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process when it chooses
    faulthandler.enable()  # the parent quotes the last lines, which show Python's stack after a crash
    # Flush C's stdout after each line, although it is a pipe: its buffer is lost when a process aborts.
    libc = ctypes.CDLL(None)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, _LINE_BUFFERED, 0)
    socket, inputs, outputs, records = fds
    with Connection(socket) as connection:
        _serve(connection, SharedArrays(inputs), SharedArrays(outputs), records)


def _serve(connection: Connection, inputs: SharedArrays, outputs: SharedArrays, records: int) -> None:
    failed = "the device's process could not open the program"
    try:
        request, session = _open(inputs.fd, records)
        failed = f"the session of backend {request.backend!r} has invalid capabilities"
        answer = messages.encoded(messages.Opened(session.capabilities))
    except Exception as error:
        with suppress(OSError):  # the parent hung up
            connection.send_bytes(_failure(error, failed))
        return
    with suppress(EOFError, OSError):  # the parent may hang up without asking to close
        connection.send_bytes(answer)
        while call := connection.recv_bytes(messages.MOST_BYTES):
            try:
                answer = messages.encoded(_run(session, call, inputs, outputs))
            except Exception as error:
                answer = _failure(error, f"backend {request.backend!r} failed")
            connection.send_bytes(answer)
    try:
        session.close()
    except Exception:  # the parent no longer waits for an answer
        logging.getLogger(__name__).exception("Backend %r failed to close.", request.backend)


def _run(session: Session, call: bytes, inputs: SharedArrays, outputs: SharedArrays) -> messages.Places:
    places = messages.decoded(call)
    assert isinstance(places, messages.Places)
    found = session.run({place.name: inputs.view(place) for place in places.arrays})
    started = time.monotonic()
    return messages.Places(outputs.write(found), time.monotonic() - started)


def _open(inputs: int, records: int) -> tuple[messages.OpenRequest, Session]:
    """Open the requested program. The parent's state comes first, because unpickling the request may need it."""
    with open(inputs, "rb", closefd=False) as file:
        file.seek(0)  # the descriptor is shared with the parent, which has written to it
        parent_state: messages.ParentState = pickle.load(file)  # noqa: S301  # nosec B301 # from the parent
        sys.path[:] = parent_state.search_path
        # Set only to start this interpreter; another interpreter that vendor code starts might fail with these modules.
        os.environ.pop("PYTHONPATH", None)
        if parent_state.python_path is not None:
            os.environ["PYTHONPATH"] = parent_state.python_path
        logging.basicConfig(level=parent_state.log_level, handlers=[RecordSender(records)], force=True)
        request: messages.OpenRequest = pickle.load(file)  # noqa: S301  # nosec B301 # from the parent
    backend = default_registry().load(request.backend)
    options = checked_options(backend, request.options)
    return request, open_session(backend, request.program, request.device, options)


def _failure(error: Exception, what: str) -> bytes:
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, VisionAccelError):
        error = DeviceError(
            f"{what}: {type(error).__name__}: {error}",
            hint="Set VISIONACCEL_FALLBACK to let another backend take over.",
        )
    return messages.encoded(messages.failure_of(error, trace))


if __name__ == "__main__":
    main(sys.argv[1:])
