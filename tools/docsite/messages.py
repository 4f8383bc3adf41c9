"""Every message in the sources as a template, and those of the package's errors with their hints."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from visionaccel import errors

__all__ = ["ROOT", "Raised", "raised_errors", "templates"]

ROOT = Path(__file__).parents[2]
SOURCES = ("src/visionaccel", "plugins")

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
