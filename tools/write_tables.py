"""Writes the tables of docs/compatibility.md that are made from data: `python tools/write_tables.py`.

Each stands behind a comment that names it. A test compares.
"""

from __future__ import annotations

import re
from pathlib import Path

from docsite.tables import contract_table, feature_table
from visionaccel.integrations.vllm.compat.releases import compatibility_table

__all__ = ["PAGE", "with_tables"]

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


def with_tables(page: str) -> str:
    """The page with the tables that its comments name, as the data has them now."""
    tables = {
        "releases": compatibility_table(),
        "features": feature_table(),
        "changed": contract_table(changing=True),
        "used": contract_table(changing=False),
    }
    for name, table in tables.items():
        page, found = re.subn(rf"(<!-- table: {name} -->\n\n)(?:\|.*\n)*", lambda match: match[1] + table, page)  # noqa: B023
        if found != 1:
            raise ValueError(f"{PAGE} has {found} places for the table {name!r}, and needs one")
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
