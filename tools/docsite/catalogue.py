"""The catalogue of errors: each class with what it means and what to do, and the messages that carry it."""

import html
import inspect

from docsite.messages import Raised, raised_errors
from visionaccel import errors
from visionaccel.errors import VisionAccelError

__all__ = ["TO_DO", "classes", "error_catalogue", "error_table", "explained"]

TO_DO = "To do: "
"""How the paragraph of a docstring begins that says what helps."""


def classes() -> list[type[VisionAccelError]]:
    """The classes of errors but for their base, each after its parent, in the order of the module."""
    found = [getattr(errors, name) for name in errors.__all__ if name != VisionAccelError.__name__]
    return sorted(found, key=lambda kind: inspect.getsourcelines(kind)[1])


def explained(kind: type[VisionAccelError]) -> tuple[str, str]:
    """When an error is raised, and what to do.

    Raises:
        ValueError: If its docstring does not say both.
    """
    first, *others = [" ".join(part.split()) for part in inspect.cleandoc(kind.__doc__ or "").split("\n\n")]
    to_do = [part.removeprefix(TO_DO) for part in others if part.startswith(TO_DO)]
    if not first or len(to_do) != 1:
        raise ValueError(
            f"the docstring of {kind.__name__} must say when it is raised and, after {TO_DO!r}, what helps"
        )
    return first, to_do[0]


def error_table() -> str:
    """Every class of errors: its parent, when it is raised, what to do."""
    rows = ["| error | is a | when | what to do |", "|---|---|---|---|"]
    for kind in classes():
        when, to_do = explained(kind)
        parents = ", ".join(f"`{parent.__name__}`" for parent in kind.__bases__)
        rows.append(f"| [`{kind.__name__}`](#{kind.__name__.lower()}) | {parents} | {when} | {to_do} |")
    return "\n".join(rows)


def error_catalogue() -> str:
    """A section for each class of errors with the messages that are written with it."""
    return "\n\n".join(_section(kind) for kind in classes())


def _section(kind: type[VisionAccelError]) -> str:
    raised = [each for each in raised_errors() if each.error == kind.__name__]
    when, to_do = explained(kind)
    parts = [f"## {kind.__name__}", f"{when}\n\n**What to do:** {to_do}"]
    if raised:
        rows = "\n".join(map(_row, raised))
        parts.append(f"| message | hint |\n|---|---|\n{rows}")
    return "\n\n".join(parts)


def _row(raised: Raised) -> str:
    return f"| {_cell(raised.message)} | {_cell(raised.hint)} |"


def _cell(text: str) -> str:
    """Text of a message as it is: nothing in it is markup."""
    plain = html.escape(" ".join(text.split()), quote=False)
    for character in "\\|*_[]`":
        plain = plain.replace(character, f"&#{ord(character)};")
    return plain
