"""What the end of the engine's step means for a call: the image fails, and the call is judged when it returns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from visionaccel.errors import DeadlineError, InputError, VisionAccelError
from visionaccel.trust.watched import seconds_until

__all__ = ["cut_off", "judge_later", "no_time"]

_STEP = "Lower VISIONACCEL_DEADLINE, send fewer images at a time, or raise vLLM's VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."


def no_time() -> DeadlineError:
    """The error of an image for which the step has no time left."""
    return DeadlineError("the engine's step has no time left for it.", hint=_STEP)


def cut_off(device: str) -> DeadlineError:
    """The error of an image whose call the end of the step has cut off."""
    return DeadlineError(f"the engine's step had no more time before device {device!r} answered.", hint=_STEP)


def judge_later(
    call: Future[object], limit: float, hangs: Callable[[], object], failed: Callable[[str], object]
) -> None:
    """Judge a call that goes on although its step has ended.

    Args:
        call: The call.
        limit: When its own time is over, on the monotonic clock.
        hangs: Called if it has not returned by then.
        failed: Called with what it says if it returns with an error of the device.
    """
    timer = threading.Timer(seconds_until(limit), lambda: None if call.done() else hangs())
    timer.daemon = True
    timer.start()

    def returned(call: Future[object]) -> None:
        timer.cancel()
        error = call.exception()
        if isinstance(error, VisionAccelError) and not isinstance(error, InputError):
            failed(error.message)

    call.add_done_callback(returned)
