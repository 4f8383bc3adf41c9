"""Objects that distributions provide for architectures by entry point: listed without imports, loaded when needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TypeVar

from visionaccel.core.containment import contained
from visionaccel.errors import PluginError

Kind = TypeVar("Kind")

_OURS = "visionaccel"


class ArchitectureEntries(Mapping[str, Kind]):
    """The objects of one entry-point group, by the architecture that the entry point is named as.

    Listing the architectures imports nothing. An object that cannot be used affects only its own architecture.

    Args:
        group: The entry-point group.
        kind: The type of the objects.
        shown: Where authors of plug-ins import that type from.
        what: What errors call such an object.
        own: Objects of this package that need no entry point.

    Raises:
        PluginError: When an object is looked up that cannot be imported, is not of that type, or is provided twice.
    """

    def __init__(
        self, group: str, kind: type[Kind], *, shown: str, what: str, own: Mapping[str, Kind] = MappingProxyType({})
    ) -> None:
        self._group, self._kind, self._shown, self._what = group, kind, shown, what
        self._own = own
        self._loaded: dict[str, Kind] = {}

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._points if name not in self._own)

    def __len__(self) -> int:
        return len(self._own.keys() | self._points.keys())

    def __contains__(self, architecture: object) -> bool:
        return architecture in self._own or architecture in self._points

    def __getitem__(self, architecture: str) -> Kind:
        if architecture not in self:
            raise KeyError(architecture)
        if architecture not in self._loaded:
            self._loaded[architecture] = self._load(architecture)
        return self._loaded[architecture]

    def is_ours(self, architecture: str) -> bool:
        """Return whether this package provides the object of an architecture."""
        return architecture in self._own or _distribution(self._points[architecture][0]) == _OURS

    @cached_property
    def _points(self) -> Mapping[str, tuple[EntryPoint, ...]]:
        found: dict[str, tuple[EntryPoint, ...]] = {}
        for point in entry_points(group=self._group):
            found[point.name] = (*found.get(point.name, ()), point)
        return found

    def _load(self, architecture: str) -> Kind:
        points = self._points.get(architecture, ())
        origins = [*([_OURS] if architecture in self._own else []), *map(_origin, points)]
        if len(origins) > 1:
            raise PluginError(
                f"the {self._what} of architecture {architecture} is provided by both {origins[0]} and {origins[1]}.",
                hint="Uninstall one of them.",
            )
        if not points:
            return self._own[architecture]
        (point,), (origin,) = points, origins
        name = f"the {self._what} {point.value} of {origin}, for architecture {architecture},"
        try:
            with contained():
                found = point.load()
        except Exception as error:  # the user must learn which distribution raised it
            raise PluginError(
                f"{name} cannot be loaded: {type(error).__name__}: {error}",
                hint=f"Reinstall {_distribution(point)}, or report this to its authors.",
            ) from error
        if not isinstance(found, self._kind):
            raise PluginError(
                f"{name} is not a {self._shown}.", hint=f"The entry point must refer to a {self._kind.__name__}."
            )
        return found


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _origin(point: EntryPoint) -> str:
    return f"{_distribution(point)} {point.dist.version}" if point.dist is not None else _distribution(point)
