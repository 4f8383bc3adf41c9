"""Describes in one line, for our own errors, which values pydantic refused and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pydantic import ValidationError

Problem: TypeAlias = Mapping[str, Any]
"""One of the entries of `ValidationError.errors()`."""

_MOST_PROBLEMS = 5
"""The maximum number of problems that are listed; a document of a different kind has hundreds."""


def _described(problem: Problem) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])


def problems_of(error: Exception, describe: Callable[[Problem], str] = _described) -> str:
    """Describe each problem and its place, by default without the value; for any other error return its message."""
    if not isinstance(error, ValidationError):
        return str(error)
    problems = error.errors(include_url=False, include_context=False, include_input=describe is not _described)
    named = "; ".join(map(describe, problems[:_MOST_PROBLEMS]))
    left = len(problems) - _MOST_PROBLEMS
    return f"{named}; and {left} more" if left > 0 else named
