"""The catalogue of errors: each class with what it means and what to do, and the messages that carry it."""

import ast
import html
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from visionaccel import errors
from visionaccel.errors import VisionAccelError

__all__ = ["GAP", "classes", "error_catalogue", "error_table", "explained", "raised_errors", "templates"]

ROOT = Path(__file__).parents[2]
SOURCES = ("src/visionaccel", "plugins")

TO_DO = "To do: "
"""How the paragraph of a docstring begins that says what helps."""

GAP = "…"
"""Stands for what is filled in when a message is written."""


@dataclass(frozen=True, order=True)
class Raised:
    """An error as some place of the sources raises it.

    Attributes:
        error: Name of the class.
        message: Its message; what is filled in is a `…`.
        hint: What it says to do; empty where it is made elsewhere.
    """

    error: str
    message: str
    hint: str


@cache
def raised_errors() -> tuple[Raised, ...]:
    """The errors whose message is written where they are raised, without repetitions, ordered by their messages."""
    found = set()
    for node in _nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors.__all__:
            message = _template(node.args[0]) if node.args else None
            hints = [_template(keyword.value) for keyword in node.keywords if keyword.arg == "hint"]
            if message is not None and message.strip(f"{GAP} :"):
                found.add(Raised(node.func.id, message, next(filter(None, hints), "")))
    return tuple(sorted(found))


@cache
def templates() -> frozenset[str]:
    """Every text in the sources but docstrings, gaps included."""
    documentation = {id(node.value) for node in _nodes() if isinstance(node, ast.Expr)}
    texts = (_template(node) for node in _nodes() if id(node) not in documentation)
    return frozenset(text for text in texts if text is not None)


@cache
def _nodes() -> tuple[ast.AST, ...]:
    paths = [path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    return tuple(node for path in paths for node in ast.walk(ast.parse(path.read_text(), filename=str(path))))


def _template(node: ast.AST) -> str | None:
    """A literal or formatted text; None for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(v.value if isinstance(v, ast.Constant) else GAP for v in values)
    return None


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
