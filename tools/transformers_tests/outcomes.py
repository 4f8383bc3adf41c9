"""Which of transformers' tests are left out, and what the results of the others mean."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass
class Row:
    """The result of one test.

    Attributes:
        family: The model's folder in transformers.
        test: `Class::name`.
        group: The class that the test comes from, such as `GenerationTesterMixin`.
        outcome: `passed`, `failed`, `skipped` or `left out`; empty if it was not run.
        detail: Why it failed or was left out.
        requests: Calls of methods of models that return features of images or videos. They may call each other.
        ours: Calls of our encoder.
        theirs: Calls of transformers' towers by models that had asked for features.
        replaced: Whether models had our encoder.
        own_tower: The outcome with transformers' own towers, if it was run again.
    """

    family: str
    test: str
    group: str
    outcome: str = ""
    detail: str = ""
    requests: int = 0
    ours: int = 0
    theirs: int = 0
    replaced: bool = True
    own_tower: str = ""

    @property
    def explained(self) -> str:
        """Why the test did not pass."""
        if self.outcome == "passed":
            return f"passed with {self.theirs} calls of transformers' towers and {self.ours} of our encoder"
        return self.detail or "the test was not run"


@dataclass(frozen=True)
class Rule:
    """Tests that are left out.

    Attributes:
        tests: Patterns of their names, such as `test_training*`, or of `Class::name`.
        reason: Why they say nothing about an encoder.
        families: The families it is about; all if empty.
    """

    tests: tuple[str, ...]
    reason: str
    families: tuple[str, ...] = ()


def left_out_rules(text: str) -> list[Rule]:
    """Read the rules from the text of `left_out.toml`."""
    rules = tomllib.loads(text)["rule"]
    return [Rule(tuple(rule["tests"]), rule["reason"], tuple(rule.get("families", ()))) for rule in rules]


def reason_to_leave_out(rules: Iterable[Rule], row: Row) -> str | None:
    """Return the reason of the first rule for a test; None if it is to be run."""
    names = row.test, row.test.rpartition("::")[2]
    for rule in rules:
        about = not rule.families or row.family in rule.families
        if about and any(fnmatchcase(name, pattern) for name in names for pattern in rule.tests):
            return rule.reason
    return None


PASSED, WITHOUT_IMAGE, SKIPPED, LEFT_OUT = "passed", "passed without an image", "skipped", "left out"
FAILED_TOO, FAILED = "failed with either tower", "failed"
COLUMNS = (PASSED, WITHOUT_IMAGE, SKIPPED, LEFT_OUT, FAILED_TOO, FAILED)


def verdict(row: Row) -> str:
    """Return the column of a result.

    A test that passed is `passed` only if our encoder made all embeddings, and has `failed` if it made none or another
    tower made some.
    """
    if row.outcome == "passed" and not row.requests:
        return WITHOUT_IMAGE
    if row.outcome == "passed" and (not row.replaced or (row.ours and not row.theirs)):
        return PASSED
    if row.outcome in (SKIPPED, LEFT_OUT):
        return row.outcome
    return FAILED_TOO if row.own_tower == "failed" else FAILED


def report(rows: Sequence[Row]) -> str:
    """Return how many tests of each family and group are in which column, and why they were left out or failed."""
    lines = [f"| family | tests of | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    counts = Counter((row.family, row.group, verdict(row)) for row in rows)
    for family in dict.fromkeys(row.family for row in rows):
        groups = sorted({row.group for row in rows if row.family == family})
        found = [[counts[family, group, column] for column in COLUMNS] for group in groups]
        found.append([sum(each) for each in zip(*found, strict=True)])
        for group, each in zip([*groups, "all"], found, strict=True):
            lines.append(f"| `{family}` | {group} | {' | '.join(map(str, each))} |")
    for column in (LEFT_OUT, FAILED_TOO, FAILED):
        names: dict[str, list[str]] = {}
        for row in rows:
            if verdict(row) == column:
                names.setdefault(row.explained, []).append(f"{row.family} {row.test}")
        if names:
            lines += ["", f"{column}:"]
        lines += [f"- {why}\n  {', '.join(tests)}" for why, tests in names.items()]
    return "\n".join(lines)
