"""Releases of vLLM."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from visionaccel.core.safe_text import safe_logger

__all__ = [
    "RELEASES",
    "TRIED_RELEASES",
    "Release",
    "compatibility_table",
    "logger",
    "release",
    "share_log_handlers",
    "tried",
    "warn_of_untried_release",
]


@dataclass(frozen=True, slots=True)
class Release:
    """A minor release of vLLM that this package was run on.

    Attributes:
        version: The release that ran; those of other patch levels are taken to be alike.
        inline: What was seen of the in-line mode.
        pipelined: What was seen of the pipelined mode.
        how: What ran.
    """

    version: str
    inline: str
    pipelined: str
    how: str

    @property
    def prefix(self) -> str:
        """What versions of this minor release begin with: `0.32.`."""
        return self.version[: self.version.rindex(".") + 1]


_EQUAL, _RAN = "equal to stock", "ran"
_MATRIX, _BY_HAND = "`make vllm-matrix`", "by hand, once"
_OVERLAY = _MATRIX + ", overlay on 0.32"
_BEFORE_0_30 = "; not with another scheduler or a KV connector"

RELEASES = (
    Release("0.28.0", _EQUAL, _EQUAL + _BEFORE_0_30, _MATRIX),
    Release("0.29.0", _RAN, _RAN + _BEFORE_0_30, _BY_HAND),
    Release("0.30.0", _EQUAL, _EQUAL, _MATRIX),
    Release("0.31.0", _RAN, _RAN, _BY_HAND),
    Release("0.32.0", _EQUAL, _EQUAL, "every test of `make test`"),
    Release("0.33.0", _EQUAL, _EQUAL, _OVERLAY),
)
"""Releases that this package was run on, oldest first. docs/compatibility.md shows them, and a test compares."""

TRIED_RELEASES = tuple(release.prefix for release in RELEASES)
"""What the versions of these releases begin with."""


def compatibility_table() -> str:
    """The releases as a Markdown table."""
    rows = [f"| {one.version} | {one.inline} | {one.pipelined} | {one.how} |" for one in RELEASES]
    return "\n".join(["| vLLM | in-line | pipelined | how it was run |", "|---|---|---|---|", *rows, ""])


def logger() -> logging.Logger:
    """A logger below `vllm`, so that vLLM's handlers and levels apply in each of its processes."""
    return safe_logger("vllm.visionaccel")


class _AmongVllms(logging.Handler):
    """Gives the core's records to vLLM's logger, whatever handlers and level that has by then."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def share_log_handlers() -> None:
    """Let the core's log lines appear among vLLM's, which sets up its logging after its plug-ins are loaded."""
    ours = logging.getLogger("visionaccel")
    if not any(isinstance(handler, _AmongVllms) for handler in ours.handlers):
        ours.addHandler(_AmongVllms())
    ours.setLevel(logging.DEBUG)
    ours.propagate = False


def release() -> str:
    """Version of the running vLLM."""
    return str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))


def tried() -> bool:
    """Whether this package was run on the running vLLM's release."""
    return release().startswith(TRIED_RELEASES)


def warn_of_untried_release() -> None:
    """Say so if the running vLLM is of a release that this package was not run on."""
    if not tried():
        releases = ", ".join(release.rstrip(".") for release in TRIED_RELEASES)
        logger().warning("visionaccel was not run on vLLM %s (tried: %s).", release(), releases)
