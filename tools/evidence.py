"""Compares the results of the last `make test` with those on the pages: `python tools/evidence.py [--write]`.

With `--write` it writes the results to `docs/evidence.json` instead; `python tools/write_tables.py` then puts them on
the pages.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from docsite.evidence import EVIDENCE, Evidence, committed, found_in

VENV = Path(__file__).parents[1] / ".venv"


def _differences(now: Evidence, then: Evidence) -> Iterator[str]:
    """Yield a line for each difference. Of the kit only badges are compared: which checks apply depends on the CPU."""
    for here, there in ((now.shown, then.shown), (now.ran, then.ran)):
        for what in sorted(here.keys() | there.keys()):
            if here.get(what) != there.get(what):
                yield f"{what}: the pages say {there.get(what)}, this run showed {here.get(what)}"
    for backend in sorted(now.badges.keys() & then.badges.keys()):
        if now.badges[backend].badge != then.badges[backend].badge:
            yield f"{backend}: the pages say {then.badges[backend].badge}, this run showed {now.badges[backend].badge}"


def main() -> int:
    """Compare or write the results; return the exit status."""
    found = found_in(VENV / "results", VENV / "conformance")
    if "--write" in sys.argv[1:]:
        EVIDENCE.write_text(json.dumps(found._asdict(), indent=1) + "\n")
        return 0
    differences = list(_differences(found, committed()))
    for line in differences:
        print(line)
    if not differences:
        return 0
    print("If this is intended, run `python tools/evidence.py --write`, then `python tools/write_tables.py`.")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
