"""An encoder that is opened when it is first needed, within a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, DeviceLostError, VisionAccelError
from visionaccel.trust.calls import CutError, LateError, WatchedCalls, seconds_until

__all__ = ["OnDemand"]

logger = safe_logger(__name__)


class OnDemand:
    """Opens an encoder once. Safe to use from several threads: one opens, the others wait.

    Args:
        encoder: The open encoder, or what opens it.
        calls: Runs what opens it; an opening that is late is left behind, and the encoder used once it is there.
        deadline: Seconds for opening.
    """

    def __init__(self, encoder: Encoder | Callable[[], Encoder], calls: WatchedCalls, deadline: float) -> None:
        self._make = encoder if callable(encoder) else None
        self._calls, self._deadline = calls, deadline
        self._opening, self._lock = threading.Lock(), threading.Lock()
        self._closed = False
        self.if_open: Encoder | None = None if callable(encoder) else encoder

    def open(self, name: str, may: Callable[[], bool], until: float | None, *, twice: bool) -> Encoder:
        """The encoder, opened now if it is not.

        Args:
            name: What to call it.
            may: Whether it may be opened, asked when it is this caller's turn to open it.
            until: When to wait no longer, on the monotonic clock.
            twice: Try once more at once if it fails, for a request that nothing else may be able to serve.

        Raises:
            VisionAccelError: Why it cannot be opened.
            LateError: If it may not be opened now, or another caller has been opening it for this caller's time.
        """
        limit = time.monotonic() + self._deadline
        if not self._opening.acquire(timeout=seconds_until(limit if until is None else min(limit, until))):
            raise LateError("It is still being opened")
        try:
            if self._closed:
                raise DeviceError(f"{name} is closed.", hint="Open a new one.")
            if self.if_open is not None:
                return self.if_open
            if not may():
                raise LateError("It could not be opened")
            seconds = seconds_until(limit)
            try:
                return self._calls.call(partial(self._made, name, twice), seconds, until=until)
            except CutError:
                raise LateError("It is still being opened") from None
            except LateError as late:
                raise DeadlineError(
                    f"{name} was not opened within {seconds:.3g} s. {late}.".removesuffix(" It did not return."),
                    hint="Raise VISIONACCEL_OPEN_DEADLINE if it needs longer, such as to compile.",
                ) from None
        except (VisionAccelError, LateError):
            raise
        except Exception as error:  # Opened in the engine's step, which must survive it.
            raise DeviceError(f"opening {name} failed with {type(error).__name__}: {error}") from error
        finally:
            self._opening.release()

    def close(self) -> Encoder | None:
        """Open it no more; the encoder, if it is open, is the caller's to close."""
        with self._lock:
            self._closed = True
            return self.if_open

    def _made(self, name: str, twice: bool) -> Encoder:
        assert self._make is not None
        try:
            encoder = self._make()
        except Exception as error:
            lasting = isinstance(error, VisionAccelError) and not isinstance(error, DeviceError)
            if not twice or lasting or isinstance(error, DeadlineError | DeviceLostError):
                raise
            logger.warning("Opening encoder %r failed and is tried once more: %s", name, error)
            encoder = self._make()  # memory that was short may be free by now
        with self._lock:
            closed = self._closed
            if not closed:
                self.if_open = encoder
        if closed:
            encoder.close(0.0)
        return encoder
