"""What this package relies on in vLLM: `contract.toml` lists it, and the modules here are what uses most of it."""

from __future__ import annotations

import logging
import sys
from typing import Any

from visionaccel.core.safe_text import safe_logger

Mixin: Any = object
"""Base of classes that are mixed in before one of vLLM's; not `object` to mypy, which would miss what that has."""

__all__ = ["TRIED_RELEASES", "Mixin", "logger", "release", "share_log_handlers", "warn_of_untried_release"]

TRIED_RELEASES = ("0.28.", "0.29.", "0.30.", "0.31.", "0.32.", "0.33.")
"""What the versions of vLLM begin with that this package was run on, oldest first; see docs/compatibility.md."""


def logger() -> logging.Logger:
    """A logger below `vllm`, to which vLLM's handlers and levels apply in each of its processes."""
    return safe_logger("vllm.visionaccel")


def release() -> str:
    """Version of the running vLLM."""
    return str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))


def warn_of_untried_release() -> None:
    """Log a warning if the running vLLM is of a release that this package was not run on."""
    if not release().startswith(TRIED_RELEASES):
        tried = ", ".join(each.rstrip(".") for each in TRIED_RELEASES)
        logger().warning("visionaccel was not run on vLLM %s (tried: %s).", release(), tried)


def share_log_handlers() -> None:
    """Let the core's log lines appear among vLLM's, which sets up its logging after its plug-ins are loaded."""
    ours = logging.getLogger("visionaccel")
    if not any(isinstance(handler, _AmongVllms) for handler in ours.handlers):
        ours.addHandler(_AmongVllms())
    ours.setLevel(logging.DEBUG)
    ours.propagate = False


class _AmongVllms(logging.Handler):
    """Gives the core's records to vLLM's logger, with the handlers and level that it has then."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)
