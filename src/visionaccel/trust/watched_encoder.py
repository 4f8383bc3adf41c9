"""An encoder that is opened when it is first needed, and whose calls end within a deadline."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeVar

from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, DeviceLostError, InputError, VisionAccelError
from visionaccel.trust.breaker import Breaker
from visionaccel.trust.calls import CutError, LateError, WatchedCalls, returns_within, seconds_until

logger = safe_logger(__name__)

_T = TypeVar("_T")

LEAST = 0.1
"""Seconds of a step below which no call is begun."""

_GIVING_BACK = 15.0
_ENDING = 2.0
"""Seconds for a call to return once its device's process was ended."""

_STEP = "Lower VISIONACCEL_DEADLINE, send fewer images at a time, or raise vLLM's VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."
_LONGER = "Raise VISIONACCEL_DEADLINE if the device needs longer."


class WatchedEncoder:
    """The one place where a deadline ends a call of a device. Safe to use from several threads: one opens, others wait.

    Args:
        name: What to call it before it is open.
        encoder: The open encoder, or what opens it.
        breaker: Opens when a call hangs; its probe is due when one that was left behind returns.
        open_deadline: Seconds for opening.

    Attributes:
        if_open: The encoder, once it is open.
        hangs_since: When the first call of those that did not return in time was left behind, on the monotonic clock.
    """

    def __init__(
        self, name: str, encoder: Encoder | Callable[[], Encoder], breaker: Breaker, open_deadline: float
    ) -> None:
        self._name, self._breaker, self._open_deadline = name, breaker, open_deadline
        self._make = encoder if callable(encoder) else None
        self.if_open: Encoder | None = None if callable(encoder) else encoder
        self.hangs_since: float | None = None
        self._calls = WatchedCalls(breaker.hasten)
        self._opening, self._lock = threading.Lock(), threading.Lock()
        self._closed = False

    @property
    def cut(self) -> bool:
        """Whether a call that the end of a step has cut off has not returned."""
        return self._calls.cut

    @property
    def restarts(self) -> int:
        """How often a process of its device was restarted."""
        return 0 if self.if_open is None else sum(opened.session.restarts for opened in self.if_open.programs)

    def open(self, may: Callable[[], bool], until: float | None, *, twice: bool) -> Encoder:
        """The encoder, opened now if it is not. An opening that is late goes on; the encoder is used once it is there.

        Args:
            may: Whether it may be opened, asked when it is this caller's turn to open it.
            until: When to wait no longer, on the monotonic clock.
            twice: Try once more at once if it fails, for a request that nothing else may be able to serve.

        Raises:
            VisionAccelError: Why it cannot be opened.
            LateError: If it may not be opened now, or another caller has been opening it for this caller's time.
        """
        limit = time.monotonic() + self._open_deadline
        if not self._opening.acquire(timeout=seconds_until(limit if until is None else min(limit, until))):
            raise LateError("It is still being opened")
        try:
            if self._closed:
                raise DeviceError(f"{self._name} is closed.", hint="Open a new one.")
            if self.if_open is not None:
                return self.if_open
            if not may():
                raise LateError("It could not be opened")
            seconds = seconds_until(limit)
            try:
                return self._calls.call(partial(self._made, twice), seconds, until=until)
            except CutError:
                raise LateError("It is still being opened") from None
            except LateError as late:
                raise DeadlineError(
                    f"{self._name} was not opened within {seconds:.3g} s. {late}.".removesuffix(" It did not return."),
                    hint="Raise VISIONACCEL_OPEN_DEADLINE if it needs longer, such as to compile.",
                ) from None
        except (VisionAccelError, LateError):
            raise
        except Exception as error:  # Opened in the engine's step, which must survive it.
            raise DeviceError(f"opening {self._name} failed with {type(error).__name__}: {error}") from error
        finally:
            self._opening.release()

    def call(self, function: Callable[[], _T], seconds: float, until: float | None) -> _T:
        """What a call of the open encoder returns or raises.

        Args:
            function: Calls the encoder.
            seconds: How long it may take. Then it is ended with its device's process, or left behind.
            until: When it must have returned in any case, on the monotonic clock. It then goes on, and its deadline
                still holds.

        Raises:
            DeadlineError: If it does not return in time, or had no time.
            DeviceLostError: If it was ended.
        """
        if until is not None and until - time.monotonic() < min(LEAST, seconds):
            raise no_time()
        assert self.if_open is not None
        safe = all(opened.session.capabilities.thread_safe for opened in self.if_open.programs)
        device, ended = self.if_open.capabilities.device, False

        def end(late: Future[object]) -> bool:
            nonlocal ended
            ended = self._ended(late, until)
            return ended

        try:
            return self._calls.call(function, seconds, places=sys.maxsize if safe else 1, until=until, end=end)
        except DeviceError as lost:
            if not ended:
                raise
            message = f"device {device!r} did not answer within {seconds:.3g} s; its call was ended. {lost.message}"
            raise DeviceLostError(message, hint=f"{_LONGER} {lost.hint or ''}".rstrip()) from None
        except CutError as cut:
            if cut.call is None:
                raise DeadlineError(
                    f"device {device!r} was busy while there was time.", hint="Try again later."
                ) from None
            self._judge_later(cut.call, cut.limit, seconds)
            message = f"the engine's step had no more time before device {device!r} answered."
            raise DeadlineError(message, hint=_STEP) from None
        except LateError as late:
            if self._closed:
                raise DeviceError("the encoder is closed.", hint="Open a new one.") from None
            raise self._hung(seconds, f" {late}.".removesuffix(" It did not return.")) from None

    def close(self, wait: float) -> None:
        """Give back the device, and open it no more.

        Args:
            wait: Seconds to wait for a call in progress, but not for one that is late. It keeps the device until it
                returns.
        """
        with self._lock:
            self._closed = True
            encoder = self.if_open
        self._calls.close(wait)
        if encoder is not None and not returns_within(partial(encoder.close, 0.0), _GIVING_BACK):
            logger.warning("A call of encoder %r does not return; it keeps its device.", encoder.backend)

    def _made(self, twice: bool) -> Encoder:
        assert self._make is not None
        try:
            encoder = self._make()
        except Exception as error:
            lasting = isinstance(error, VisionAccelError) and not isinstance(error, DeviceError)
            if not twice or lasting or isinstance(error, DeadlineError | DeviceLostError):
                raise
            logger.warning("Opening encoder %r failed and is tried once more: %s", self._name, error)
            encoder = self._make()  # memory that was short may be free by now
        with self._lock:
            closed = self._closed
            if not closed:
                self.if_open = encoder
        if closed:
            encoder.close(0.0)
        return encoder

    def _ended(self, call: Future[object], until: float | None = None) -> bool:
        """End a call that is past its deadline, if its device can be ended; whether it has returned, by `until`."""
        assert self.if_open is not None
        ended = [opened.session.end_calls() for opened in self.if_open.programs]
        seconds = _ENDING if until is None else min(_ENDING, seconds_until(until))
        return any(ended) and bool(wait([call], seconds).done)

    def _judge_later(self, call: Future[object], limit: float, seconds: float) -> None:
        """Judge a call that goes on although its step has ended: at its limit, or when it returns."""

        def at_limit() -> None:
            if not (call.done() or self._ended(call)):
                self._hung(seconds)

        def on_return(call: Future[object]) -> None:
            timer.cancel()
            error = call.exception()
            if isinstance(error, VisionAccelError) and not isinstance(error, InputError):
                self._breaker.failed(error.message)

        timer = threading.Timer(seconds_until(limit), at_limit)
        timer.daemon = True
        timer.start()
        call.add_done_callback(on_return)

    def _hung(self, seconds: float, more: str = "") -> DeadlineError:
        """Open the breaker, as a call did not return in time; the error that says so."""
        assert self.if_open is not None
        error = DeadlineError(
            f"device {self.if_open.capabilities.device!r} did not answer within {seconds:.3g} s.{more}",
            hint=f"{_LONGER} VISIONACCEL_ISOLATION=process ends what hangs.",
        )
        if not self._closed:
            self.hangs_since = self.hangs_since or time.monotonic()
            self._breaker.trip(error.message)
        return error


def no_time() -> DeadlineError:
    """The error of an image for which the engine's step has no time left."""
    return DeadlineError("the engine's step has no time left for it.", hint=_STEP)
