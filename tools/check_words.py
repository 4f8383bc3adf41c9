"""Finds words of `avoided_words.txt` in sources and pages: `python tools/check_words.py`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("src", "plugins", "docs", "examples", "tools", "benchmarks", "README.md", "CHANGELOG.md")
SUFFIXES = frozenset({".md", ".py", ".cpp", ".hpp", ".h", ".html", ".toml"})
ALLOWED = "words: allowed"
"""Marks a line that uses a word in a technical sense, such as an option of another program."""


def rules(text: str) -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield a pattern for each avoided word or phrase, which may span lines, and what to write instead."""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, advice = line.partition(": ")
            advice, _, exceptions = advice.partition("; except ")
            kept = [_pattern(each.strip()) for each in exceptions.split(",") if each]
            yield re.compile("|".join([*kept, rf"(?P<avoided>\b{_pattern(word)}\b)"]), re.IGNORECASE), advice


def _pattern(phrase: str) -> str:
    return r"\s+(?:#\s+)?".join(map(re.escape, phrase.split()))


def avoided(text: str, words: str) -> Iterator[tuple[int, str]]:
    """Yield the line number of each avoided word in a text, and what to do about it."""
    lines = text.splitlines()
    for pattern, advice in rules(words):
        for match in pattern.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            if match["avoided"] and ALLOWED not in lines[number - 1]:
                yield number, f"{' '.join(match['avoided'].split())!r}: write {advice!r}"


def main() -> int:
    """Print where avoided words are; return 1 if there are any."""
    words = Path(__file__).with_name("avoided_words.txt").read_text(encoding="utf-8")
    found = False
    for place in map(ROOT.joinpath, PLACES):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in SUFFIXES and path.is_file() and "build" not in path.parts:
                for number, problem in sorted(avoided(path.read_text(encoding="utf-8"), words)):
                    print(f"{path.relative_to(ROOT)}:{number}: {problem}")
                    found = True
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
