"""One encoder of a chain: opened when it is needed, held to its canary, and taken out of work while it fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from visionaccel.arrays import Array
from visionaccel.backends import BreakerReport, DriftReport, FailureReport
from visionaccel.bundle.golden import Golden
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, InputError, VisionAccelError
from visionaccel.grid import Grid
from visionaccel.isolation import IsolatedSession
from visionaccel.runtime.breaker import Breaker, BreakerState
from visionaccel.runtime.canary import Canary, CanaryResult
from visionaccel.runtime.watched import WatchedCalls
from visionaccel.safe_text import safe_logger

__all__ = ["Stage"]

logger = safe_logger(__name__)

_LONGEST_SLEEP = 3600.0
_PROBING = 0.05
_CLOSING = 5.0


class Stage:
    """An encoder with its breaker and its canary. Safe to use from several threads; several chains may share one.

    Args:
        name: What to call it before it is open, such as the backend's name.
        encoder: The open encoder, or what opens it, called at most once; a failure to open is remembered.
        canary: What it is tried with; by default its own first answer, once it is to be put back to work.
        canary_on: Whether the canary also runs before its first encode, when the device's process was started anew, and
            on the timer.
        interval: Seconds between two canaries on a timer; 0 for none.
        deadline: Seconds for one image, whose call then runs on a thread that can be left behind, if it may; None for
            no limit, as where somebody else watches.
        first_deadline: The same for each image of the first canary, which may compile; None for no limit.
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
        deadline: float | None = None,
        first_deadline: float | None = None,
        failures: int = 5,
        cool_down: float = 1.0,
        same: bool = False,
    ) -> None:
        self.name, self.same = name, same
        self._make = encoder if callable(encoder) else None
        self._encoder: Encoder | VisionAccelError | None = None if callable(encoder) else encoder
        self._canary, self._canary_on, self._interval = canary or Canary(), canary_on, interval
        self.breaker = Breaker(failures=failures, cool_down=cool_down, changed=self._breaker_changed)
        self._deadline, self._first_deadline = deadline, first_deadline
        self._calls, self._canary_calls = WatchedCalls(), WatchedCalls()
        self._opening, self._checking, self._telling = threading.Lock(), threading.RLock(), threading.Lock()
        self._keeping = threading.Condition()
        self._keeper: threading.Thread | None = None
        self._closed = False
        self._distrusted = 0
        self._drifted: list[Callable[[], None]] = []
        self._checked_restarts: int | None = None

    @property
    def encoder_if_open(self) -> Encoder | None:
        """The encoder, if it is open."""
        return self._encoder if isinstance(self._encoder, Encoder) else None

    @property
    def ready(self) -> bool:
        """Whether it may be given work; it may have to be opened first."""
        return self.breaker.closed and not isinstance(self._encoder, VisionAccelError)

    @property
    def last_resort(self) -> bool:
        """Whether it may be given what would fail otherwise: it failed often, but neither hangs nor answers wrongly."""
        return not self.breaker.for_sure and not isinstance(self._encoder, VisionAccelError)

    @property
    def why_not(self) -> str:
        """Why it is given no work."""
        if isinstance(self._encoder, VisionAccelError):
            return f"{self.name} cannot be opened: {self._encoder.message}"
        return f"{self.name} is out of work ({self.breaker.state.value}): {self.breaker.reason}"

    @property
    def restarts(self) -> int:
        """How often a process of its device was started anew."""
        encoder = self.encoder_if_open
        sessions = [opened.session for opened in encoder.programs] if encoder is not None else []
        return sum(session.restarts for session in sessions if isinstance(session, IsolatedSession))

    def on_drift(self, forget: Callable[[], None]) -> None:
        """Have something called when it turns out that it answered wrongly: what came from it is not to be kept."""
        self._drifted.append(forget)

    def encode(
        self, patches: Array, grids: Sequence[Grid], queue_seconds: float | None = None, following: str | None = None
    ) -> Array | VisionAccelError:
        """Embeddings as `Encoder.encode`, or what went wrong; never raises.

        Args:
            patches: [P, patch_width].
            grids: Checked grids.
            queue_seconds: How long the first item waited.
            following: What would have its turn if this fails, for reports.
        """
        encoder = self.open()
        if isinstance(encoder, VisionAccelError):
            return encoder
        distrusted = self._distrusted
        try:
            answer = self._verified(lambda: self._attempt(encoder, patches, grids, queue_seconds), encoder)
        except Exception as error:  # The engine's step must survive whatever a vendor's stack raises.
            answer = DeviceError(f"encoding failed with {type(error).__name__}: {error}")
        if self._distrusted != distrusted and not isinstance(answer, InputError):
            answer = DeviceError(f"{self.name} turned out to answer wrongly meanwhile: {self.breaker.reason}")
        if not isinstance(answer, VisionAccelError):
            self.breaker.succeeded()
        elif not isinstance(answer, InputError):
            self.note_failure(answer, grids, following)
            if isinstance(answer, DeadlineError):
                self.breaker.trip(answer.message)
            else:
                self.breaker.failed(answer.message)
        return answer

    def note_failure(self, error: VisionAccelError, grids: Sequence[Grid], following: str | None) -> None:
        """Tell observers of an attempt that failed."""
        encoder = self.encoder_if_open
        if encoder is not None:
            report = FailureReport(
                encoder.backend,
                encoder.capabilities.device,
                tuple(grids),
                type(error).__name__,
                error.message,
                following,
            )
            _tell(partial(encoder.hooks.visionaccel_failed, report=report))

    def check(self, *, quick: bool = False) -> CanaryResult | VisionAccelError:
        """Run the canary now; what answers wrongly is taken out of work.

        Returns:
            What it found, or why the encoder cannot be opened.
        """
        encoder = self.open()
        return encoder if isinstance(encoder, VisionAccelError) else self._check(encoder, quick=quick)

    def open(self) -> Encoder | VisionAccelError:
        """The encoder, opened now if it was not, or why it cannot be."""
        if self._encoder is None:
            with self._opening:
                if self._encoder is None:
                    self._encoder = self._made()
        return self._encoder

    def distrust(self, reason: str, evidence: Golden | None = None) -> None:
        """It answered wrongly: take it out of work, and have what came from it forgotten.

        What it answers at this moment is not used either.

        Args:
            reason: Why.
            evidence: What it answered wrongly: it must get that right before it is put back to work.
        """
        if evidence is not None:
            self._canary.remember(evidence)
        self._distrusted += 1
        self.breaker.trip(reason)
        self._forget()

    def close(self, wait: float | None = None) -> None:
        """Give back the device, and end what looks after it.

        Args:
            wait: Seconds to wait for a call in progress; one that does not return by then keeps the device until it
                does. None for as long as it takes.
        """
        with self._keeping:
            self._closed = True
            self._keeping.notify_all()
        self._calls.close()
        self._canary_calls.close()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join(_CLOSING if wait is None else min(wait, _CLOSING))
            if self._keeper.is_alive():
                wait = 0.0  # its canary may hang; the device is given back when that returns
        with self._opening:
            encoder = self.encoder_if_open
        if encoder is not None and not encoder.close(wait):
            logger.warning("A call of encoder %r does not return; it keeps its device.", self.name)

    def _made(self) -> Encoder | VisionAccelError:
        if self._closed:
            return DeviceError(f"{self.name} is closed.", hint="Open a new one.")
        assert self._make is not None
        try:
            return self._make()
        except VisionAccelError as error:
            return error
        except Exception as error:  # Opened in the engine's step, which must survive it.
            return DeviceError(f"opening {self.name} failed with {type(error).__name__}: {error}")

    def _verified(self, attempt: Callable[[], Array | VisionAccelError], encoder: Encoder) -> Array | VisionAccelError:
        """An attempt on a device that has passed a canary since it, or its process, was started."""
        if not self._canary_on:
            return attempt()
        answer: Array | VisionAccelError | None = None
        while answer is None:
            if self.restarts != self._checked_restarts:  # without the lock, which a canary on the timer may hold
                with self._checking:
                    untried = self.restarts != self._checked_restarts
                    result = self._check(encoder, quick=self._checked_restarts is not None) if untried else None
                if result is not None and result.failure is not None:
                    return DeviceError(f"{self.name} failed its canary: {result.failure}")
            before = self.restarts
            answer = attempt()
            if self.restarts != before and not isinstance(answer, VisionAccelError):
                answer = None  # by a new process, which has not been tried
        return answer

    def _attempt(
        self, encoder: Encoder, patches: Array, grids: Sequence[Grid], queue_seconds: float | None
    ) -> Array | VisionAccelError:
        def encode() -> Array:
            return encoder.encode(patches, grids, queue_seconds=queue_seconds)

        seconds = None
        if self._deadline is not None and _may_be_left(encoder):
            seconds = self._deadline * max(1, len(grids))
        try:
            return encode() if seconds is None else self._calls.call(encode, seconds)
        except VisionAccelError as error:
            return error
        except TimeoutError:
            return DeadlineError(
                f"device {encoder.capabilities.device!r} did not answer within {seconds:g} s.",
                hint="Raise VISIONACCEL_DEADLINE, or set VISIONACCEL_ISOLATION=process to end a device that hangs.",
            )

    def _check(self, encoder: Encoder, *, quick: bool, probing: bool = False) -> CanaryResult:
        with self._checking:
            restarts, first = self.restarts, self._checked_restarts is None
            limit = (self._first_deadline if first else self._deadline) if _may_be_left(encoder) else None
            result = self._canary.check(encoder, partial(self._encode_canary, encoder, limit), quick=quick)
            if first and self._interval:
                self._keep()
            if result.passed:
                self._checked_restarts = restarts
        report = DriftReport(
            encoder.backend, encoder.capabilities.device, "canary", result.encoded, result.lowest_cosine, result.limit,
            result.passed, result.seconds,
        )  # fmt: skip
        _tell(partial(encoder.hooks.visionaccel_compared, report=report))
        if result.wrong and not self._closed:
            if not probing:
                self.distrust(f"its canary failed: {result.failure}")
            elif not self.breaker.for_sure:
                self._forget()  # it was asked all the same, where nothing else was healthy
        return result

    def _encode_canary(self, encoder: Encoder, limit: float | None, patches: Array, grids: Sequence[Grid]) -> Array:
        """One image of a canary.

        Raises:
            VisionAccelError: What the encoder raises, and DeadlineError after the limit.
        """
        encode = partial(encoder.encode, patches, grids, purpose="canary")
        if limit is None:
            return encode()
        try:
            return self._canary_calls.call(encode, limit * len(grids))
        except TimeoutError:
            error = DeadlineError(f"its canary did not return within {limit * len(grids):g} s.")
            self.breaker.trip(error.message)
            raise error from None

    def _forget(self) -> None:
        for forget in self._drifted:
            forget()

    def _breaker_changed(self, _: BreakerState, reason: str) -> None:
        words = {
            BreakerState.OPEN: "is taken out of work",
            BreakerState.HALF_OPEN: "is probed; it was out of work",
            BreakerState.CLOSED: "works again",
        }
        with self._telling:  # several changes may come at once: what is told last is the state that there is
            state = self.breaker.state
            level = logging.INFO if state is BreakerState.HALF_OPEN else logging.WARNING
            logger.log(level, "Encoder %r %s: %s", self.name, words[state], reason)
            encoder = self.encoder_if_open
            if encoder is not None:
                report = BreakerReport(encoder.backend, encoder.capabilities.device, state.value, reason)
                _tell(partial(encoder.hooks.visionaccel_breaker, report=report))
        if state is BreakerState.OPEN:
            self._keep()

    def _keep(self) -> None:
        """Have a thread look after it: probe it while it is out of work, and run its canary on the timer."""
        with self._keeping:
            if self._keeper is None and not self._closed:
                self._keeper = threading.Thread(target=self._look_after, name="visionaccel-canary", daemon=True)
                self._keeper.start()
            self._keeping.notify_all()

    def _look_after(self) -> None:
        checked = time.monotonic()
        while True:
            with self._keeping:
                if not self._closed:
                    self._keeping.wait(self._until(checked))
                if self._closed:
                    return
            encoder = self.encoder_if_open
            if encoder is None:
                continue
            if not self.breaker.closed:
                if self.breaker.begin_probe():
                    with self._whatever_comes(probing=True):
                        result = self._check(encoder, quick=True, probing=True)
                        self.breaker.end_probe(result.failure, for_sure=result.wrong)
                    checked = time.monotonic()
            elif self._canary_on and self._interval and time.monotonic() - checked >= self._interval:
                with self._whatever_comes(probing=False):
                    result = self._check(encoder, quick=True)
                    if result.failure is not None and not result.wrong:
                        self.breaker.failed(f"its canary failed: {result.failure}")
                checked = time.monotonic()

    @contextmanager
    def _whatever_comes(self, *, probing: bool) -> Iterator[None]:
        """The thread must live on, and a probe that was begun must end."""
        try:
            yield
        except Exception as error:
            logger.exception("Looking after encoder %r failed.", self.name)
            if probing:
                self.breaker.end_probe(f"the probe failed with {type(error).__name__}: {error}")

    def _until(self, checked: float) -> float:
        if not self.breaker.closed:
            return _PROBING
        if self._canary_on and self._interval:
            return min(_LONGEST_SLEEP, max(0.0, checked + self._interval - time.monotonic()))
        return _LONGEST_SLEEP


def _may_be_left(encoder: Encoder) -> bool:
    """Whether its calls may run on a thread that can be left behind.

    Those of a process of its own have a limit already; those that take a GPU's tensors belong to the caller's stream.
    """
    sessions = [opened.session for opened in encoder.programs]
    isolated = all(isinstance(session, IsolatedSession) for session in sessions)
    return not isolated and all(
        session.capabilities.device == "cpu" or not session.capabilities.takes_tensors for session in sessions
    )


def _tell(hook: Callable[[], object]) -> None:
    try:
        hook()
    except Exception:  # An observer's fault must not cost the caller an encode.
        logger.exception("An observer of encodes failed.")
