"""One link of a chain: an encoder with a deadline and a canary, opened when needed, and disabled while it fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from visionaccel.backends import Purpose
from visionaccel.bundle import Golden
from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, InputError, VisionAccelError
from visionaccel.trust.breaker import Breaker, BreakerState, Keeper
from visionaccel.trust.calls import LateError, in_callers_stream, seconds_until
from visionaccel.trust.canary import Canary, CanaryResult
from visionaccel.trust.reports import BreakerReports, report_canary, report_failure
from visionaccel.trust.watched_encoder import LEAST, WatchedEncoder

logger = safe_logger(__name__)

RETRY = "retry"
"""What has its turn after a link that is asked a second time, in reports."""

_CLOSING = 5.0


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
        canary: What it is tried with; by default its own first answer, once it is to be put back to work.
        canary_on: Whether the canary also runs before its first encode, when the device's process was restarted, and on
            the timer.
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
        self._watched = WatchedEncoder(name, encoder, self.breaker, open_deadline)
        self._lock = threading.Lock()
        self._checking, self._telling, self._reports = threading.RLock(), threading.Lock(), BreakerReports()
        self._closed = False
        self._distrusted = 0
        self._drifted: list[Callable[[], None]] = []
        self._checked_restarts: int | None = None

    @property
    def encoder_if_open(self) -> Encoder | None:
        """The encoder, if it is open."""
        return self._watched.if_open

    @property
    def ready(self) -> bool:
        """Whether it may be given work; it may have to be opened first."""
        return self.breaker.closed and not self._watched.cut

    @property
    def may_try(self) -> bool:
        """Whether it may be given what would fail otherwise: it failed often, but neither hangs nor is proven wrong."""
        return not (self.breaker.proven or self._watched.cut) and self._watched.if_open is not None

    @property
    def hangs_for(self) -> float:
        """Seconds since it was disabled because a call did not return in time; 0 if it was not."""
        since = self._watched.hangs_since
        return 0.0 if since is None else max(1e-9, time.monotonic() - since)

    @property
    def why_not(self) -> str:
        """Why it is given no work."""
        if self.breaker.closed:
            return f"{self.name} is still busy with what a step of the engine had no more time for"
        return f"{self.name} is out of work ({self.breaker.state.value}): {self.breaker.reason}"

    @property
    def restarts(self) -> int:
        """How often a process of its device was restarted."""
        return self._watched.restarts

    def on_drift(self, forget: Callable[[], None]) -> None:
        """Have something called when wrong answers are found: what came from this link must not be kept."""
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
        encoder = self._watched.if_open or self._opened(until, twice=True)
        if isinstance(encoder, VisionAccelError):
            return encoder
        distrusted = self._distrusted
        encode = partial(encoder.encode, patches, grids, purpose=purpose, queue_seconds=queue_seconds)
        seconds = self.deadline * max(1, len(grids))
        attempt = partial(self._watched.call, in_callers_stream(patches, encode), seconds, until)
        answer: Array | VisionAccelError
        try:
            answer = self._verified(encoder, attempt, until)
        except VisionAccelError as error:
            answer = error
        except Exception as error:  # The engine's step must survive any exception of a vendor's stack.
            answer = DeviceError(f"encoding failed with {type(error).__name__}: {error}")
        if self._distrusted != distrusted and not isinstance(answer, InputError):
            answer = DeviceError(f"{self.name} was found to give wrong answers during the call: {self.breaker.reason}")
        if not isinstance(answer, VisionAccelError):
            self.breaker.succeeded()
        elif not isinstance(answer, InputError):
            late = isinstance(answer, DeadlineError)
            report_failure(encoder, answer, grids, None if late and following == RETRY else following)
            if not late:  # which has disabled it already
                self.breaker.failed(answer.message)
        return answer

    def check(self, *, quick: bool = False) -> CanaryResult | VisionAccelError:
        """Run the canary now; a link with wrong answers is disabled.

        Returns:
            What it found, or why the encoder cannot be opened.
        """
        encoder = self.open()
        return encoder if isinstance(encoder, VisionAccelError) else self._check(encoder, quick=quick)

    def open(self) -> Encoder | VisionAccelError:
        """The encoder, opened now if it was not, or why there is none."""
        return self._watched.if_open or self._opened()

    def distrust(self, reason: str, evidence: Golden | None = None) -> None:
        """A wrong answer was found: disable the link, and have what came from it forgotten, calls in progress included.

        Args:
            reason: Why.
            evidence: The image with the wrong answer: it must get that right before it gets work again.
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
                the device until it does. It does not wait for one that is late already.
        """
        self._closed = True
        wait = self.deadline if wait is None else min(wait, self.deadline)
        self._keeper.close(min(wait, _CLOSING))
        self._watched.close(wait)

    def _opened(
        self, until: float | None = None, *, probing: bool = False, twice: bool = False
    ) -> Encoder | VisionAccelError:
        """The encoder, opened by one caller while the others wait. Only a probe opens what failed to open before.

        Args:
            until: When to wait no longer, on the monotonic clock; the opening then goes on.
            probing: The caller is a probe.
            twice: Try once more what failed, for a request that nothing else may be able to serve.
        """
        try:
            return self._watched.open(lambda: probing or self.breaker.closed, until, twice=twice)
        except LateError as late:
            return DeviceError(
                f"{self.name}: {late}. {self.breaker.reason}".strip(), hint="It is tried again soon; see the log."
            )
        except VisionAccelError as error:
            if not (probing or self._closed):
                self.breaker.trip(f"it cannot be opened: {error.message}")
            return DeviceError(f"{self.name} cannot be opened: {error.message}", hint=error.hint) if twice else error

    def _verified(self, encoder: Encoder, attempt: Callable[[], Array], until: float | None) -> Array:
        """An attempt on a device that has passed a canary since it, or its process, was started.

        Raises:
            VisionAccelError: What the attempt raises, or why the device is not to be asked.
        """
        while True:
            if self._canary_on and self.restarts != self._checked_restarts:
                self._require_canary(encoder, until)
            before = self.restarts
            answer = attempt()
            if not self._canary_on or self.restarts == before:  # otherwise it is of a process that has not been tried
                return answer

    def _require_canary(self, encoder: Encoder, until: float | None) -> None:
        late = DeadlineError(f"{self.name} is still being tried with its canary.", hint="Try again later.")
        if not self._checking.acquire(timeout=-1 if until is None else seconds_until(until)):
            raise late
        try:
            if self.restarts == self._checked_restarts:
                return  # another caller has waited for it
            result = self._check(encoder, quick=self._was_checked, until=until)
        finally:
            self._checking.release()
        if result.failure is not None:
            if self._watched.cut or (until is not None and seconds_until(until) < LEAST):
                raise late
            raise DeviceError(f"{self.name} failed its canary: {result.failure}")

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
        return self._watched.call(encode, limit * len(grids), until)

    def _probe(self) -> tuple[str | None, bool]:
        encoder = self._watched.if_open or self._opened(probing=True)
        if isinstance(encoder, VisionAccelError):
            return f"it cannot be opened: {encoder.message}", False
        result = self._check(encoder, quick=self._was_checked, probing=True)
        return result.failure, result.wrong

    def _check_on_timer(self) -> None:
        if self._watched.if_open is None or self._watched.cut:
            return
        result = self._check(self._watched.if_open, quick=True)
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
        with self._telling:  # several changes may come at once: the last report is the state
            state = self.breaker.state
            if state is BreakerState.CLOSED:
                self._watched.hangs_since = None
            level = logging.INFO if state is BreakerState.HALF_OPEN else logging.WARNING
            logger.log(level, "Encoder %r %s: %s", self.name, words[state], reason)
            if self._watched.if_open is not None:
                self._reports.add(self._watched.if_open, state, reason)
        if state is BreakerState.OPEN:
            self._keeper.wake()
