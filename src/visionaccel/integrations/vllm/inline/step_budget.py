"""How long the encodes of one step of the engine may take together, in-line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from visionaccel.core.containment import device_errors
from visionaccel.errors import DeadlineError, VisionAccelError
from visionaccel.integrations.vllm.compat import worker
from visionaccel.settings import Settings
from visionaccel.trust import GuardedEncoder, LateError, WatchedCalls

_SHARE = 0.8
"""Of the time that vLLM gives a step before it ends the engine; the language model gets the rest."""

_PAUSE = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class StepBudget:
    """Gives every encode of a step the same end, however many images and calls the step has.

    A step ends where the model embeds the prompt's tokens (`end_step`). A server that only encodes embeds none: there
    the EC connector's metadata, new for each step, tell steps apart. The encodes of a step follow each other at once,
    so what comes after a pause, such as the one after vLLM's dummy run, belongs to another step in any case.

    Attributes:
        seconds: The budget of a step.
    """

    def __init__(self) -> None:
        self.timeout = worker.step_timeout()
        self.seconds = _SHARE * self.timeout
        self._until: float | None = None
        self._ended = 0.0
        self._metadata: object = None

    @contextmanager
    def encode(self) -> Iterator[float]:
        """An encode of a step; yields when those of this step must have ended, on the monotonic clock."""
        now, metadata = time.monotonic(), worker.step_metadata()
        if self._until is None or metadata is not self._metadata or now - self._ended > _PAUSE:
            self._until, self._metadata = now + self.seconds, metadata
        try:
            yield self._until
        finally:
            self._ended = time.monotonic()

    def end_step(self) -> None:
        """What is encoded from now on belongs to another step."""
        self._until = self._metadata = None

    def warning(self, settings: Settings) -> str | None:
        """What the settings do not leave time for, if there is anything."""
        encoders = 1 + len(settings.fallback)
        if settings.deadline * encoders <= self.seconds:
            return None
        return (
            f"In-line, the encodes of a step may take {self.seconds:g} s "
            f"(of VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS={self.timeout:g}), but one encoder of the chain that hangs takes "
            f"VISIONACCEL_DEADLINE={settings.deadline:g} s: images fail before all {encoders} have had their turn. "
            f"Set VISIONACCEL_DEADLINE to at most {self.seconds / encoders:g}, or raise the other."
        )


class LateOpening:
    """Opens an encoder in a step, in the time that the step has; if that is too short, the next steps wait on.

    What fails is tried again after a pause, which doubles each time up to a minute: memory that was short may be free.
    """

    def __init__(self, make: Callable[[], GuardedEncoder]) -> None:
        self._make, self._calls = make, WatchedCalls()
        self._made: GuardedEncoder | None = None
        self._error: VisionAccelError | None = None
        self._pause, self._again = _FIRST_PAUSE, 0.0

    def result(self, until: float) -> GuardedEncoder:
        """The encoder; after `until`, on the monotonic clock, the opening goes on without this caller.

        Raises:
            VisionAccelError: Why there is none yet.
        """
        if self._made is not None:
            return self._made
        if self._error is not None and time.monotonic() < self._again:
            raise self._error
        try:
            return self._calls.call(self._open, until - time.monotonic())
        except LateError:
            if self._made is not None:
                return self._made
            raise DeadlineError("the encoder is still being opened.", hint="Try again later.") from None

    def _open(self) -> GuardedEncoder:
        try:
            with device_errors("opening the encoder"):
                self._made = self._make()
        except VisionAccelError as error:
            self._error, self._again = error, time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            raise
        return self._made
