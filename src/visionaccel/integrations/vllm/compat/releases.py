"""The releases of vLLM that this package was run on, and the one that runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from visionaccel.integrations.vllm.compat import logger


@dataclass(frozen=True, slots=True)
class _Release:
    """A minor release: the one that ran, what was seen of the in-line and the pipelined mode, and what ran.

    Releases of other patch levels are taken to be alike.
    """

    version: str
    inline: str
    pipelined: str
    how: str


_EQUAL, _RAN = "equal to stock", "ran"
_MATRIX, _BY_HAND = "`make vllm-matrix`", "by hand, once"
_OVERLAY = _MATRIX + ", overlay on 0.32"
_BEFORE_0_30 = "; not with another scheduler or a KV connector"

RELEASES = (
    _Release("0.28.0", _EQUAL, _EQUAL + _BEFORE_0_30, _MATRIX),
    _Release("0.29.0", _RAN, _RAN + _BEFORE_0_30, _BY_HAND),
    _Release("0.30.0", _EQUAL, _EQUAL, _MATRIX),
    _Release("0.31.0", _RAN, _RAN, _BY_HAND),
    _Release("0.32.0", _EQUAL, _EQUAL, "every test of `make test`"),
    _Release("0.33.0", _EQUAL, _EQUAL, _OVERLAY),
)
"""Releases that this package was run on, oldest first. docs/compatibility.md shows them, and a test compares."""

TRIED_RELEASES = tuple(one.version[: one.version.rindex(".") + 1] for one in RELEASES)
"""What the versions of these releases begin with: `0.32.`."""


def compatibility_table() -> str:
    """The releases as a Markdown table."""
    rows = [f"| {one.version} | {one.inline} | {one.pipelined} | {one.how} |" for one in RELEASES]
    return "\n".join(["| vLLM | in-line | pipelined | how it was run |", "|---|---|---|---|", *rows, ""])


def release() -> str:
    """Version of the running vLLM."""
    return str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))


def tried() -> bool:
    """Whether this package was run on the running vLLM's release."""
    return release().startswith(TRIED_RELEASES)


def warn_of_untried_release() -> None:
    """Log a warning if the running vLLM is of a release that this package was not run on."""
    if not tried():
        releases = ", ".join(release.rstrip(".") for release in TRIED_RELEASES)
        logger().warning("visionaccel was not run on vLLM %s (tried: %s).", release(), releases)
