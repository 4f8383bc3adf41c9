"""Tables of what ran of each family: the forms of its tower on each backend, and its models in vLLM."""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NoReturn

from docsite.evidence import committed

__all__ = ["SERVED", "form_table", "served_table"]

SERVED = Path(__file__).parents[2] / "docs" / "families.json"
"""What `make families` writes."""

_FORMS = ("any grid", "bucket", "fixed grid", "split", "fixed grid in bfloat16", "any grid in int8", "split, simulated")
_BACKENDS = ("torch_ref", "onnxrt", "openvino", "flexmlrt")


def form_table(families: Iterable[str]) -> str:
    """Return a table with a row for each form that a backend ran, and a column for each family."""
    families, ran = list(families), committed().ran
    lines = []
    for backend, form in product(_BACKENDS, _FORMS):
        found = [form in ran.get(f"{family}: {backend}", ()) for family in families]
        if any(found):
            cells = [
                "yes" if ok else _refuse(f"{backend}, {form}", family)
                for family, ok in zip(families, found, strict=True)
            ]
            lines.append((f"`{backend}`", form, *cells))
    return _table(("backend", "form", *(f"`{family}`" for family in families)), lines)


def served_table() -> str:
    """Return a table with a row for each architecture that was compared with stock vLLM, and a column for each way."""
    rows = json.loads(SERVED.read_text())
    found: dict[tuple[str, str, str], dict[str, tuple[int, int, float]]] = {}
    for row in rows:
        of_model = found.setdefault((row["architecture"], row["family"], row.get("task", "generate")), {})
        way = f"`{row['backend']}`, {row['mode']}, {row['precision']}"
        equal, prompts, difference = of_model.get(way, (0, 0, 0.0))  # of another checkpoint of that architecture
        of_model[way] = equal + row["equal"], prompts + row["prompts"], max(difference, row["difference"])
    ways = list(dict.fromkeys(way for of_model in found.values() for way in of_model))
    lines = []
    for (architecture, family, task), of_model in found.items():
        cells = [
            "{} of {}, {:.0e}".format(*of_model[way]) if way in of_model else _refuse(architecture, way) for way in ways
        ]
        lines.append((f"`{architecture}`", f"`{family}`", task, *cells))
    return _table(("architecture", "family", "task", *ways), lines)


def _refuse(row: str, column: str) -> NoReturn:
    """Raise, because the page must not pass over a combination that did not run."""
    raise ValueError(f"no result of {row} and {column}")


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
