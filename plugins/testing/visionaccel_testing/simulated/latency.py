"""How long a simulated device takes for a call."""

from __future__ import annotations

import re
import threading
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from pydantic import NonNegativeFloat, TypeAdapter, ValidationError

from visionaccel.core.invalid_values import problems_of
from visionaccel.errors import SettingsError
from visionaccel_testing.simulated.frames import Frame

__all__ = ["Latency", "read_recorded"]

_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_RECORDED = TypeAdapter(dict[str, tuple[NonNegativeFloat, ...]])


class Latency:
    """Seconds of each call. May be asked by several threads.

    Args:
        fixed: Seconds of a call with a frame that is not recorded, however many it has.
        per_patch: Seconds of each patch of such frames.
        recorded: Measured seconds of a frame by its height and width in patches, used in turn. Where a program does
            not get its frames' sizes, the recorded ones with as many patches share their times.
    """

    def __init__(self, fixed: float, per_patch: float, recorded: Mapping[tuple[int, int], Sequence[float]]) -> None:
        self._fixed, self._per_patch = fixed, per_patch
        self._times: dict[Hashable, tuple[float, ...]] = {}
        for (h, w), seconds in sorted(recorded.items()):
            self._times[h, w] = tuple(seconds)
            self._times[h * w] = (*self._times.get(h * w, ()), *seconds)
        self._used: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def seconds(self, frames: Sequence[Frame]) -> float:
        """Seconds of the next call, which has these frames."""
        total, fixed = 0.0, 0.0
        for frame in frames:
            key: Hashable = frame.patches if frame.size is None else frame.size
            if key in self._times:
                total += self._next(key)
            else:
                total += self._per_patch * frame.patches
                fixed = self._fixed  # once: that is what a call with several items saves
        return total + fixed

    def _next(self, key: Hashable) -> float:
        times = self._times[key]
        with self._lock:
            used = self._used[key] = self._used.get(key, -1) + 1
        return times[used % len(times)]


def read_recorded(path: Path) -> dict[tuple[int, int], tuple[float, ...]]:
    """Measured times by a frame's height and width, from a JSON file such as `{"58x74": [7.4, 7.6]}`.

    Raises:
        SettingsError: If it cannot be read or is malformed.
    """
    advice = 'Write {"HEIGHTxWIDTH": [SECONDS, ...], ...} with sizes in patches, such as {"58x74": [7.4, 7.6]}.'
    try:
        stated = _RECORDED.validate_json(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"recorded times {path} cannot be read: {error}.", hint=advice) from error
    except ValidationError as error:
        raise SettingsError(f"recorded times {path}: {problems_of(error)}.", hint=advice) from error
    found: dict[tuple[int, int], tuple[float, ...]] = {}
    for name, seconds in stated.items():
        size = _SIZE.fullmatch(name)
        if size is None or not seconds or float("inf") in seconds:
            raise SettingsError(
                f"recorded times {path}: {name!r} with {len(seconds)} times is not HEIGHTxWIDTH with finite times.",
                hint=advice,
            )
        found[int(size[1]), int(size[2])] = seconds
    return found
