"""vLLM's schedulers, with one thing more: a request whose image could not be encoded ends with an error, alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from visionaccel.grid import as_grids
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.faults import Fault, FaultReader, item_key

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

__all__ = ["ContainedAsyncScheduler", "ContainedScheduler"]


class _Containment:
    """Mixed in before a scheduler: looks for faults after a step, before the step's tokens are accepted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._faults = FaultReader()
        self._encoding: dict[int, list[compat.ScheduledItem]] = {}

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        step: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if step.scheduled_encoder_inputs:
            # Kept from now on: a request may be aborted before its step returns, and its caches would outlive it.
            self._encoding[id(step)] = compat.scheduled_items(self, step)
        return step

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        failed: list[Request] = []
        if id(scheduler_output) in self._encoding:
            faults = self._faults.new()
            if faults:
                failed = self._contain(faults)
            del self._encoding[id(scheduler_output)]
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        compat.append_errors(outputs, failed)
        return outputs

    def _contain(self, faults: list[Fault]) -> list[Request]:
        """End every request that stands on a faulty encoder output, and forget that output everywhere.

        The worker may be steps ahead of the one whose output is being taken, so all steps in flight are looked at.
        """
        faulty = _faulty([item for step in self._encoding.values() for item in step], faults)
        requests = compat.holders(self, faulty)
        for request, identifiers in requests.items():
            reasons = " ".join(sorted({faulty[identifier] for identifier in identifiers}))
            compat.logger().error("Request %s ends with an error: %s", request.request_id, reasons)
        failed = compat.fail_requests(self, requests)
        compat.forget_prefixes(self)
        for identifier in faulty:
            compat.forget_encoder_output(self, identifier)
        return failed


def _faulty(items: list[compat.ScheduledItem], faults: list[Fault]) -> dict[str, str]:
    """Identifiers of the faulty ones among `items` and why each failed."""
    messages = {fault.key: fault.message for fault in faults}
    found: dict[str, str] = {}
    matched = set()
    for item in items:
        if item.pixels is not None:
            key = item_key(item.pixels, as_grids(item.grid)[0])
            if key in messages:
                found[item.identifier] = messages[key]
                matched.add(key)
    if matched != set(messages):
        # Some faulty item cannot be told from its neighbours: one error too many is better than one wrong answer.
        return dict.fromkeys((item.identifier for item in items), " ".join(messages.values())) | found
    return found


class ContainedScheduler(_Containment, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with contained encoder faults."""


class ContainedAsyncScheduler(_Containment, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with contained encoder faults."""
