"""vLLM's schedulers, which end only the requests whose image could not be encoded, with an error."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from visionaccel.core.grid import as_grids
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import AsyncScheduler, Scheduler, engine_config, scheduling
from visionaccel.integrations.vllm.inline.fault_channel import ALL_ITEMS, LOST, REPLACED, Fault, FaultReader
from visionaccel.integrations.vllm.pipelined.connector import VisionAccelConnector
from visionaccel.integrations.vllm.reloading import Replacement
from visionaccel.observe import TraceLog
from visionaccel.service import item_key
from visionaccel.settings import load_settings

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

_MISREAD = (
    "the vision encoder failed its self-check while this request was running, so the answer was discarded. Retry the "
    "request."
)

_REPLACED = (
    "the vision encoder's weights were replaced while this request was running, so the answer was discarded. Retry the "
    "request."
)


class _Containment(compat.Mixin):  # type: ignore[misc]
    """Mixed in before a scheduler: looks for faults after a step, before the step's tokens are accepted.

    A worker may be steps ahead of the one whose output is taken, and requests may be aborted or preempted before, so
    what each step in flight encodes and computes is recorded when it is scheduled.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._faults = FaultReader(engine_config.engine_id(self.vllm_config))
        self._in_flight: list[scheduling.StepInFlight] = []
        self._pending: list[Fault] = []
        self._ended: list[Request] = []
        self._reasons: dict[str, str] = {}
        self._forgotten: set[str] = set()
        trace = load_settings().trace
        self._trace = None if trace is None else TraceLog.install(trace)
        self._begun: dict[int, float] = {}
        connector: Any = self.ec_connector
        self._connector = connector if isinstance(connector, VisionAccelConnector) else None
        if self._connector is not None:
            self._connector.scheduler_forgets = True
        if self._connector is not None and scheduling.shows_encoder_cache(self):
            self._connector.attach(partial(scheduling.encoder_cache_state, self))

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        began = time.monotonic()
        encoding = any(record.items for record in self._in_flight)
        self._pending += [fault for fault in self._faults.new() if encoding or fault is not LOST]
        self._take_replacements()
        if self._distrusted():
            self._recompute()
        step: SchedulerOutput = super().schedule(*args, **kwargs)
        scheduling.free_in_worker(step, self._forgotten)
        self._forgotten.clear()
        record = scheduling.step_in_flight(self, step)
        self._in_flight.append(record)
        if self._trace is not None:
            self._begun[id(step)] = began
        return step

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        failed, reasons = self._fail_unencoded()
        place = next((i for i, record in enumerate(self._in_flight) if record.step is scheduler_output), None)
        if place is not None:
            del self._in_flight[:place]  # Outputs come in order: earlier steps have none.
            faults = self._new_faults() if self._in_flight[0].items else []
            if faults:
                failed += self._contain(faults, reasons)
            del self._in_flight[0]
        # Before this step's tokens are accepted: they are then computed again, and need not end with an error.
        if scheduling.drops_tokens_in_flight(self) and self._distrusted():
            self._recompute()
        failed += self._ended
        reasons |= self._reasons
        self._ended, self._reasons = [], {}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        scheduling.append_errors(outputs, failed, reasons)
        if self._trace is not None:
            self._note_step(self._trace, scheduler_output)
        return outputs

    def shutdown(self) -> None:
        self._faults.close()
        super().shutdown()

    def _new_faults(self) -> list[Fault]:
        found = [*self._pending, *self._faults.new()]
        self._pending = [fault for fault in found if fault.key in (ALL_ITEMS, REPLACED)]  # not about single items
        return [fault for fault in found if fault.key not in (ALL_ITEMS, REPLACED)]

    def _take_replacements(self) -> None:
        """Before anything is scheduled: encode with the weights that workers were given since, and forget what was.

        Workers report when vLLM loads new weights into the model, which it does between two steps.
        """
        orders = [Replacement.loads(fault.message) for fault in self._pending if fault.key == REPLACED]
        if not orders:
            return
        self._pending = [fault for fault in self._pending if fault.key != REPLACED]
        if self._connector is not None:
            for order in orders:
                self._connector.replace_encoder(order)
        compat.logger().warning("The vision encoder's weights were replaced: what was computed from it is forgotten.")
        self._forget_computed(_REPLACED)

    def _distrusted(self) -> bool:
        """Whether the encoder was distrusted since the last call: it may have been wrong for an unknown time."""
        reported = any(fault.key == ALL_ITEMS for fault in self._pending)
        self._pending = [fault for fault in self._pending if fault.key != ALL_ITEMS]
        return (self._connector is not None and self._connector.take_distrust()) or reported

    def _recompute(self) -> None:
        """Keep nothing that was computed from embeddings which may be wrong.

        Waiting and running requests are computed again, from their images on. A request whose image may have been
        misread and whose answer has begun ends with an error: its tokens cannot be taken back.
        """
        compat.logger().error("The vision encoder returned wrong results: everything computed from them is dropped.")
        self._forget_computed(_MISREAD)

    def _forget_computed(self, reason: str) -> None:
        begun = scheduling.answered_with_media(self)
        self._ended += scheduling.fail_requests(self, begun)
        self._reasons |= dict.fromkeys(begun, reason)
        self._forgotten |= scheduling.recompute_all(self)

    def _note_step(self, trace: TraceLog, step: SchedulerOutput) -> None:
        """Put a step on the timeline, from its scheduling to its tokens."""
        began, tokens = self._begun.pop(id(step), None), step.num_scheduled_tokens
        if began is not None and tokens:
            what = f"{sum(tokens.values())} tokens of {len(tokens)} requests"
            trace.slice("engine steps", "decode", what, began, time.monotonic() - began)

    def _fail_unencoded(self) -> tuple[list[Request], dict[str, str]]:
        """End the requests that wait for an image which could not be encoded; and what to tell their clients."""
        failures = self._connector.take_failures() if self._connector is not None else {}
        reasons = {name: failure.message for name, failure in failures.items()}
        return scheduling.fail_requests(self, failures) if failures else [], reasons

    def _contain(self, faults: list[Fault], reasons: dict[str, str]) -> list[Request]:
        """End every request that depends on a faulty encoder output, and forget that output everywhere.

        What to tell the clients is added to `reasons`, by request.
        """
        faulty = _faulty((item for step in self._in_flight for item in step.items), faults)
        at_stake = scheduling.requests_at_stake(self, self._in_flight, faulty)
        for name, identifiers in at_stake.items():
            messages = " ".join(sorted({faulty[identifier] for identifier in identifiers}))
            reasons[name] = f"an image of the prompt could not be encoded: {messages}"
            compat.logger().error("Request %s ends with an error: %s", name, messages)
        failed = scheduling.fail_requests(self, at_stake)
        scheduling.forget_prefixes(self)
        for identifier in faulty:
            scheduling.forget_encoder_output(self, identifier)
        self._forgotten |= faulty.keys()
        return failed


def _faulty(items: Iterable[scheduling.ScheduledItem], faults: list[Fault]) -> dict[str, str]:
    """Identifiers of the faulty ones among `items` and why each failed."""
    messages = {fault.key: fault.message for fault in faults}
    found: dict[str, str] = {}
    seen, matched = set(), set()
    for item in items:
        seen.add(item.identifier)
        if item.pixels is not None:
            key = item_key(item.pixels, as_grids(item.grid)[0])
            if key in messages:
                found[item.identifier] = messages[key]
                matched.add(key)
    if matched != set(messages):
        # A faulty item cannot be told from its neighbours: one error too many is better than one wrong answer.
        return dict.fromkeys(seen, " ".join(messages.values())) | found
    return found


class ContainedScheduler(_Containment, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with contained encoder faults."""


class ContainedAsyncScheduler(_Containment, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with contained encoder faults."""
