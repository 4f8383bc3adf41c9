"""One link of a chain: an encoder with a deadline and a canary, opened when needed, and disabled while it fails."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

from visionaccel.backends import BreakerReport, FailureReport, Purpose
from visionaccel.bundle import Golden
from visionaccel.core.arrays import Array
from visionaccel.core.containment import device_errors, tell
from visionaccel.core.defaults import DEADLINE, OPEN_DEADLINE
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, DeviceLostError, InputError, VisionAccelError
from visionaccel.trust.breaker import Breaker, BreakerState
from visionaccel.trust.canary import Canary, CanaryResult
from visionaccel.trust.keeper import Keeper
from visionaccel.trust.threads import (
    LEAST,
    CutError,
    InOrder,
    LateError,
    WatchedCalls,
    call_alone,
    in_callers_stream,
    seconds_until,
)

logger = safe_logger(__name__)

_T = TypeVar("_T")

RETRY = "retry"
"""What has its turn after a link that is asked a second time, in reports."""

_CLOSING = 5.0
_GIVING_BACK = 15.0
_ENDING = 2.0
"""Seconds for a call to return once its device's process was ended."""

_STEP = "Lower VISIONACCEL_DEADLINE, send fewer images at a time, or raise vLLM's VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."
_LONGER = "Raise VISIONACCEL_DEADLINE if the device needs longer."
_WORDS = {
    BreakerState.OPEN: "is taken out of work",
    BreakerState.HALF_OPEN: "is probed; it was out of work",
    BreakerState.CLOSED: "works again",
}


