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
