"""Arithmetic of half-open intervals of time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

__all__ = ["Interval", "difference", "intersection", "length", "union"]

Interval: TypeAlias = tuple[float, float]
"""Start and end."""


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The times that are in any of some intervals: ascending intervals that do not touch, none of them empty."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def intersection(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The times that are in both of two unions."""
    found: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The times of one union that are not in another."""
    edges = [time for start, end in other for time in (start, end)]
    gaps = zip([-math.inf, *edges[1::2]], [*edges[::2], math.inf], strict=True)
    return intersection(one, list(gaps))


def length(intervals: Iterable[Interval]) -> float:
    """The time that a union takes."""
    return sum(end - start for start, end in intervals)
