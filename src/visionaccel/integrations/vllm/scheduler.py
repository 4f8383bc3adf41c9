"""vLLM's schedulers, extended: if an image cannot be encoded, only the requests that contain it end, with an error."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from visionaccel.core.grid import as_grids
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import engine_config, scheduling
from visionaccel.integrations.vllm.compat.scheduling import AsyncScheduler, Request, RequestStatus, Scheduler
from visionaccel.integrations.vllm.connector import VisionAccelConnector
from visionaccel.integrations.vllm.encoder_source import Replacement
from visionaccel.integrations.vllm.shared_memory import ALL_ITEMS, LOST, REPLACED, Fault, FaultReader
from visionaccel.observe import TraceLog
from visionaccel.service import item_key
from visionaccel.settings import load_settings

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

_DISCARDED = "the vision encoder{} while this request was running, so the answer was discarded. Retry the request."


class _Containment(compat.Mixin):  # type: ignore[misc]
    """A mixin for a scheduler: it reads faults after each step, before the step's tokens are accepted.

    By then a worker may be steps ahead, and requests may have been aborted or preempted. So what each step encodes and
    computes is recorded when the step is scheduled.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        served = engine_config.served_model(self.vllm_config)
        self._faults, self._dtype = FaultReader(served.engine), served.dtype
        self._in_flight: list[scheduling.StepInFlight] = []
        self._item_faults: list[Fault] = []
        self._orders: list[Replacement] = []
        self._wrong_results = False
        self._failed: list[tuple[Request, str]] = []  # requests whose error is to be sent to their clients, and why
        self._forgotten: set[str] = set()  # encoder outputs that workers must drop
        trace = load_settings().trace
        self._trace = None if trace is None else TraceLog.install(trace)
        connector: Any = self.ec_connector
        self._connector = connector if isinstance(connector, VisionAccelConnector) else None
        if self._connector is not None:
            self._connector.scheduler_forgets = True
            if scheduling.shows_encoder_cache(self):
                self._connector.holders = partial(scheduling.encoder_cache_holders, self)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        began = time.monotonic()
        self._read_faults()
        self._take_replacements()
        if self._distrusted():
            self._recompute()
        step: SchedulerOutput = super().schedule(*args, **kwargs)
        # Workers drop these before they encode in this step. vLLM leaves out what the step allocates again, but a
        # worker that still has it might not encode it.
        dropped = step.free_encoder_mm_hashes
        dropped.extend(self._forgotten.difference(dropped))
        self._forgotten.clear()
        self._in_flight.append(scheduling.step_in_flight(self, step, began))
        return step

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        if self._connector is not None:
            self._fail(self._connector.take_failures())
        place = next((i for i, record in enumerate(self._in_flight) if record.step is scheduler_output), None)
        began = None
        if place is not None:
            del self._in_flight[:place]  # outputs come in order, so earlier steps have none
            if self._in_flight[0].items:
                self._read_faults()
                self._contain()
            began = self._in_flight.pop(0).began
        # Before this step's tokens are accepted: they are then computed again, and their requests need no error. Only a
        # vLLM whose requests have this attribute drops the tokens of steps in flight.
        drops_tokens = any(hasattr(request, "drop_stale_output") for request in self.requests.values())
        if drops_tokens and self._distrusted():
            self._recompute()
        failed, self._failed = self._failed, []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        scheduling.append_errors(outputs, failed)
        tokens = scheduler_output.num_scheduled_tokens
        if self._trace is not None and began is not None and tokens:
            what = f"{sum(tokens.values())} tokens of {len(tokens)} requests"
            self._trace.slice("engine steps", "decode", what, began, time.monotonic() - began)
        return outputs

    def shutdown(self) -> None:
        self._faults.close()
        super().shutdown()

    def _read_faults(self) -> None:
        """Sort what workers reported since the last call."""
        encoding = any(record.items for record in self._in_flight)
        for fault in self._faults.new():
            if fault.key == ALL_ITEMS:
                self._wrong_results = True
            elif fault.key == REPLACED:
                self._orders.append(Replacement.loads(fault.message))
            elif encoding or fault is not LOST:
                self._item_faults.append(fault)

    def _take_replacements(self) -> None:
        """Encode with the weights that vLLM loaded since the last step, and forget what was computed before."""
        orders, self._orders = self._orders, []
        if not orders:
            return
        if self._connector is not None:
            for order in orders:
                self._connector.replace_encoder(order)
        compat.logger().warning("The vision encoder's weights were replaced: results of the old weights are dropped.")
        self._forget_computed(_DISCARDED.format("'s weights were replaced"))

    def _distrusted(self) -> bool:
        """Return whether the encoder was distrusted since the last call; it may have been wrong for an unknown time."""
        reported, self._wrong_results = self._wrong_results, False
        return (self._connector is not None and self._connector.take_distrust()) or reported

    def _recompute(self) -> None:
        compat.logger().error("The vision encoder returned wrong results: everything computed from them is dropped.")
        self._forget_computed(_DISCARDED.format(" failed its self-check"))

    def _forget_computed(self, reason: str) -> None:
        """Drop everything that was computed from embeddings, and compute requests again from their images on.

        A request with media whose answer has begun ends with an error, because its tokens cannot be taken back.
        """
        requests = self.requests.items()
        answered = [name for name, request in requests if request.mm_features and request.num_output_tokens > 0]
        self._fail(dict.fromkeys(answered, reason))
        self._forgotten |= scheduling.recompute_all(self)

    def _fail(self, reasons: dict[str, str]) -> None:
        """End requests with an error, each with its reason."""
        if reasons:
            failed = self.finish_requests(list(reasons), RequestStatus.FINISHED_ERROR)
            self._failed += [(request, reasons[request.request_id]) for request in failed]

    def _contain(self) -> None:
        """End every request that depends on a faulty encoder output, and forget that output everywhere."""
        faults, self._item_faults = self._item_faults, []
        if not faults:
            return
        faulty = _faulty((item for step in self._in_flight for item in step.items), faults, self._dtype)
        reasons = {}
        for name, identifiers in scheduling.requests_at_stake(self, self._in_flight, faulty).items():
            messages = " ".join(sorted({faulty[identifier] for identifier in identifiers}))
            reasons[name] = f"an image of the prompt could not be encoded: {messages}"
            compat.logger().error("Request %s ends with an error: %s", name, messages)
        self._fail(reasons)
        scheduling.forget_prefixes(self)
        for identifier in faulty:
            scheduling.forget_encoder_output(self, identifier)
        self._forgotten |= faulty.keys()


def _faulty(items: Iterable[scheduling.ScheduledItem], faults: list[Fault], dtype: torch.dtype) -> dict[str, str]:
    """Return the identifiers of the faulty items, and why each failed; `dtype` is that of the language model."""
    messages = {fault.key: fault.message for fault in faults}
    found: dict[str, str] = {}
    seen, matched = set(), set()
    for item in items:
        seen.add(item.identifier)
        if item.pixels is not None:
            (grid,) = as_grids(item.grid)
            # Some models cast pixels before they call their tower. If nothing is cast, both are one tensor.
            keys = {item_key(pixels, grid) for pixels in {item.pixels, item.pixels.to(dtype)}} & messages.keys()
            if keys:
                found[item.identifier] = " ".join(sorted({messages[key] for key in keys}))
                matched |= keys
    if matched != set(messages):
        # It is not known which item is faulty: one error too many is better than one wrong answer.
        return dict.fromkeys(seen, " ".join(messages.values())) | found
    return found


class ContainedScheduler(_Containment, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with containment."""


class ContainedAsyncScheduler(_Containment, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with containment."""
