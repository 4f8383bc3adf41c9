"""Compares what the last `make test` showed with what the pages say of it: `python tools/evidence.py [--write]`.

With `--write` it is written to `docs/evidence.json` instead, from where `python tools/write_tables.py` puts it into the
pages.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from docsite.evidence import EVIDENCE, Evidence, committed, found_in

VENV = Path(__file__).parents[1] / ".venv"


def _differences(now: Evidence, then: Evidence) -> Iterator[str]:
    """What changed. Which checks of the kit apply depends on the processor, so only the badges are compared."""
    for what in sorted(now.shown.keys() | then.shown.keys()):
        if now.shown.get(what) != then.shown.get(what):
            yield f"{what}: the pages say {then.shown.get(what)}, this run showed {now.shown.get(what)}"
    for backend in sorted(now.badges.keys() & then.badges.keys()):
        if now.badges[backend].badge != then.badges[backend].badge:
            yield f"{backend}: the pages say {then.badges[backend].badge}, this run showed {now.badges[backend].badge}"


def main() -> int:
    """Run it; the exit status."""
    found = found_in(VENV / "results", VENV / "conformance")
    if "--write" in sys.argv[1:]:
        EVIDENCE.write_text(json.dumps(found._asdict(), indent=1) + "\n")
        return 0
    differences = list(_differences(found, committed()))
    for line in differences:
        print(line)
    if not differences:
        return 0
    print("If this is meant, run `python tools/evidence.py --write`, then `python tools/write_tables.py`.")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
