"""Checks by name: each finds one kind of fault, and its failure says what to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visionaccel_testing.conformance.kit import Kit

LEVELS = ("interface", "shapes", "numbers", "determinism", "concurrency and life cycle", "faults", "speed")
"""The subjects of levels 0 to 6."""


class CheckFailedError(AssertionError):
    """The backend breaks the contract; the message says where and what the cause may be."""


class NotApplicableError(Exception):
    """A check does not apply to this backend; the message says why."""


@contextmanager
def must_raise(kind: type[Exception], otherwise: str) -> Iterator[None]:
    """Fail with the message `otherwise` unless an error of that kind is raised within."""
    try:
        yield
    except kind:
        return
    raise CheckFailedError(otherwise)


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        level: 0 to 6.
        name: Its name, such as `L1-rows`.
        title: What holds if it passes, in one sentence.
        run: Raises CheckFailedError, NotApplicableError, or any error of the backend that should not have been raised.
    """

    level: int
    name: str
    title: str
    run: Callable[[Kit], None]


class Checks:
    """The checks of one level, in the order of their definition."""

    def __init__(self, level: int) -> None:
        self.level = level
        self.found: list[Check] = []

    def add(self, function: Callable[[Kit], None]) -> Callable[[Kit], None]:
        """Decorator: make a check of a function, named after it and titled with the first line of its docstring."""
        name = f"L{self.level}-{function.__name__.replace('_', '-')}"
        title = (function.__doc__ or "").splitlines()[0].removesuffix(".")
        self.found.append(Check(self.level, name, title, function))
        return function
