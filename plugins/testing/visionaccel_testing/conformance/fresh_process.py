"""Runs a function in a new interpreter or a fork, so that a crash or a hang there is an outcome and not the end."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar, cast

from visionaccel_testing.conformance.check import CheckFailedError, NotApplicableError

P = ParamSpec("P")
T = TypeVar("T")

SECONDS = 300.0
"""Far more than any check takes on a busy machine; what lasts longer hangs."""

ENDING = 30.0
"""Likewise for an interpreter to exit."""


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of a module returns in a process that imported nothing yet.

    Args:
        function: Pickled by its name, as are its arguments and its result by their values.
        args: Its arguments.
        kwargs: Its further arguments.

    Raises:
        CheckFailedError: As it does there; or if it raises anything else, crashes, exits or hangs.
        NotApplicableError: As it does there.
    """
    what = f"a process that did nothing but {function.__name__}"
    return cast("T", _answered("spawn", what, function, args, kwargs))


def in_fork(function: Callable[[], T]) -> T:
    """What a function returns in a fork of this process; only its result is pickled.

    Raises:
        CheckFailedError: As `in_fresh_process` does.
        NotApplicableError: As it does there.
    """
    return cast("T", _answered("fork", "a forked process", function, (), {}))


def _answered(
    method: str, what: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    context: Any = multiprocessing.get_context(method)
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(far, function, args, kwargs))
    process.start()
    far.close()
    try:
        answered = near.poll(SECONDS)
        kind, value = near.recv() if answered else ("silent", None)
    except EOFError:
        kind, value = "silent", None
    finally:
        near.close()
    # An interpreter that answered and then does not end is at fault too: something keeps it from exiting.
    process.join(ENDING if answered else 0)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    if kind == "inapplicable":
        raise NotApplicableError(value)
    if kind == "error":
        raise CheckFailedError(f"{what}: {value}" if method == "fork" else value)
    if hung:
        raise CheckFailedError(
            f"{what} did not {'end' if answered else 'answer'} in time: a call, a lock or a thread of the backend "
            "hangs."
        )
    if code != 0 or kind == "silent":
        raise CheckFailedError(f"{what} {_end(code)}.")
    return value


def _answer(answers: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        answer = ("value", function(*args, **kwargs))
    except NotApplicableError as error:
        answer = ("inapplicable", str(error))
    except CheckFailedError as error:
        answer = ("error", str(error))
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        answer = ("error", f"{type(error).__name__} in a new process: {error}\n{trace}")
    answers.send(answer)
    answers.close()


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"
