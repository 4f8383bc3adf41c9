"""One link of a chain: an encoder with a deadline and a canary, opened when needed, and disabled while it fails.

These rules hold on any schedule:

- Every call through a link (a request, a canary or the opening itself, in this process or in a child) returns
  within its deadline, or is ended with its process, or the link is disabled. The deadline counts from when the call
  begins, which is after at most one deadline for each earlier call. A call has no other deadline.
- No caller waits longer than that, not even one that closes the link.
- An encode that outlasts the engine's step goes on: until it returns the link accepts no other encode, and its
  deadline still holds.
- A disabled link is tried again in the background, after a delay that doubles each time; it is enabled once its
  canary has passed.
- An answer is discarded if the link was found to give wrong answers during the call.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
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
from visionaccel.trust.canary import Canary, CanaryResult, Keeper
from visionaccel.trust.threads import InOrder, LateError, WatchedCalls, in_callers_stream

logger = safe_logger(__name__)

_T = TypeVar("_T")

RETRY = "retry"
"""In reports, what is next if the same link tries again."""

_LEAST = 0.1
"""With fewer seconds than this left in an engine's step, no call begins."""

_CLOSING = 5.0
_GIVING_BACK = 15.0

_STEP = "Lower VISIONACCEL_DEADLINE, send fewer images at a time, or raise vLLM's VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."
_OPENING = "Raise VISIONACCEL_OPEN_DEADLINE if it needs longer, for example to compile."
_LATER = "Try again later."
_LONGER = "Raise VISIONACCEL_DEADLINE if the device needs longer."
_HANGS = f"{_LONGER} With VISIONACCEL_ISOLATION=process a device that hangs is ended and restarted."
_WORDS = {
    BreakerState.OPEN: "is disabled",
    BreakerState.HALF_OPEN: "is being probed; it was disabled",
    BreakerState.CLOSED: "is enabled again",
}


