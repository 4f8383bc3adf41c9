"""Calls of a plug-in's code, which must not end the process that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import DeviceError, VisionAccelError

logger = safe_logger(__name__)


@contextmanager
def contained() -> Iterator[None]:
    """Turn what is not an `Exception`, such as the SystemExit of `sys.exit`, into one that says so.

    `except Exception` does not catch it, so that a plug-in could end a server. Ctrl-C still ends it. What is raised in
    its place is a RuntimeError whose message names it.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


@contextmanager
def device_errors(doing: str | Callable[[], str], hint: str | None = None) -> Iterator[None]:
    """Turn any exception of a vendor's stack into an error of this package; Ctrl-C passes through.

    Args:
        doing: What the code in the context does, for the message; a function is called only if it fails.
        hint: What to do then.

    Raises:
        VisionAccelError: As the code raised it.
        DeviceError: If it raised anything else.
    """
    try:
        with contained():
            yield
    except VisionAccelError:
        raise
    except Exception as error:
        what = doing if isinstance(doing, str) else doing()
        raise DeviceError(f"{what} failed with {type(error).__name__}: {error}", hint=hint) from error


def tell(hook: Callable[[], object]) -> None:
    """Call observers; what one raises, an exit included, is logged and fails no encode."""
    try:
        with contained():
            hook()
    except Exception:
        logger.exception("An observer of encodes failed.")
