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
"""In reports, what is next if the same link tries again."""

_CLOSING = 5.0
_GIVING_BACK = 15.0
_ENDING = 2.0
"""Seconds for a call to return after its device's process was ended."""

_STEP = "Lower VISIONACCEL_DEADLINE, send fewer images at a time, or raise vLLM's VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."
_LONGER = "Raise VISIONACCEL_DEADLINE if the device needs longer."
_WORDS = {
    BreakerState.OPEN: "is disabled",
    BreakerState.HALF_OPEN: "is being probed; it was disabled",
    BreakerState.CLOSED: "is enabled again",
}


class ChainLink:
    """An encoder with its breaker and its canary. Safe to use from several threads; several chains may share one.

    These rules hold on any schedule:

    - Every call through a link (a request, a canary or the opening itself, in this process or in a child) returns
      within its deadline, or is ended with its process, or the link is disabled. The deadline counts from when the call
      begins, which is after at most one deadline for each earlier call. A call has no other deadline.
    - No caller waits longer than that, not even one that closes the link.
    - A call that outlasts the engine's step goes on: until it returns the link receives no other call, and its deadline
      still holds.
    - A disabled link is tried again in the background, after a delay that doubles each time; it is enabled once its
      canary has passed.
    - An answer is discarded if the link was found to give wrong answers during the call.

    Args:
        name: The link's name in messages, such as the backend's name.
        encoder: The open encoder, or a function that opens it. A failure to open disables the link.
        canary: The canary; by default one that compares later answers with the encoder's first.
        canary_on: Run the canary also before the first encode, after a restart of the device's process, and on a timer.
        interval: Seconds between two canaries on the timer; 0 for no timer.
        deadline: Seconds for each image of a call.
        open_deadline: Seconds for opening, and for each image of the first canary, which may compile.
        failures: See `Breaker`.
        cool_down: See `Breaker`.
        same: Whether it computes the same numbers as the first link of its chain.

    Attributes:
        breaker: Disables and enables the link.
        encoder_if_open: The encoder; None until it is open.
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
        """Whether it is healthy and free; it may have to be opened first."""
        return self.breaker.closed and not self.cut

    @property
    def may_try(self) -> bool:
        """Whether it can be used as a last choice: it may have failed often, but neither hangs nor answers wrong."""
        return not (self.breaker.proven or self.cut) and self.encoder_if_open is not None

    @property
    def cut(self) -> bool:
        """Whether a call that outlasted its engine's step is still in progress."""
        return self._calls.cut

    @property
    def why_not(self) -> str:
        """Why it is not ready."""
        if self.breaker.closed:
            return f"{self.name} is still busy with an encode that did not end within its engine's step"
        return f"{self.name} is disabled ({self.breaker.state.value}): {self.breaker.reason}"

    @property
    def restarts(self) -> int:
        """How often a process of its device was restarted."""
        encoder = self.encoder_if_open
        return 0 if encoder is None else sum(opened.session.restarts for opened in encoder.programs)

    def on_drift(self, forget: Callable[[], None]) -> None:
        """Register a function to call when wrong answers are found: it must drop what this link has computed."""
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
        """Return embeddings like `Encoder.encode`, or the error; never raises.

        Args:
            patches: [P, patch_width].
            grids: Checked grids.
            queue_seconds: How long the first item waited.
            following: The encoder that is next if this one fails, for reports.
            until: The latest time to return, on the monotonic clock.
            purpose: The encode's purpose, for reports.
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
            if not late:  # a late call has disabled the link already
                self.breaker.failed(answer.message)
        return answer

    def check(self) -> CanaryResult:
        """Run the canary on the open encoder now, and disable the link if it answers wrong."""
        assert self.encoder_if_open is not None
        return self._keeper.check(self.encoder_if_open)

    def open(
        self, until: float | None = None, *, probing: bool = False, twice: bool = False
    ) -> Encoder | VisionAccelError:
        """Return the encoder, or why there is none. If it is not open, one caller opens it while the others wait.

        An opening that is late goes on, and its encoder is used once it is open. After a failure only a probe opens it
        again. With `twice`, as for a request that perhaps only this link can serve, a failed opening is retried once.
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
            message = f"{self.name} did not open within {self.open_deadline:.3g} s. {late}".rstrip()
            hint = "Raise VISIONACCEL_OPEN_DEADLINE if it needs longer, for example to compile."
            return self._not_opened(DeadlineError(message, hint=hint), probing, twice)
        except VisionAccelError as error:
            return self._not_opened(error, probing, twice)
        except Exception as error:  # for example, no thread can be started: a request must survive that
            message = f"opening {self.name} failed with {type(error).__name__}: {error}"
            return self._not_opened(DeviceError(message), probing, twice)
        return DeviceError(
            f"{self.name}: {not_now}. {self.breaker.reason}".strip(), hint="It is tried again soon; see the log."
        )

    def call(self, function: Callable[[], _T], seconds: float, until: float | None) -> _T:
        """Call the open encoder with a deadline; return or raise what the call does. No other place ends a call.

        Raises:
            DeadlineError: If the call does not return within its seconds or by `until`, or had no time to begin.
            DeviceLostError: If the call was ended.
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
            raise DeadlineError(
                f"device {device!r} was busy until the engine's step ended.", hint="Try again later."
            ) from None
        except LateError as late:
            if self._closed:
                raise self._is_closed() from None
            raise self._hung(device, seconds, late) from None
        call_alone(
            partial(self._judge, encoder, call, limit, seconds)
        )  # it may still end, which its caller cannot await
        raise DeadlineError(f"the engine's step had no more time before device {device!r} answered.", hint=_STEP)

    def distrust(self, reason: str, evidence: Golden | None = None) -> None:
        """Disable the link because of a wrong answer, and have its other answers dropped, those in progress included.

        The link is enabled again only after it has encoded the evidence, an image with its correct answer, correctly.
        """
        if evidence is not None:
            self._canary.remember(evidence)
        with self._lock:
            self._distrusted += 1
        self.breaker.trip(reason)
        self.forget()

    def forget(self) -> None:
        """Have the answers that came from this link dropped."""
        for forget in self._on_drift:
            forget()

    def close(self, wait: float | None = None) -> None:
        """Give back the device, and run no more canaries.

        Args:
            wait: Seconds to wait for a call in progress, at most its deadline; a call that is late already is not
                waited for. A call that does not return by then keeps the device until it does.
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
            logger.warning("A call of encoder %r has not returned; it keeps its device.", encoder.backend)

    def _opened(self, probing: bool, twice: bool) -> Encoder | None:
        """Open the encoder if no other caller has; None if only a probe may open it."""
        if self.encoder_if_open is not None or not (probing or self.breaker.closed):
            return self.encoder_if_open
        try:
            encoder = self._made()
        except DeviceError as error:
            if not (twice and worth_a_retry(error)):
                raise
            logger.warning("Opening encoder %r failed; trying once more: %s", self.name, error)
            encoder = self._made()  # there may be enough memory by now
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
        """End a call that is past its deadline, if its device can; return whether the call has returned by `until`."""
        ended = [opened.session.end_calls() for opened in encoder.programs]
        seconds = _ENDING if until is None else min(_ENDING, seconds_until(until))
        return any(ended) and bool(wait([call], seconds).done)

    def _judge(self, encoder: Encoder, call: Future[Any], limit: float, seconds: float) -> None:
        """Record the outcome of a call that goes on after its step: at its limit, or when it returns."""
        if not (wait([call], seconds_until(limit)).done or self._ended(encoder, call)):
            self._hung(encoder.capabilities.device, seconds)
            return
        error = call.exception()
        if isinstance(error, VisionAccelError) and not isinstance(error, InputError):
            self.breaker.failed(error.message)

    def _hung(self, device: str, seconds: float, why: object = "") -> DeadlineError:
        """Open the breaker because a call did not return in time; return the error that says so."""
        error = DeadlineError(
            f"device {device!r} did not answer within {seconds:.3g} s. {why}".rstrip(),
            hint=f"{_LONGER} With VISIONACCEL_ISOLATION=process a device that hangs is ended and restarted.",
        )
        if not self._closed:
            self.breaker.trip(error.message, hangs=True)
        return error

    def _breaker_changed(self, _: BreakerState, reason: str) -> None:
        if self._closed:  # a probe that closing has ended says nothing about the device
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
    """The result of a call that was ended past its deadline, if it returned all the same."""
    try:
        return call.result()
    except DeviceError as lost:
        message = f"device {device!r} did not answer within {seconds:.3g} s; its call was ended. {lost.message}"
        raise DeviceLostError(message, hint=f"{_LONGER} {lost.hint or ''}".rstrip()) from None


def worth_a_retry(error: VisionAccelError) -> bool:
    """Whether a second try may succeed. A call that was late, or ended its process, is likely to do so again."""
    return isinstance(error, DeviceError) and not isinstance(error, DeadlineError | DeviceLostError)


def no_time() -> DeadlineError:
    """Return the error of an image for which the engine's step has no time left."""
    return DeadlineError("the engine's step has no time left for this image.", hint=_STEP)
