"""Backends by entry point: listed without importing any, loaded one at a time."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import pluggy

from visionaccel.backends.hooks import PROJECT, HookSpecs
from visionaccel.backends.spec import VisionBackend
from visionaccel.errors import DuplicateBackendError, PluginError, UnknownBackendError

__all__ = ["GROUP", "BackendEntry", "Registry", "default_registry"]

GROUP = "visionaccel.backends"
"""Entry-point group of backend plug-ins; the entry point's name is the backend's."""

EXTRAS = ("flexmlrt", "onnxrt", "openvino", "torch_ref")
"""Backends that the core distribution offers as extras."""


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """An installed backend, not imported.

    Attributes:
        name: What users select.
        distribution: The distribution that provides it.
        version: That distribution's version.
        module: What is imported to load it.
    """

    name: str
    distribution: str
    version: str
    module: str


class Registry:
    """Installed backends and the plug-in manager that holds those that were loaded."""

    def __init__(self) -> None:
        self.plugins = pluggy.PluginManager(PROJECT)
        self.plugins.add_hookspecs(HookSpecs)
        self._points: dict[str, EntryPoint] = {}
        self._loaded: dict[str, VisionBackend] = {}
        for point in entry_points(group=GROUP):
            other = self._points.get(point.name)
            if other is not None:
                raise DuplicateBackendError(
                    f"backend {point.name!r} is provided by both {_origin(other)} and {_origin(point)}.",
                    hint="Uninstall one of them.",
                )
            self._points[point.name] = point

    @property
    def entries(self) -> tuple[BackendEntry, ...]:
        """Installed backends in the order of their names; none is imported."""
        return tuple(
            BackendEntry(name, *_distribution(point), point.module) for name, point in sorted(self._points.items())
        )

    def entry(self, name: str) -> BackendEntry:
        """The installed backend of that name.

        Raises:
            UnknownBackendError: If there is none; the message says what is installed and what to install.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        installed = [entry.name for entry in self.entries]
        near = difflib.get_close_matches(name, [*installed, *EXTRAS], 1)
        if name in EXTRAS:
            hint = f"Install it: pip install 'visionaccel[{name}]'."
        elif near and near[0] in EXTRAS and near[0] not in installed:
            hint = f"Did you mean {near[0]!r}? Install it: pip install 'visionaccel[{near[0]}]'."
        elif near:
            hint = f"Did you mean {near[0]!r}?"
        else:
            hint = "Install the distribution that provides it, or name an installed one."
        raise UnknownBackendError(
            f"no installed backend is named {name!r} (installed: {', '.join(installed) or 'none'}).", hint=hint
        )

    def load(self, name: str) -> VisionBackend:
        """The backend of that name, its plug-in imported.

        Raises:
            UnknownBackendError: If it is not installed.
            PluginError: If its module cannot be imported or does not provide it.
        """
        if name in self._loaded:
            return self._loaded[name]
        entry = self.entry(name)
        origin = f"backend {name!r} of {entry.distribution} {entry.version}"
        advice = f"Reinstall {entry.distribution}, or report this to its authors."
        try:
            plugin = self._points[name].load()
            if not self.plugins.is_registered(plugin):
                self.plugins.register(plugin)
                self.plugins.check_pending()
            hook = self.plugins.subset_hook_caller(
                "visionaccel_backends", [other for other in self.plugins.get_plugins() if other is not plugin]
            )
            provided = [kind for answer in hook() for kind in answer if kind.name == name]
            if len(provided) != 1 or not issubclass(provided[0], VisionBackend):
                raise PluginError(
                    f"{origin}: module {entry.module} must provide exactly one VisionBackend named {name!r}.",
                    hint="Return it from the hook visionaccel_backends, with `name` equal to the entry point's name.",
                )
            self._loaded[name] = provided[0]()
        except PluginError:
            raise
        except Exception as error:  # Whatever a plug-in's code raises, the user must learn which plug-in it was.
            raise PluginError(f"{origin} cannot be loaded: {type(error).__name__}: {error}", hint=advice) from error
        return self._loaded[name]


@cache
def default_registry() -> Registry:
    """The process's registry of installed backends."""
    return Registry()


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "unknown")


def _origin(point: EntryPoint) -> str:
    name, version = _distribution(point)
    return f"{name} {version} ({point.value})"
