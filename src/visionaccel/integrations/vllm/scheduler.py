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

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        failed: list[Request] = []
        if scheduler_output.scheduled_encoder_inputs:
            faults = self._faults.new()
            if faults:
                failed = self._end(scheduler_output, faults)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        compat.append_errors(outputs, failed)
        return outputs

    def _end(self, step: SchedulerOutput, faults: list[Fault]) -> list[Request]:
        """End every request that stands on a faulty encoder output and forget that output everywhere."""
        messages = {fault.key: fault.message for fault in faults}
        faulty: dict[str, str] = {}
        unmatched = set(messages)
        unknown: dict[str, str] = {}
        for request_id, indices in step.scheduled_encoder_inputs.items():
            request = self.requests.get(request_id)  # type: ignore[attr-defined]
            for index in indices if request is not None else ():
                identifier = request.mm_features[index].identifier
                pixels = compat.pixels_of(request, index)
                if pixels is None:
                    unknown[identifier] = " ".join(messages.values())
                    continue
                key = item_key(pixels[0], as_grids(pixels[1].reshape(-1, 3))[0])
                if key in messages:
                    faulty[identifier] = messages[key]
                    unmatched.discard(key)
        if unmatched:
            # Some faulty item cannot be told from its neighbours: a wrong answer would be worse than one error too
            # many.
            faulty = {**unknown, **faulty}
        requests = compat.holders(self, faulty)
        for request in requests:
            reasons = {faulty[f.identifier] for f in request.mm_features if f.identifier in faulty}
            compat.logger().error("Request %s ends with an error: %s", request.request_id, " ".join(sorted(reasons)))
        failed = compat.fail_requests(self, requests)
        for identifier in faulty:
            compat.forget_encoder_output(self, identifier)
        return failed


class ContainedScheduler(_Containment, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with contained encoder faults."""


class ContainedAsyncScheduler(_Containment, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with contained encoder faults."""
