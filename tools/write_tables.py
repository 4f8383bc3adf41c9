"""Writes what is committed and made from data: `python tools/write_tables.py`. Tests compare.

The tables of docs/compatibility.md and of the README's settings stand behind a comment that names them; the JSON schema
of manifests is a file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from docsite.tables import contract_table, feature_table, settings_table
from visionaccel.bundle import SCHEMA_VERSION, json_schema

__all__ = ["PAGES", "written"]

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "compatibility.md", ROOT / "README.md")
_SCHEMA = ROOT / "docs" / f"bundle-manifest-v{SCHEMA_VERSION}.schema.json"


def written() -> dict[Path, str]:
    """Each of those files as the data has it now."""
    tables = {
        "features": feature_table(),
        "changed": contract_table(changing=True),
        "used": contract_table(changing=False),
        "settings": settings_table(),
    }

    def table(match: re.Match[str]) -> str:
        return match[1] + tables.pop(match[2])

    files = {
        page: re.sub(r"(<!-- table: (\w+) -->\n\n)(?:\|.*\n)*", table, page.read_text(encoding="utf-8"))
        for page in PAGES
    }
    if tables:
        raise ValueError(f"no page has a place for the tables {', '.join(tables)}")
    return files | {_SCHEMA: json.dumps(json_schema(), indent=1) + "\n"}


if __name__ == "__main__":
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
