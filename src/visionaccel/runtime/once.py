"""Opens an encoder at most once, for all who ask."""

from __future__ import annotations

import threading
from collections.abc import Callable

from visionaccel.encoder import Encoder

__all__ = ["Once"]


class Once:
    """Opens an encoder when it is first asked for; later askers get the same one, or the same error.

    Args:
        make: Opens it.
    """

    def __init__(self, make: Callable[[], Encoder]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._outcome: Encoder | Exception | None = None

    def __call__(self) -> Encoder:
        with self._lock:
            if self._outcome is None:
                try:
                    self._outcome = self._make()
                except Exception as error:
                    self._outcome = error
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome
