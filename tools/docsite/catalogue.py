"""The catalogue of errors: for each class when it is raised, what to do, and its messages in the sources."""

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
"""Start of the paragraph of an error's docstring that says what to do."""

GAP = "…"
"""Stands for a value that is filled in when the error is raised."""


@dataclass(frozen=True, order=True)
class Raised:
    """An error that the sources raise.

    Attributes:
        error: Name of the class.
        message: Its message, with `…` for each value that is filled in.
        hint: Its hint; empty if it is not a literal in the same call.
    """

    error: str
    message: str
    hint: str


@cache
def raised_errors() -> tuple[Raised, ...]:
    """Return the errors whose message is a literal where they are raised, each once, sorted."""
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
    """Return every string in the sources except docstrings, with gaps."""
    documentation = {id(node.value) for node in _nodes() if isinstance(node, ast.Expr)}
    texts = (_template(node) for node in _nodes() if id(node) not in documentation)
    return frozenset(text for text in texts if text is not None)


@cache
def _nodes() -> tuple[ast.AST, ...]:
    paths = [path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    return tuple(node for path in paths for node in ast.walk(ast.parse(path.read_text(), filename=str(path))))


def _template(node: ast.AST) -> str | None:
    """Return the text of a string or f-string, with gaps; None for any other node."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(v.value if isinstance(v, ast.Constant) else GAP for v in values)
    return None


def classes() -> list[type[VisionAccelError]]:
    """Return the error classes except their base, in the order of the module, each after its parent."""
    found = [getattr(errors, name) for name in errors.__all__ if name != VisionAccelError.__name__]
    return sorted(found, key=lambda kind: inspect.getsourcelines(kind)[1])


def explained(kind: type[VisionAccelError]) -> tuple[str, str]:
    """Return when an error is raised, and what to do.

    Raises:
        ValueError: If its docstring does not say both.
    """
    first, *others = [" ".join(part.split()) for part in inspect.cleandoc(kind.__doc__ or "").split("\n\n")]
    to_do = [part.removeprefix(TO_DO) for part in others if part.startswith(TO_DO)]
    if not first or len(to_do) != 1:
        raise ValueError(
            f"the docstring of {kind.__name__} must say when it is raised and, after {TO_DO!r}, what to do"
        )
    return first, to_do[0]


def error_table() -> str:
    """Return a table of the error classes: parents, when it is raised, what to do."""
    rows = ["| error | is a | when | what to do |", "|---|---|---|---|"]
    for kind in classes():
        when, to_do = explained(kind)
        parents = ", ".join(f"`{parent.__name__}`" for parent in kind.__bases__)
        rows.append(f"| [`{kind.__name__}`](#{kind.__name__.lower()}) | {parents} | {when} | {to_do} |")
    return "\n".join(rows)


def error_catalogue() -> str:
    """Return a section for each error class with its messages."""
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
    """Escape a message, in which nothing is markup."""
    plain = html.escape(" ".join(text.split()), quote=False)
    for character in "\\|*_[]`":
        plain = plain.replace(character, f"&#{ord(character)};")
    return plain
