"""What is used of vLLM's API server: how a request's error reaches its client, sizes of images, and `/metrics`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from visionaccel.errors import InputError
from visionaccel.integrations.vllm.compat import logger
from visionaccel.integrations.vllm.compat.wrapping import wrap_once

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

_SERVING = "vllm.entrypoints.generate.base.serving"


@contextmanager
def errors_for_clients() -> Iterator[None]:
    """Turn an `InputError` into one that is also a validation error of vLLM's; for a `with` or as a decorator.

    The API server answers a validation error with status 400 and its message. Later releases of vLLM may not do so for
    other ValueErrors.
    """
    try:
        yield
    except InputError as error:
        kind = type(error)
        refusal = getattr(import_module("vllm.exceptions"), "VLLMValidationError", InputError)  # not in every release
        if not isinstance(error, refusal):
            kind = type(kind.__name__, (kind, refusal), {"parameter": None, "value": None})
        raise kind(error.message, hint=error.hint) from error


def image_size(*, width: int, height: int) -> Any:
    """Return a size in pixels, as vLLM's processing information returns it."""
    return import_module("vllm.multimodal.parse").ImageSize(width=width, height=height)


class _Explained(str):
    """The finish reason `error`, with an explanation for the client."""

    reason = ""


def explain_errors() -> None:
    """Have this process's API server answer a failed completion with its stop reason, if it has one.

    vLLM answers with the reason from 0.33 on, and before with "Internal server error".
    """
    if takes_request_errors():
        return

    def wrapper(finish: Any) -> Any:
        def new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = finish(self, *args, **kwargs)
            if output.finish_reason == "error" and isinstance(output.stop_reason, str):
                _explain_to_clients()
                output.finish_reason = _Explained("error")
                output.finish_reason.reason = output.stop_reason
            return output

        return new_completion_output

    states = import_module("vllm.v1.engine.output_processor")
    wrap_once(getattr(states, "RequestState", None), "_new_completion_output", wrapper)


def _explain_to_clients() -> None:
    """Have this process's HTTP server, if it runs one, send explanations; called once an output has one."""
    serving: Any = sys.modules.get(_SERVING)

    def wrapper(complain: Any) -> Any:
        def raise_if_error(self: Any, finish_reason: str | None, request_id: str) -> None:
            if isinstance(finish_reason, _Explained):
                logger().error("Request %s failed: %s", request_id, finish_reason.reason)
                raise serving.GenerationError(finish_reason.reason)
            complain(self, finish_reason, request_id)

        return raise_if_error

    wrap_once(getattr(serving, "GenerateBaseServing", None), "_raise_if_error", wrapper)


def explain_pooling_errors() -> None:
    """Have a failed pooling request end with its error in this process, instead of with its empty result.

    From 0.33 on the API server looks at the error first, and only the offline `LLM` needs this.
    """
    state = import_module("vllm.v1.engine.output_processor").RequestState
    takes_error = "error" in inspect.signature(state.make_request_output).parameters  # from vLLM 0.32 on

    def wrapper(finish: Any) -> Any:
        def make_request_output(
            self: Any,
            new_token_ids: Any,
            pooling_output: Any,
            finish_reason: Any,
            stop_reason: Any,
            *args: Any,
            **named: Any,
        ) -> Any:
            failed = pooling_output is not None and isinstance(stop_reason, str) and str(finish_reason) == "error"
            if failed and takes_error:
                named["error"] = request_error(stop_reason)
            output = finish(self, new_token_ids, pooling_output, finish_reason, stop_reason, *args, **named)
            if failed and not takes_error:
                output.outputs = _FailedPooling(stop_reason)
            return output

        return make_request_output

    wrap_once(state, "make_request_output", wrapper)


class _FailedPooling:
    """The result of a failed pooling request. Reading its `data` raises vLLM's error for failed requests."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def data(self) -> Any:
        raise import_module(_SERVING).GenerationError(self._reason)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._reason!r})"


def request_error(reason: str) -> Any:
    """Return the error of a request that failed in the server; the API server answers with 500 and the reason."""
    return import_module("vllm.outputs").RequestError("vision_encoder", reason)


def takes_request_errors() -> bool:
    """Return whether the engine's outputs have a field for the error that the client gets."""
    return hasattr(import_module("vllm.v1.engine").EngineCoreOutput, "error")


def on_metrics(make: Callable[[], Collector]) -> None:
    """Show the metrics of the collector that `make` makes at this process's `/metrics`, if it serves any.

    A single API server answers from prometheus_client's default registry. Of several, each answers with a
    `MultiProcessCollector`, which then yields these metrics too.
    """
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    def wrapper(of_files: Any) -> Any:
        def collect(self: Any) -> Iterator[Any]:
            yield from of_files(self)
            yield from make().collect()

        return collect

    if wrap_once(MultiProcessCollector, "collect", wrapper):
        REGISTRY.register(make())
