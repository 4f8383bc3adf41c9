"""One link of a chain: an encoder with a deadline and a canary, opened when needed, and disabled while it fails."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeVar

from visionaccel.backends import Purpose
from visionaccel.bundle import Golden
from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, DeviceLostError, InputError, VisionAccelError
from visionaccel.trust.breaker import Breaker, BreakerState, Keeper
from visionaccel.trust.calls import CutError, LateError, WatchedCalls, in_callers_stream, returns_within, seconds_until
from visionaccel.trust.canary import Canary, CanaryResult
from visionaccel.trust.on_demand import OnDemand
from visionaccel.trust.reports import BreakerReports, report_canary, report_failure

__all__ = ["RETRY", "ChainLink", "no_time"]

logger = safe_logger(__name__)

_T = TypeVar("_T")

RETRY = "retry"
"""What has its turn after a link that is asked a second time, in reports."""

_LEAST = 0.1
"""Seconds of a step below which no call is begun."""

_CLOSING = 5.0
_GIVING_BACK = 15.0
_ENDING = 2.0
"""Seconds for a call to return once its device's process was ended."""

_STEP = "Lower VISIONACCEL_DEADLINE, send fewer images at a time, or raise vLLM's VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."
_LONGER = "Raise VISIONACCEL_DEADLINE if the device needs longer."


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
    - No answer is used that was computed while the link was found to answer wrongly.

    Args:
        name: What to call it, such as the backend's name.
        encoder: The open encoder, or what opens it. A failure to open disables the link.
        canary: What it is tried with; by default its own first answer, once it is to be put back to work.
        canary_on: Whether the canary also runs before its first encode, when the device's process was started anew, and
            on the timer.
        interval: Seconds between two canaries on a timer; 0 for none.
        deadline: Seconds for each image of a call.
        open_deadline: Seconds for opening, and for each image of the first canary, which may compile.
        failures: As for `Breaker`.
        cool_down: As for `Breaker`.
        same: It computes the same numbers as the first of its chain.

    Attributes:
        breaker: Whether it gets work.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder | Callable[[], Encoder],
        *,
        canary: Canary | None = None,
        canary_on: bool = False,
        interval: float = 0.0,
        deadline: float = 120.0,
        open_deadline: float = 600.0,
        failures: int = 5,
        cool_down: float = 1.0,
        same: bool = False,
    ) -> None:
        self.name, self.same = name, same
        self.deadline, self._open_deadline = deadline, open_deadline
        self._canary, self._canary_on = canary or Canary(), canary_on
        self.breaker = Breaker(failures=failures, cool_down=cool_down, changed=self._breaker_changed)
        self._keeper = Keeper(self.breaker, self._probe, self._check_on_timer, interval if canary_on else 0.0)
        self._calls = WatchedCalls(self.breaker.hasten)
        self._source = OnDemand(encoder, self._calls, open_deadline)
        self._lock = threading.Lock()
        self._checking, self._telling, self._reports = threading.RLock(), threading.Lock(), BreakerReports()
        self._closed = False
        self._hangs_since: float | None = None
        self._distrusted = 0
        self._drifted: list[Callable[[], None]] = []
        self._checked_restarts: int | None = None

    @property
    def encoder_if_open(self) -> Encoder | None:
        """The encoder, if it is open."""
        return self._source.if_open

    @property
    def ready(self) -> bool:
        """Whether it may be given work; it may have to be opened first."""
        return self.breaker.closed and not self._calls.cut

    @property
    def may_try(self) -> bool:
        """Whether it may be given what would fail otherwise: it failed often, but neither hangs nor answers wrongly."""
        return not (self.breaker.proven or self._calls.cut) and self._source.if_open is not None

    @property
    def hangs_for(self) -> float:
        """Seconds since it was disabled because a call did not return in time; 0 if it was not."""
        since = self._hangs_since
        return 0.0 if since is None else max(1e-9, time.monotonic() - since)

    @property
    def why_not(self) -> str:
        """Why it is given no work."""
        if self.breaker.closed:
            return f"{self.name} is still busy with what a step of the engine had no more time for"
        return f"{self.name} is out of work ({self.breaker.state.value}): {self.breaker.reason}"

    @property
    def restarts(self) -> int:
        """How often a process of its device was started anew."""
        encoder = self._source.if_open
        return 0 if encoder is None else sum(opened.session.restarts for opened in encoder.programs)

    def on_drift(self, forget: Callable[[], None]) -> None:
        """Have something called when it turns out that it answered wrongly: what came from it is not to be kept."""
        self._drifted.append(forget)

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
            until: When it must have returned in any case, on the monotonic clock.
            purpose: What it is for.
        """
        encoder = self._source.if_open or self._opened(until, twice=True)
        if isinstance(encoder, VisionAccelError):
            return encoder
        distrusted = self._distrusted
        encode = partial(encoder.encode, patches, grids, purpose=purpose, queue_seconds=queue_seconds)
        try:
            answer = self._verified(partial(self._attempt, encoder, encode, patches, len(grids), until), encoder, until)
        except Exception as error:  # The engine's step must survive any exception of a vendor's stack.
            answer = DeviceError(f"encoding failed with {type(error).__name__}: {error}")
        if self._distrusted != distrusted and not isinstance(answer, InputError):
            answer = DeviceError(f"{self.name} turned out to answer wrongly meanwhile: {self.breaker.reason}")
        if not isinstance(answer, VisionAccelError):
            self.breaker.succeeded()
        elif not isinstance(answer, InputError):
            late = isinstance(answer, DeadlineError)
            report_failure(encoder, answer, grids, None if late and following == RETRY else following)
            if not late:  # which has disabled it already
                self.breaker.failed(answer.message)
        return answer

    def check(self, *, quick: bool = False) -> CanaryResult | VisionAccelError:
        """Run the canary now; what answers wrongly is taken out of work.

        Returns:
            What it found, or why the encoder cannot be opened.
        """
        encoder = self.open()
        return encoder if isinstance(encoder, VisionAccelError) else self._check(encoder, quick=quick)

    def open(self) -> Encoder | VisionAccelError:
        """The encoder, opened now if it was not, or why there is none."""
        return self._source.if_open or self._opened()

    def distrust(self, reason: str, evidence: Golden | None = None) -> None:
        """It answered wrongly: take it out of work, and have what came from it forgotten.

        What it answers at this moment is not used either.

        Args:
            reason: Why.
            evidence: What it answered wrongly: it must get that right before it is put back to work.
        """
        if evidence is not None:
            self._canary.remember(evidence)
        with self._lock:
            self._distrusted += 1
        self.breaker.trip(reason)
        self._forget()

    def close(self, wait: float | None = None) -> None:
        """Give back the device, and end what looks after it.

        Args:
            wait: Seconds to wait for a call in progress, at most its deadline. One that does not return by then keeps
                the device until it does. Nobody waits for one that is late already.
        """
        self._closed = True
        encoder = self._source.close()
        wait = self.deadline if wait is None else min(wait, self.deadline)
        self._keeper.close(min(wait, _CLOSING))
        self._calls.close(wait)
        if encoder is not None and not returns_within(partial(encoder.close, 0.0), _GIVING_BACK):
            logger.warning("A call of encoder %r does not return; it keeps its device.", self.name)

    def _opened(
        self, until: float | None = None, *, probing: bool = False, twice: bool = False
    ) -> Encoder | VisionAccelError:
        """The encoder, opened by one caller while the others wait; only a probe opens what could not be opened before.

        Args:
            until: When to wait no longer, on the monotonic clock; the opening then goes on.
            probing: The caller is a probe.
            twice: Try once more what failed, for a request that nothing else may be able to serve.
        """
        try:
            return self._source.open(self.name, lambda: probing or self.breaker.closed, until, twice=twice)
        except LateError as late:
            return DeviceError(
                f"{self.name}: {late}. {self.breaker.reason}".strip(), hint="It is tried again soon; see the log."
            )
        except VisionAccelError as error:
            if not (probing or self._closed):
                self.breaker.trip(f"it cannot be opened: {error.message}")
            return DeviceError(f"{self.name} cannot be opened: {error.message}", hint=error.hint) if twice else error

    def _verified(
        self, attempt: Callable[[], Array | VisionAccelError], encoder: Encoder, until: float | None
    ) -> Array | VisionAccelError:
        """An attempt on a device that has passed a canary since it, or its process, was started."""
        if not self._canary_on:
            return attempt()
        answer: Array | VisionAccelError | None = None
        while answer is None:
            if self.restarts != self._checked_restarts:  # without the lock, which a canary on the timer may hold
                late = DeadlineError(f"{self.name} is still being tried with its canary.", hint="Try again later.")
                if not self._checking.acquire(timeout=-1 if until is None else seconds_until(until)):
                    return late
                try:
                    untried = self.restarts != self._checked_restarts
                    result = self._check(encoder, quick=self._was_checked, until=until) if untried else None
                finally:
                    self._checking.release()
                if result is not None and result.failure is not None:
                    if self._calls.cut or (until is not None and seconds_until(until) < _LEAST):
                        return late
                    return DeviceError(f"{self.name} failed its canary: {result.failure}")
            before = self.restarts
            answer = attempt()
            if self.restarts != before and not isinstance(answer, VisionAccelError):
                answer = None  # by a new process, which has not been tried
        return answer

    def _attempt(
        self, encoder: Encoder, encode: Callable[[], Array], patches: Array, images: int, until: float | None
    ) -> Array | VisionAccelError:
        try:
            return self._within(encoder, in_callers_stream(patches, encode), self.deadline * max(1, images), until)
        except VisionAccelError as error:
            return error

    def _within(self, encoder: Encoder, call: Callable[[], _T], seconds: float, until: float | None) -> _T:
        """What a call of the encoder returns or raises.

        Raises:
            DeadlineError: If it does not return in time; the link is disabled then, or waits for what was cut off.
        """
        if until is not None and until - time.monotonic() < min(_LEAST, seconds):
            raise no_time()
        safe = all(opened.session.capabilities.thread_safe for opened in encoder.programs)
        device, ended = encoder.capabilities.device, False

        def end(late: Future[object]) -> bool:
            nonlocal ended
            ended = _ended(encoder, late)
            return ended

        try:
            return self._calls.call(call, seconds, places=sys.maxsize if safe else 1, until=until, end=end)
        except DeviceLostError as lost:
            if not ended:
                raise
            message = f"device {device!r} did not answer within {seconds:.3g} s; its process was ended. {lost.message}"
            raise DeviceLostError(message, hint=f"{_LONGER} {lost.hint}") from None
        except CutError as cut:
            if cut.call is None:
                raise DeadlineError(f"{self.name} was busy while there was time.", hint="Try again later.") from None
            self._judge_later(encoder, cut.call, cut.limit, seconds)
            message = f"the engine's step had no more time before device {device!r} answered."
            raise DeadlineError(message, hint=_STEP) from None
        except LateError as late:
            if self._closed:
                raise DeviceError("the encoder is closed.", hint="Open a new one.") from None
            raise self._hung(encoder, seconds, late) from None

    def _judge_later(self, encoder: Encoder, call: Future[object], limit: float, seconds: float) -> None:
        """Judge a call that goes on although its step has ended: at its limit, or when it returns."""

        def at_limit() -> None:
            if not (call.done() or _ended(encoder, call)):
                self._hung(encoder, seconds)

        def on_return(call: Future[object]) -> None:
            timer.cancel()
            error = call.exception()
            if isinstance(error, VisionAccelError) and not isinstance(error, InputError):
                self.breaker.failed(error.message)

        timer = threading.Timer(seconds_until(limit), at_limit)
        timer.daemon = True
        timer.start()
        call.add_done_callback(on_return)

    def _hung(self, encoder: Encoder, seconds: float, late: LateError | None = None) -> DeadlineError:
        """Disable the link, as a call did not return in time; the error that says so."""
        message = f"device {encoder.capabilities.device!r} did not answer within {seconds:.3g} s. {late or ''}."
        error = DeadlineError(
            message.removesuffix(" It did not return.").removesuffix(" ."),
            hint=f"{_LONGER} VISIONACCEL_ISOLATION=process ends what hangs.",
        )
        if not self._closed:
            self._hangs_since = self._hangs_since or time.monotonic()
            self.breaker.trip(error.message)
        return error

    def _check(
        self, encoder: Encoder, *, quick: bool, probing: bool = False, until: float | None = None
    ) -> CanaryResult:
        with self._checking:
            restarts, first = self.restarts, not self._was_checked
            limit = self._open_deadline if first else self.deadline
            encode = partial(self._encode_canary, encoder, limit, until)
            result = self._canary.check(encoder, encode, quick=quick)
            if result.passed:
                self._checked_restarts = restarts
        if first:
            self._keeper.wake()
        report_canary(encoder, result)
        if result.wrong and not self._closed:
            if not probing:
                self.distrust(f"its canary failed: {result.failure}")
            elif not self.breaker.proven:
                self._forget()  # it was asked all the same, where nothing else was healthy
        return result

    def _encode_canary(
        self, encoder: Encoder, limit: float, until: float | None, patches: Array, grids: Sequence[Grid]
    ) -> Array:
        """One image of a canary.

        Raises:
            VisionAccelError: What the encoder raises, and DeadlineError after the limit.
        """
        encode = partial(encoder.encode, patches, grids, purpose="canary")
        return self._within(encoder, encode, limit * len(grids), until)

    def _probe(self) -> tuple[str | None, bool]:
        encoder = self._source.if_open or self._opened(probing=True)
        if isinstance(encoder, VisionAccelError):
            return f"it cannot be opened: {encoder.message}", False
        result = self._check(encoder, quick=self._was_checked, probing=True)
        return result.failure, result.wrong

    def _check_on_timer(self) -> None:
        if self._source.if_open is None or self._calls.cut:
            return
        result = self._check(self._source.if_open, quick=True)
        if result.failure is not None and not result.wrong:
            self.breaker.failed(f"its canary failed: {result.failure}")

    @property
    def _was_checked(self) -> bool:
        return self._checked_restarts is not None

    def _forget(self) -> None:
        for forget in self._drifted:
            forget()

    def _breaker_changed(self, _: BreakerState, reason: str) -> None:
        words = {
            BreakerState.OPEN: "is taken out of work",
            BreakerState.HALF_OPEN: "is probed; it was out of work",
            BreakerState.CLOSED: "works again",
        }
        if self._closed:  # a probe that closing has ended says nothing of the device
            return
        with self._telling:  # several changes may come at once: what is told last is the state that there is
            state = self.breaker.state
            if state is BreakerState.CLOSED:
                self._hangs_since = None
            level = logging.INFO if state is BreakerState.HALF_OPEN else logging.WARNING
            logger.log(level, "Encoder %r %s: %s", self.name, words[state], reason)
            if self._source.if_open is not None:
                self._reports.add(self._source.if_open, state, reason)
        if state is BreakerState.OPEN:
            self._keeper.wake()


def no_time() -> DeadlineError:
    """The error of an image for which the engine's step has no time left."""
    return DeadlineError("the engine's step has no time left for it.", hint=_STEP)


def _ended(encoder: Encoder, call: Future[object]) -> bool:
    """End a call that is past its deadline, if its device can be ended; whether it has returned."""
    ended = [opened.session.end_calls() for opened in encoder.programs]
    return any(ended) and bool(wait([call], _ENDING).done)
