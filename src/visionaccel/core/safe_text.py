"""Makes text from manifests, checkpoints, file names and devices safe to show.

Such text may have escape sequences that a terminal obeys, controls that reorder what people read, or lines that look
like other log records. Errors, log records, the command's output and HTML reports pass through here.
"""

from __future__ import annotations

import logging

_MOST_TEXT = 2000


def visible(text: str) -> str:
    """Replace what cannot be printed by `?`: controls, bidirectional overrides, separators. Line breaks stay."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else " " if each == "\t" else "?" for each in text)


def one_line(text: str, most: int = _MOST_TEXT) -> str:
    """Return visible text in one line of at most `most` characters."""
    line = visible(" ".join(text[: 4 * most].split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def lines(text: str) -> str:
    """Return visible text with its further lines indented, so that none looks like a separate message."""
    first, *further = visible(text).split("\n")
    indented = (line if not line or line.startswith("  ") else f"  {line}" for line in further)
    return "\n".join((first, *indented))


class _Safe(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if (safe := lines(message)) != message:
            record.msg, record.args = safe, None
        if record.exc_info and not record.exc_text:
            record.exc_text = visible(_FORMATTER.formatException(record.exc_info))
        return True


_SAFE, _FORMATTER = _Safe(), logging.Formatter()


def safe_logger(name: str) -> logging.Logger:
    """Return the logger of that name; its records are made safe before a handler sees them."""
    logger = logging.getLogger(name)
    logger.addFilter(_SAFE)  # once, however often it is added
    return logger
