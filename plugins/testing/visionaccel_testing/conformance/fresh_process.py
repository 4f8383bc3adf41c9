"""Runs a function in a new interpreter or a fork, so that a crash or a hang there is only a failed check."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar, TypeVarTuple

from visionaccel_testing.conformance.check import CheckFailedError, NotApplicableError

T = TypeVar("T")
Args = TypeVarTuple("Args")

_SECONDS = 300.0
"""Far more than any check takes on a busy machine; a longer one hangs."""

_ENDING = 30.0
"""The same for an interpreter that exits."""


def in_fresh_process(function: Callable[[*Args], T], *args: *Args) -> T:
    """Call a function of a module in a new interpreter; arguments and result are pickled.

    Raises:
        CheckFailedError: If the function raises it or any other error, crashes, exits or hangs.
        NotApplicableError: If the function raises it.
    """
    answer: T = _answered("spawn", f"a process that did nothing but {function.__name__}", function, args)
    return answer


def in_fork(function: Callable[[], T]) -> T:
    """Call a function in a fork of this process; only the result is pickled."""
    answer: T = _answered("fork", "a forked process", function, ())
    return answer


def _answered(method: str, what: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    context: Any = multiprocessing.get_context(method)
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(far, function, args))
    process.start()
    far.close()
    answered = near.poll(_SECONDS)
    answer = None
    with suppress(EOFError):  # it ended without an answer
        answer = near.recv() if answered else None
    near.close()
    # An interpreter that answers and does not exit is at fault too.
    process.join(_ENDING if answered else 0)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    value, error = answer or (None, None)
    if isinstance(error, CheckFailedError) and method == "fork":
        raise CheckFailedError(f"{what}: {error}")
    if error is not None:
        raise error
    if hung:
        raise CheckFailedError(
            f"{what} did not {'exit' if answered else 'answer'} in time: a call, a lock or a thread of the backend "
            "hangs."
        )
    if code != 0 or answer is None:
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        raise CheckFailedError(f"{what} {end}.")
    return value


def _answer(answers: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    value: Any = None
    failure: Exception | None = None
    try:
        value = function(*args)
    except (NotApplicableError, CheckFailedError) as error:
        failure = error
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        failure = CheckFailedError(f"{type(error).__name__} in a new process: {error}\n{trace}")
    answers.send((value, failure))
    answers.close()
