"""What this package relies on in vLLM. `contract.toml` lists it, and most of it is used in the modules here."""

from __future__ import annotations

import logging
import sys
from typing import Any

from visionaccel.core.safe_text import safe_logger

Mixin: Any = object
"""Base of the mixins for vLLM's classes. As `Any`, it makes mypy accept the attributes that those classes add."""

__all__ = ["TRIED_RELEASES", "Mixin", "logger", "release", "share_log_handlers", "warn_of_untried_release"]

TRIED_RELEASES = ("0.28.", "0.29.", "0.30.", "0.31.", "0.32.", "0.33.")
"""Version prefixes of the releases of vLLM that this package was run on, oldest first; see docs/compatibility.md."""


def logger() -> logging.Logger:
    """Return a logger below `vllm`, to which vLLM's handlers and levels apply in each of its processes."""
    return safe_logger("vllm.visionaccel")


def release() -> str:
    """Version of the running vLLM."""
    return str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))


def warn_of_untried_release() -> None:
    """Log a warning if this package was not run on the running vLLM's release."""
    if not release().startswith(TRIED_RELEASES):
        tried = ", ".join(each.rstrip(".") for each in TRIED_RELEASES)
        logger().warning("visionaccel has not been tested on vLLM %s (tested: %s).", release(), tried)


def share_log_handlers() -> None:
    """Send the core's log records to vLLM's handlers, which vLLM only sets up after it has loaded its plug-ins."""
    ours = logging.getLogger("visionaccel")
    if not any(isinstance(handler, _ToVllm) for handler in ours.handlers):
        ours.addHandler(_ToVllm())
    ours.setLevel(logging.DEBUG)
    ours.propagate = False


class _ToVllm(logging.Handler):
    """Passes records on to vLLM's logger, with the handlers and level that it has by then."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)
