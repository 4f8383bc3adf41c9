"""The API server's insides: how a request's error reaches its client."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from visionaccel.integrations.vllm.compat.releases import logger

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

__all__ = ["explain_errors", "on_metrics"]


class _Explained(str):
    """The finish reason `error`, with what happened."""

    reason: str

    def __new__(cls, reason: str) -> _Explained:
        explained = super().__new__(cls, "error")
        explained.reason = reason
        return explained


def explain_errors() -> None:
    """Have the API server of this process answer a failed request with its stop reason, where there is one.

    vLLM answers every failed request with "Internal server error". Where its classes are not what they were, that
    stays.
    """
    state = getattr(import_module("vllm.v1.engine.output_processor"), "RequestState", None)
    finish = getattr(state, "_new_completion_output", None)
    if state is None or finish is None or hasattr(finish, "__wrapped__"):
        return

    @functools.wraps(finish)
    def new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = finish(self, *args, **kwargs)
        if output.finish_reason == "error" and isinstance(output.stop_reason, str):
            _explain_to_clients()
            output.finish_reason = _Explained(output.stop_reason)
        return output

    state._new_completion_output = new_completion_output


def on_metrics(make: Callable[[], Collector]) -> None:
    """Show a collector's metrics in the `/metrics` of this process, if it answers any.

    One API server answers from prometheus_client's own registry. Several answer each request from what the processes
    have in files, by a collector that is made for it: there it is that collector which brings these metrics.

    Args:
        make: Makes the collector.
    """
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    of_files: Any = MultiProcessCollector.collect
    if hasattr(of_files, "__wrapped__"):
        return

    @functools.wraps(of_files)
    def collect(self: Any) -> Iterator[Any]:
        yield from of_files(self)
        yield from make().collect()

    MultiProcessCollector.collect = collect  # type: ignore[method-assign]
    REGISTRY.register(make())


def _explain_to_clients() -> None:
    """Once an output has an explanation, have what answers HTTP requests look for it; nothing if nothing does here."""
    serving: Any = sys.modules.get("vllm.entrypoints.generate.base.serving")
    kind = getattr(serving, "GenerateBaseServing", None)
    complain = getattr(kind, "_raise_if_error", None)
    if kind is None or complain is None or hasattr(complain, "__wrapped__"):
        return

    @functools.wraps(complain)
    def raise_if_error(self: Any, finish_reason: str | None, request_id: str) -> None:
        if isinstance(finish_reason, _Explained):
            logger().error("Request %s failed: %s", request_id, finish_reason.reason)
            raise serving.GenerationError(finish_reason.reason)
        complain(self, finish_reason, request_id)

    kind._raise_if_error = raise_if_error
