"""`python -m hostile`: reads hostile input of every kind, and prints what became of it."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from hostile.every_kind import KINDS
from hostile.fuzz_runs import TARGETS, fuzz_all, fuzz_table
from hostile.harness import elapsed, findings, run, shares, table
from hostile.seeds import make_seeds


def main() -> int:
    """Returns 1 if there are findings."""
    parser = argparse.ArgumentParser(description="Read hostile input of every kind.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="hostile-"))
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    make_seeds(work / "seeds")
    kinds = {name: kind.share for name, kind in KINDS.items() if given.kind is None or name in given.kind}
    accounts = run(work / "seeds", work, shares(given.cases, kinds), workers=given.workers, seed=given.seed)
    found = list(findings(accounts))
    fuzzed = {} if given.kind else fuzz_all(work, TARGETS, workers=given.workers)
    found = [*found, *(f"fuzz_{name}: {each.finding}" for name, each in fuzzed.items() if each.finding)]
    done = sum(account.cases for account in accounts.values()) + sum(each.runs for each in fuzzed.values())
    ending = f"{done} cases in {elapsed(started)}, {len(found)} findings."
    sys.stdout.write("\n\n".join([table(accounts), fuzz_table(fuzzed), *found, ending]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
