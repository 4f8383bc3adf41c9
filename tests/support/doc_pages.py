"""The pages of the documentation, and what is in them: blocks of code with their marks, commands, tables."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("plugins/*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "benchmarks" / "README.md",
)

_MARK = re.compile(r"<!-- ((?:not )?executed\b.*?) -->\s*")
_PROMPT = re.compile(r"(?:[a-z]+)?\$\s+(.*)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: The page's file.
        line: Its first line of code, counted from 0.
        language: What stands behind its fence.
        code: Its text.
        mark: What a comment right before it says of its execution, such as `not executed: needs an AMD NPU`.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str | None


@dataclass(frozen=True)
class Command:
    """A command of a `console` block.

    Attributes:
        words: Program and arguments.
        environment: The variables that are set for it.
    """

    words: tuple[str, ...]
    environment: dict[str, str]


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in their order."""
    found, mark = [], None
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "fence":
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, mark))
        comment = _MARK.fullmatch(token.content) if token.type == "html_block" else None
        mark = comment[1] if comment else None
    return tuple(found)


def commands(block: Block) -> Iterator[Command]:
    """The commands after the prompts of a `console` block; a command may go on over several lines."""
    lines: list[str] = []
    for line in block.code.splitlines():
        prompt = _PROMPT.fullmatch(line.strip())
        if prompt:
            lines.append(prompt[1])
        elif lines and (lines[-1].endswith("\\") or lines[-1].count("'") % 2):
            lines[-1] = f"{lines[-1].removesuffix(chr(92))} {line.strip()}"
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ("&&", "||", "|", ";"):
                yield _command(words)
                words = []
            else:
                words.append(word)


def _command(words: list[str]) -> Command:
    environment = {}
    while words and (variable := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", words[0], re.DOTALL)):
        environment[variable[1]] = variable[2]
        words = words[1:]
    return Command(tuple(words), environment)


def rows(page: Path) -> Iterator[tuple[str, ...]]:
    """The rows of a page's tables but for their heads, cell by cell."""
    for line in page.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| symptom"):
            yield tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
