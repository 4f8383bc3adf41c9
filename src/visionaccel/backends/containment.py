"""Calls of a plug-in's code, which must not end the process that makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["contained"]


@contextmanager
def contained() -> Iterator[None]:
    """Turn what is not an `Exception`, such as the SystemExit of `sys.exit`, into one that says so.

    `except Exception` does not catch it, so that a plug-in could end a server. Ctrl-C still ends it.

    Raises:
        RuntimeError: If the code in the context raises something like that; the message names it.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
