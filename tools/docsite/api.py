"""The index of public names, generated from the pages of the API reference."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["api_index"]

PAGES = Path(__file__).parents[2] / "docs" / "api"
_MODULE = re.compile(r"^\.\. automodule:: (\S+)\n   :members:(?: (.+))?$", re.MULTILINE)


def api_index() -> str:
    """Return a table of the classes and functions of the reference: page, module, and start of the docstring."""
    rows = sorted(row for page in PAGES.glob("*.md") for row in _rows(page))
    return "\n".join(["| name | module | what it is |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def _rows(page: Path) -> Iterator[tuple[str, str, str]]:
    for match in _MODULE.finditer(page.read_text()):
        module = importlib.import_module(match[1])
        for name in match[2].split(", ") if match[2] else vars(module):
            value = getattr(module, name)
            shown = bool(match[2]) or (not name.startswith("_") and getattr(value, "__module__", "") == module.__name__)
            if shown and (inspect.isclass(value) or inspect.isfunction(value)):
                first = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()).replace("|", "\\|")
                yield f"[`{name}`]({page.name})", f"`{match[1]}`", first
