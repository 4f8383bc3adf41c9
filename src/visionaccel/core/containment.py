"""Calls code of plug-ins and vendors so that its exceptions do not end this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import DeviceError, VisionAccelError

logger = safe_logger(__name__)


@contextmanager
def contained() -> Iterator[None]:
    """Turn an exception that is not an `Exception`, such as SystemExit, into a RuntimeError that names it.

    A plug-in could end a server with it, because `except Exception` does not catch it. Ctrl-C still ends a server.
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
        doing: What the code in the context does, as the subject of the message; a function is called only on failure.
        hint: What to do about a failure.

    Raises:
        VisionAccelError: Unchanged, if the code raised one.
        DeviceError: If the code raised any other exception.
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
    """Call an observer. An exception it raises, SystemExit included, is logged and does not fail the encode."""
    try:
        with contained():
            hook()
    except Exception:
        logger.exception("An observer of encodes failed.")