class ChainLink:
    """An encoder with its breaker and its canary. Safe to use from several threads; several chains may share one.

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
        self._calls, self._steps = WatchedCalls(self.breaker.hasten), WatchedCalls()
        self._lock, self._telling, self._reports = threading.Lock(), threading.Lock(), InOrder("visionaccel-observers")
        self._closed = self._lies = False
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
        """Whether an encode that outlasted its engine's step is still in progress."""
        return self._steps.late

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
        seconds = self.deadline * max(1, len(grids))

        def compute() -> Array:
            if until is not None and _too_late(until, seconds):  # it had to wait for the canary, or for another call
                raise no_time()
            assert self.encoder_if_open is not None
            return self.encoder_if_open.encode(patches, grids, purpose=purpose, queue_seconds=queue_seconds)

        work = partial(self._encode, in_callers_stream(patches, compute), seconds)
        answer = self._within_step(work, seconds, until)
        encoder = self.encoder_if_open
        if isinstance(answer, VisionAccelError) and not isinstance(answer, InputError) and encoder is not None:
            device, kind = encoder.capabilities.device, type(answer).__name__
            after = None if isinstance(answer, DeadlineError) and following == RETRY else following
            report = FailureReport(encoder.backend, device, tuple(grids), kind, answer.message, after)
            tell(partial(encoder.hooks.visionaccel_failed, report=report))
        return answer

    def check(self) -> CanaryResult:
        """Run the canary on the open encoder now, and disable the link if it answers wrong."""
        assert self.encoder_if_open is not None
        return self._keeper.check(self.encoder_if_open)

    def open(self, tries: int = 1) -> Encoder:
        """Return the encoder. If it is not open, one caller opens it while the others wait.

        An opening that is late goes on, and its encoder is used once it is open. After a failure only a probe opens it
        again.

        Args:
            tries: How often to try within the deadline for openings.

        Raises:
            VisionAccelError: If the encoder cannot be opened; the message says why.
        """
        if self.encoder_if_open is not None:
            return self.encoder_if_open
        try:
            with device_errors(f"opening {self.name}"):  # also if no thread can be started
                opened = partial(self._opened, tries)
                late = f"{self.name} did not open within {self.open_deadline:.3g} s."
                return self._bounded(opened, self.open_deadline, late, _OPENING)
        except VisionAccelError as error:
            if not self._closed:
                self.breaker.trip(f"it cannot be opened: {error.message}")
            raise

    def call(self, function: Callable[[], _T], seconds: float) -> _T:
        """Call the open encoder with a deadline; return or raise what the call does. No other place ends a call.

        Raises:
            DeadlineError: If the call does not return within its seconds, which disables the link, or cannot begin.
            DeviceLostError: If the call was ended.
        """
        encoder = self.encoder_if_open
        assert encoder is not None
        sessions = [opened.session for opened in encoder.programs]
        ended = False

        def end() -> bool:
            nonlocal ended
            answers = [session.end_calls() for session in sessions]  # each of them, not only up to the first that can
            ended = any(answers)
            return ended

        late = f"device {encoder.capabilities.device!r} did not answer within {seconds:.3g} s."
        places = sys.maxsize if all(session.capabilities.thread_safe for session in sessions) else 1
        try:
            return self._bounded(function, seconds, late, _HANGS, hangs=True, places=places, end=end)
        except DeviceError as lost:
            if not ended or isinstance(lost, DeadlineError):
                raise
            message = f"{late} Its call was ended. {lost.message}"
            raise DeviceLostError(message, hint=f"{_LONGER} {lost.hint or ''}".rstrip()) from None

    def distrust(self, reason: str, evidence: Golden | None = None) -> None:
        """Disable the link because of a wrong answer, and have its other answers dropped, those in progress included.

        The link is enabled again only after it has encoded the evidence, an image with its correct answer, correctly.
        """
        if evidence is not None:
            self._canary.remember(evidence)
        with self._lock:
            self._distrusted += 1
            known, self._lies = self._lies and not self.breaker.closed, True
        self.breaker.trip(reason)
        if not known:
            for forget in self._on_drift:
                forget()

    def close(self, wait: float | None = None) -> None:
        """Release the device, and stop running canaries.

        Args:
            wait: Seconds to wait for a call in progress, at most its deadline; a call that is late already is not
                waited for. A call that does not return by then keeps the device until it does.
        """
        with self._lock:
            self._closed, encoder = True, self.encoder_if_open
        wait = 0.0 if self.cut else self.deadline if wait is None else min(wait, self.deadline)
        self._keeper.close(min(wait, _CLOSING))
        self._calls.close(wait)
        self._steps.close()
        if encoder is None:
            return
        closing = WatchedCalls()
        try:
            given_back = closing.call(partial(encoder.close, 0.0), _GIVING_BACK)
        except LateError:
            given_back = False
        finally:
            closing.close()
        if not given_back:
            logger.warning("A call of encoder %r has not returned, so its device is not released.", encoder.backend)

    def _within_step(
        self, work: Callable[[], Array | VisionAccelError], seconds: float, until: float | None
    ) -> Array | VisionAccelError:
        """Return the answer of an encode, or the error that the engine's step ran out of time."""
        if self.cut:
            return DeadlineError(f"{self.why_not}.", hint=_LATER)
        if until is None:
            return work()
        if _too_late(until, seconds):
            return no_time()
        try:
            left = min(until - time.monotonic(), threading.TIMEOUT_MAX)
            return self._steps.call(work, left, places=sys.maxsize)
        except LateError:
            if self._closed:
                return self._is_closed()
            if self.encoder_if_open is None:
                return DeadlineError(f"{self.name} is still being opened.", hint=_LATER)
            if self._keeper.unverified:
                return DeadlineError(f"the first canary of {self.name} is still running.", hint=_LATER)
            device = self.encoder_if_open.capabilities.device
            return DeadlineError(f"the engine's step ran out of time before device {device!r} answered.", hint=_STEP)
        except Exception as error:  # for example, no thread can be started
            return DeviceError(f"encoding failed with {type(error).__name__}: {error}")

    def _encode(self, compute: Callable[[], Array], seconds: float) -> Array | VisionAccelError:
        """Open the encoder if needed and call it once its canary has passed; record the outcome in the breaker."""
        try:
            encoder = self.open(tries=2)  # perhaps no other link can answer
        except VisionAccelError as error:
            return DeviceError(f"{self.name} cannot be opened: {error.message}", hint=error.hint)

        distrusted = self._distrusted
        answer: Array | VisionAccelError
        try:
            with device_errors("encoding"):
                answer = self._keeper.run_verified(encoder, partial(self.call, compute, seconds))
        except VisionAccelError as error:
            answer = error
        if self._distrusted != distrusted and not isinstance(answer, InputError):
            answer = DeviceError(f"{self.name} was found to give wrong answers during the call: {self.breaker.reason}")
        if not isinstance(answer, VisionAccelError):
            self.breaker.succeeded()
        elif not isinstance(answer, InputError | DeadlineError):  # a late call has disabled the link already
            self.breaker.failed(answer.message)
        return answer

    def _opened(self, tries: int) -> Encoder:
        """Open the encoder if no earlier caller has; raise if one failed to, unless this is a probe."""
        if self.encoder_if_open is not None:
            return self.encoder_if_open
        if self.breaker.state is BreakerState.OPEN:
            raise DeviceError(f"an earlier attempt failed; {self.breaker.reason}", hint="It will be tried again soon.")
        assert self._make is not None
        for left in reversed(range(tries)):
            try:
                with device_errors(f"opening {self.name}"):
                    encoder = self._make()
                break
            except DeviceError as error:
                if not (left and worth_a_retry(error)):
                    raise
                logger.warning("Opening encoder %r failed; trying once more: %s", self.name, error)
        with self._lock:
            if not self._closed:
                self.encoder_if_open = encoder
                return encoder
        encoder.close(0.0)
        raise self._is_closed()

    def _bounded(
        self, function: Callable[[], _T], seconds: float, late: str, hint: str, *, hangs: bool = False, **how: Any
    ) -> _T:
        """Run a call with a deadline; the arguments in `how` are those of `WatchedCalls.call`."""
        try:
            return self._calls.call(function, seconds, **how)
        except LateError as why:
            if self._closed:
                raise self._is_closed() from None
            error = DeadlineError(f"{late} {why}".rstrip(), hint=hint)
            if hangs:
                self.breaker.trip(error.message, hangs=True)
            raise error from None

    def _is_closed(self) -> DeviceError:
        return DeviceError(f"{self.name} is closed.", hint="Open a new one.")

    def _breaker_changed(self, changed: BreakerState, reason: str) -> None:
        if self._closed:  # a probe that closing has ended says nothing about the device
            return
        with self._telling:  # several changes may come at once: the last report is the state
            state, encoder = self.breaker.state, self.encoder_if_open
            level = logging.INFO if state is BreakerState.HALF_OPEN else logging.WARNING
            logger.log(level, "Encoder %r %s: %s", self.name, _WORDS[state], reason)
            if encoder is not None and encoder.hooks.visionaccel_breaker.get_hookimpls():
                report = BreakerReport(encoder.backend, encoder.capabilities.device, state.value, reason)
                self._reports.add(partial(tell, partial(encoder.hooks.visionaccel_breaker, report=report)))
        if changed is BreakerState.CLOSED:  # even if it is open again: it was used in between
            self._lies = False
        if state is BreakerState.OPEN:
            self._keeper.wake()


def worth_a_retry(error: VisionAccelError) -> bool:
    """Return whether a second try may succeed. A call that was late, or ended its process, is likely to do so again."""
    return isinstance(error, DeviceError) and not isinstance(error, DeadlineError | DeviceLostError)


def no_time() -> DeadlineError:
    """Return the error of an image for which the engine's step has no time left."""
    return DeadlineError("the engine's step has no time left for this image.", hint=_STEP)


def _too_late(until: float, seconds: float) -> bool:
    return until - time.monotonic() < min(_LEAST, seconds)
