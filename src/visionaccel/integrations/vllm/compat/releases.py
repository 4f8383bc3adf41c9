"""Releases of vLLM."""

from __future__ import annotations

import logging
import sys

__all__ = ["TRIED_RELEASES", "logger", "release", "share_log_handlers", "tried", "warn_of_untried_release"]

TRIED_RELEASES = ("0.28.", "0.29.", "0.30.", "0.31.", "0.32.")
"""Releases that this package was run on."""


def logger() -> logging.Logger:
    """A logger below `vllm`, so that vLLM's handlers and levels apply in each of its processes."""
    return logging.getLogger("vllm.visionaccel")


def share_log_handlers() -> None:
    """Let the core's log lines appear among vLLM's."""
    ours, theirs = logging.getLogger("visionaccel"), logging.getLogger("vllm")
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = not ours.handlers


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
