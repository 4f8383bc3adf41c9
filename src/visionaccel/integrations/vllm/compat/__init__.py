"""Every private name of vLLM that this package relies on.

Run on the releases of `releases.TRIED_RELEASES`, on the last of them in every test. The classes that this package
subclasses are attributes of this module, imported on first use: it must cost nothing in vLLM's processes that need none
of them.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from visionaccel.core.safe_text import safe_logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler as AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler as Scheduler

    Mixin: Any = object  # so that what the class of vLLM's has is not missed
else:
    Mixin = object

__all__ = ["Mixin", "logger", "share_log_handlers"]

_HOMES = {
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "ECConnectorBase": "vllm.distributed.ec_transfer.ec_connector.base",
    "ECConnectorMetadata": "vllm.distributed.ec_transfer.ec_connector.base",
    "ECConnectorRole": "vllm.distributed.ec_transfer.ec_connector.base",
    "ImageSize": "vllm.multimodal.parse",
    "MULTIMODAL_REGISTRY": "vllm.multimodal",
    "Scheduler": "vllm.v1.core.sched.scheduler",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def logger() -> logging.Logger:
    """A logger below `vllm`, so that vLLM's handlers and levels apply in each of its processes."""
    return safe_logger("vllm.visionaccel")


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
