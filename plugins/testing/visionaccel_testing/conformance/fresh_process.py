"""Runs a function in a new interpreter or a fork, so that a crash or a hang there is an outcome and not the end."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from visionaccel_testing.conformance.check import CheckFailedError, NotApplicableError

P = ParamSpec("P")
T = TypeVar("T")

_SECONDS = 300.0
"""Far more than any check takes on a busy machine; what lasts longer hangs."""

_ENDING = 30.0
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
    answer: T = _answered("spawn", f"a process that did nothing but {function.__name__}", function, args, kwargs)
    return answer


def in_fork(function: Callable[[], T]) -> T:
    """The same in a fork of this process; only the result is pickled."""
    answer: T = _answered("fork", "a forked process", function, (), {})
    return answer


def _answered(
    method: str, what: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    context: Any = multiprocessing.get_context(method)
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(far, function, args, kwargs))
    process.start()
    far.close()
    answered = near.poll(_SECONDS)
    answer = None
    with suppress(EOFError):  # it ended without an answer
        answer = near.recv() if answered else None
    near.close()
    # An interpreter that answered and then does not end is at fault too: something keeps it from exiting.
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
            f"{what} did not {'end' if answered else 'answer'} in time: a call, a lock or a thread of the backend "
            "hangs."
        )
    if code != 0 or answer is None:
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        raise CheckFailedError(f"{what} {end}.")
    return value


def _answer(answers: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    value: Any = None
    failure: Exception | None = None
    try:
        value = function(*args, **kwargs)
    except (NotApplicableError, CheckFailedError) as error:
        failure = error
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        failure = CheckFailedError(f"{type(error).__name__} in a new process: {error}\n{trace}")
    answers.send((value, failure))
    answers.close()
