"""Writes the generated parts of committed files: `python tools/write_tables.py`. A test checks that they are current.

A generated part of a page is between `<!-- generated: NAME -->` and `<!-- end -->`. The whole JSON schema of manifests
is generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from docsite.api import api_index
from docsite.catalogue import error_catalogue, error_table
from docsite.commands import command_reference
from docsite.evidence import badge_table, evidence_table
from docsite.matrix import form_table, served_table
from docsite.tables import (
    backend_options,
    backend_table,
    check_table,
    contract_table,
    feature_table,
    metrics_table,
    model_table,
    settings_table,
)
from visionaccel.bundle import SCHEMA_VERSION, json_schema
from visionaccel_testing.checkpoints import TINY_TOWERS

__all__ = ["written"]

ROOT = Path(__file__).parents[1]
_SCHEMA = ROOT / "docs" / f"bundle-manifest-v{SCHEMA_VERSION}.schema.json"
_PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n\n).*?(?=<!-- end -->)", re.DOTALL)

PARTS: Mapping[str, Callable[[], str]] = {
    "API index": api_index,
    "backend options": backend_options,
    "backends": backend_table,
    "badges": badge_table,
    "changed in vLLM": lambda: contract_table(changing=True),
    "checks": check_table,
    "commands": command_reference,
    "error catalogue": error_catalogue,
    "errors": error_table,
    "evidence": evidence_table,
    "features": feature_table,
    "forms of families": lambda: form_table(TINY_TOWERS),
    "metrics": metrics_table,
    "models in vLLM": model_table,
    "models compared in vLLM": served_table,
    "settings": lambda: settings_table().replace("](docs/", "]("),
    "used of vLLM": lambda: contract_table(changing=False),
}


def written() -> dict[Path, str]:
    """Return the current content of each generated file.

    Raises:
        ValueError: If no page contains one of the parts.
    """
    missing = set(PARTS)

    def part(match: re.Match[str]) -> str:
        missing.discard(match[2])
        return f"{match[1]}{PARTS[match[2]]().rstrip()}\n\n"

    files = {_SCHEMA: json.dumps(json_schema(), indent=1) + "\n"}
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        if _PART.search(text):
            files[page] = _PART.sub(part, text)
    if missing:
        raise ValueError(f"no page has a place for {', '.join(sorted(missing))}")
    return files


if __name__ == "__main__":
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