class ChainLink:
    """An encoder with its breaker and its canary. Safe to use from several threads; several chains may share one.

    These hold on any schedule:

    - Every call through a link, be it for a request, a canary or to open it, in this process or in a child, returns
      within its deadline from the moment that it has its turn, or is ended with its process, or the link is disabled.
      The turn comes after at most one deadline for each call before it. This is the only deadline of a call.
    - No caller waits longer than that, not even one that closes the link.
    - A call that the end of the engine's step cuts off goes on: until it returns the link gets no other, and its own
      deadline still holds.
    - A disabled link is tried again in the background, after a delay that doubles each time; it gets work once its
      canary has passed.
    - No answer is used that was computed while the link was found to give wrong answers.

    Args:
        name: What to call it, such as the backend's name.
        encoder: The open encoder, or what opens it. A failure to open disables the link.
        canary: What it is tried with; by default its first answer.
        canary_on: Run the canary also before the first encode, after a restart of the device's process, and on a timer.
        interval: Seconds between two canaries on the timer; 0 for none.
        deadline: Seconds for each image of a call.
        open_deadline: Seconds for opening, and for each image of the first canary, which may compile.
        failures: As for `Breaker`.
        cool_down: As for `Breaker`.
        same: It computes the same numbers as the first of its chain.

    Attributes:
        breaker: Whether it gets work.
        encoder_if_open: The encoder, once it is open.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder | Callable[[], Encoder],
        *,
        canary: Canary | None = None,
        canary_on: bool = False,
        interval: float = 0.0,
        deadline: float = DEADLINE,
        open_deadline: float = OPEN_DEADLINE,
        failures: int = 5,
        cool_down: float = 1.0,
        same: bool = False,
    ) -> None:
        self.name, self.same = name, same
        self.deadline, self.open_deadline = deadline, open_deadline
        self._make = encoder if callable(encoder) else None
        self.encoder_if_open: Encoder | None = None if callable(encoder) else encoder
        self.breaker = Breaker(failures=failures, cool_down=cool_down, changed=self._breaker_changed)
        self._canary = canary or Canary()
        self._keeper = Keeper(self, self._canary, on=canary_on, interval=interval)
        self._calls = WatchedCalls(self.breaker.hasten)
        self._lock, self._telling, self._reports = threading.Lock(), threading.Lock(), InOrder("visionaccel-observers")
        self._closed = False
        self._distrusted = 0
        self._on_drift: list[Callable[[], None]] = []

    @property
    def ready(self) -> bool:
        """Whether it may be given work; it may have to be opened first."""
        return self.breaker.closed and not self.cut

    @property
    def may_try(self) -> bool:
        """Whether it may be given what would fail otherwise: it failed often, but neither hangs nor is proven wrong."""
        return not (self.breaker.proven or self.cut) and self.encoder_if_open is not None

    @property
    def cut(self) -> bool:
        """Whether a call that the end of a step has cut off has not returned."""
        return self._calls.cut

    @property
    def why_not(self) -> str:
        """Why it is given no work."""
        if self.breaker.closed:
            return f"{self.name} is still busy with what a step of the engine had no more time for"
        return f"{self.name} is out of work ({self.breaker.state.value}): {self.breaker.reason}"

    @property
    def restarts(self) -> int:
        """How often a process of its device was restarted."""
        encoder = self.encoder_if_open
        return 0 if encoder is None else sum(opened.session.restarts for opened in encoder.programs)

    def on_drift(self, forget: Callable[[], None]) -> None:
        """Have something called when wrong answers are found: what came from this link must not be kept."""
        self._on_drift.append(forget)

    def encode(
        self,
        patches: Array,
        grids: Sequence[Grid],
        queue_seconds: float | None = None,
        following: str | None = None,
        *,
        until: float | None = None,
        purpose: Purpose = "request",
    ) -> Array | VisionAccelError:
        """Embeddings as `Encoder.encode`, or what went wrong; never raises.

        Args:
            patches: [P, patch_width].
            grids: Checked grids.
            queue_seconds: How long the first item waited.
            following: What would have its turn if this fails, for reports.
            until: When to return in any case, on the monotonic clock.
            purpose: What it is for.
        """
        encoder = self.open(until, twice=True)
        if isinstance(encoder, VisionAccelError):
            return encoder
        distrusted = self._distrusted
        encode = partial(encoder.encode, patches, grids, purpose=purpose, queue_seconds=queue_seconds)
        seconds = self.deadline * max(1, len(grids))
        attempt = partial(self.call, in_callers_stream(patches, encode), seconds, until)
        answer: Array | VisionAccelError
        try:
            with device_errors("encoding"):
                answer = self._keeper.verified(encoder, attempt, until)
        except VisionAccelError as error:
            answer = error
        if self._distrusted != distrusted and not isinstance(answer, InputError):
            answer = DeviceError(f"{self.name} was found to give wrong answers during the call: {self.breaker.reason}")
        if not isinstance(answer, VisionAccelError):
            self.breaker.succeeded()
        elif not isinstance(answer, InputError):
            late = isinstance(answer, DeadlineError)
            device, kind = encoder.capabilities.device, type(answer).__name__
            after = None if late and following == RETRY else following
            report = FailureReport(encoder.backend, device, tuple(grids), kind, answer.message, after)
            tell(partial(encoder.hooks.visionaccel_failed, report=report))
            if not late:  # which has disabled it already
                self.breaker.failed(answer.message)
        return answer

    def check(self) -> CanaryResult:
        """Run the canary on the open encoder now; a link with wrong answers is disabled."""
        assert self.encoder_if_open is not None
        return self._keeper.check(self.encoder_if_open)

    def open(
        self, until: float | None = None, *, probing: bool = False, twice: bool = False
    ) -> Encoder | VisionAccelError:
        """The encoder, or why there is none. If it is not open, one caller opens it while the others wait.

        An opening that is late goes on, and the encoder is used once it is there. Only a probe opens what failed to
        open before. A request, which nothing else may be able to serve, has it tried twice.
        """
        if self.encoder_if_open is not None:
            return self.encoder_if_open
        try:
            encoder = self._calls.call(partial(self._opened, probing, twice), self.open_deadline, until=until)
            if encoder is not None:
                return encoder
            not_now = "It could not be opened"
        except CutError:
            not_now = "It is still being opened"
        except LateError as late:
            message = f"{self.name} was not opened within {self.open_deadline:.3g} s. {late}".rstrip()
            hint = "Raise VISIONACCEL_OPEN_DEADLINE if it needs longer, such as to compile."
            return self._not_opened(DeadlineError(message, hint=hint), probing, twice)
        except VisionAccelError as error:
            return self._not_opened(error, probing, twice)
        except Exception as error:  # such as that no thread can be started: a request must survive it
            message = f"opening {self.name} failed with {type(error).__name__}: {error}"
            return self._not_opened(DeviceError(message), probing, twice)
        return DeviceError(
            f"{self.name}: {not_now}. {self.breaker.reason}".strip(), hint="It is tried again soon; see the log."
        )

    def call(self, function: Callable[[], _T], seconds: float, until: float | None) -> _T:
        """What a call of the open encoder returns or raises: the one place where a deadline ends a call.

        Raises:
            DeadlineError: If it does not return within its seconds or by `until`, or had no time.
            DeviceLostError: If it was ended.
        """
        if until is not None and until - time.monotonic() < min(LEAST, seconds):
            raise no_time()
        encoder = self.encoder_if_open
        assert encoder is not None
        device = encoder.capabilities.device
        safe = all(opened.session.capabilities.thread_safe for opened in encoder.programs)
        try:
            with self._calls.turn(function, places=sys.maxsize if safe else 1, until=until) as call:
                limit = time.monotonic() + seconds
                stop = limit if until is None else min(limit, until)
                if wait([call], seconds_until(stop)).done:
                    return call.result()
                if stop == limit and self._ended(encoder, call, until):
                    return _result_of_ended(call, device, seconds)
                if until is None or time.monotonic() < until:
                    raise LateError
        except CutError:
            raise DeadlineError(f"device {device!r} was busy while there was time.", hint="Try again later.") from None
        except LateError as late:
            if self._closed:
                raise self._is_closed() from None
            raise self._hung(device, seconds, late) from None
        call_alone(
            partial(self._judge, encoder, call, limit, seconds)
        )  # it may still end, which its caller cannot await
        raise DeadlineError(f"the engine's step had no more time before device {device!r} answered.", hint=_STEP)

    def distrust(self, reason: str, evidence: Golden | None = None) -> None:
        """A wrong answer was found: disable the link, and have what came from it forgotten, calls in progress included.

        The link must get the evidence, an image with its correct answer, right before it gets work again.
        """
        if evidence is not None:
            self._canary.remember(evidence)
        with self._lock:
            self._distrusted += 1
        self.breaker.trip(reason)
        self.forget()

    def forget(self) -> None:
        """Have what came from it forgotten."""
        for forget in self._on_drift:
            forget()

    def close(self, wait: float | None = None) -> None:
        """Give back the device, and end what looks after it.

        Args:
            wait: Seconds to wait for a call in progress, at most its deadline, but not for one that is late already. A
                call that does not return by then keeps the device until it does.
        """
        with self._lock:
            self._closed, encoder = True, self.encoder_if_open
        wait = self.deadline if wait is None else min(wait, self.deadline)
        self._keeper.close(min(wait, _CLOSING))
        self._calls.close(wait)
        if encoder is None:
            return
        try:
            given_back = call_alone(partial(encoder.close, 0.0)).result(_GIVING_BACK)
        except TimeoutError:
            given_back = False
        if not given_back:
            logger.warning("A call of encoder %r does not return; it keeps its device.", encoder.backend)

    def _opened(self, probing: bool, twice: bool) -> Encoder | None:
        """The encoder, opened now if no other caller has; None if only a probe may open it."""
        if self.encoder_if_open is not None or not (probing or self.breaker.closed):
            return self.encoder_if_open
        try:
            encoder = self._made()
        except DeviceError as error:
            if not (twice and worth_a_retry(error)):
                raise
            logger.warning("Opening encoder %r failed and is tried once more: %s", self.name, error)
            encoder = self._made()  # memory that was short may be free by now
        with self._lock:
            if not self._closed:
                self.encoder_if_open = encoder
                return encoder
        encoder.close(0.0)
        raise self._is_closed()

    def _made(self) -> Encoder:
        assert self._make is not None
        with device_errors(f"opening {self.name}"):
            return self._make()

    def _not_opened(self, error: VisionAccelError, probing: bool, twice: bool) -> VisionAccelError:
        if self._closed:
            return self._is_closed()
        if not probing:
            self.breaker.trip(f"it cannot be opened: {error.message}")
        return DeviceError(f"{self.name} cannot be opened: {error.message}", hint=error.hint) if twice else error

    def _is_closed(self) -> DeviceError:
        return DeviceError(f"{self.name} is closed.", hint="Open a new one.")

    def _ended(self, encoder: Encoder, call: Future[Any], until: float | None = None) -> bool:
        """End a call that is past its deadline, if its device can be ended; whether it has returned, by `until`."""
        ended = [opened.session.end_calls() for opened in encoder.programs]
        seconds = _ENDING if until is None else min(_ENDING, seconds_until(until))
        return any(ended) and bool(wait([call], seconds).done)

    def _judge(self, encoder: Encoder, call: Future[Any], limit: float, seconds: float) -> None:
        """Judge a call that goes on although its step has ended: at its limit, or when it returns."""
        if not (wait([call], seconds_until(limit)).done or self._ended(encoder, call)):
            self._hung(encoder.capabilities.device, seconds)
            return
        error = call.exception()
        if isinstance(error, VisionAccelError) and not isinstance(error, InputError):
            self.breaker.failed(error.message)

    def _hung(self, device: str, seconds: float, why: object = "") -> DeadlineError:
        """Open the breaker, as a call did not return in time; the error that says so."""
        error = DeadlineError(
            f"device {device!r} did not answer within {seconds:.3g} s. {why}".rstrip(),
            hint=f"{_LONGER} VISIONACCEL_ISOLATION=process ends what hangs.",
        )
        if not self._closed:
            self.breaker.trip(error.message, hangs=True)
        return error

    def _breaker_changed(self, _: BreakerState, reason: str) -> None:
        if self._closed:  # a probe that closing has ended says nothing of the device
            return
        with self._telling:  # several changes may come at once: the last report is the state
            state, encoder = self.breaker.state, self.encoder_if_open
            level = logging.INFO if state is BreakerState.HALF_OPEN else logging.WARNING
            logger.log(level, "Encoder %r %s: %s", self.name, _WORDS[state], reason)
            if encoder is not None and encoder.hooks.visionaccel_breaker.get_hookimpls():
                report = BreakerReport(encoder.backend, encoder.capabilities.device, state.value, reason)
                self._reports.add(partial(tell, partial(encoder.hooks.visionaccel_breaker, report=report)))
        if state is BreakerState.OPEN:
            self._keeper.wake()


def _result_of_ended(call: Future[_T], device: str, seconds: float) -> _T:
    """What a call that was ended past its deadline returned all the same, or an error that says so."""
    try:
        return call.result()
    except DeviceError as lost:
        message = f"device {device!r} did not answer within {seconds:.3g} s; its call was ended. {lost.message}"
        raise DeviceLostError(message, hint=f"{_LONGER} {lost.hint or ''}".rstrip()) from None


def worth_a_retry(error: VisionAccelError) -> bool:
    """Whether what failed may succeed the second time. What was late, or ended its process, may do that again."""
    return isinstance(error, DeviceError) and not isinstance(error, DeadlineError | DeviceLostError)


def no_time() -> DeadlineError:
    """The error of an image for which the engine's step has no time left."""
    return DeadlineError("the engine's step has no time left for it.", hint=_STEP)
