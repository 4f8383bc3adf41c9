"""Finds backends by entry point: lists them without importing any, and loads one at a time."""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from types import MappingProxyType

import pluggy

from visionaccel.backends.hooks import PROJECT, HookSpecs
from visionaccel.backends.spec import VisionBackend
from visionaccel.errors import DuplicateBackendError, PluginError, UnknownBackendError

GROUP = "visionaccel.backends"
"""Entry-point group of backend plug-ins; the name of an entry point is the name of its backend."""

EXTRAS: Mapping[str, str] = MappingProxyType(
    {name: name for name in ("flexmlrt", "onnxrt", "openvino", "torch_ref")} | {"simulated": "testing"}
)
"""Extras of the core distribution by the backends that they install."""

IMPORT_SECONDS = 120.0
"""The maximum time of importing a plug-in: long, because a vendor's runtime may be on a slow network drive."""


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """An installed backend: its name, the distribution and version that provide it, and the module to import."""

    name: str
    distribution: str
    version: str
    module: str


class Registry:
    """The installed backends, and the plug-in manager of those that were loaded.

    Raises:
        DuplicateBackendError: If two distributions provide a backend of the same name.
    """

    def __init__(self) -> None:
        self.plugins = pluggy.PluginManager(PROJECT)
        self.plugins.add_hookspecs(HookSpecs)
        self._points: dict[str, EntryPoint] = {}
        self._lock = threading.Lock()
        self._loading: dict[str, tuple[Future[VisionBackend], float]] = {}  # and the time by which each must end
        for point in sorted(entry_points(group=GROUP), key=attrgetter("name")):
            other = self._points.setdefault(point.name, point)
            if other is not point:
                raise DuplicateBackendError(
                    f"backend {point.name!r} is provided by both {_origin(other)} and {_origin(point)}.",
                    hint="Uninstall one of them.",
                )

    @property
    def entries(self) -> tuple[BackendEntry, ...]:
        """The installed backends, sorted by name; none is imported."""
        return tuple(BackendEntry(name, *_distribution(point), point.module) for name, point in self._points.items())

    def entry(self, name: str) -> BackendEntry:
        """Return the installed backend of that name.

        Raises:
            UnknownBackendError: If it is not installed; the message says what is installed and what to install.
        """
        if found := [entry for entry in self.entries if entry.name == name]:
            return found[0]
        installed = list(self._points)
        hints = []
        for near in difflib.get_close_matches(name, [*installed, *EXTRAS], 1):
            if near != name:
                hints.append(f"Did you mean {near!r}?")
            if near not in installed:
                hints.append(f"Install it: pip install 'visionaccel[{EXTRAS[near]}]'.")
        raise UnknownBackendError(
            f"no installed backend is named {name!r} (installed: {', '.join(installed) or 'none'}).",
            hint=" ".join(hints) or "Install the distribution that provides it, or choose an installed one.",
        )

    def load(self, name: str) -> VisionBackend:
        """Import a backend's plug-in and return the backend. Thread-safe; every call returns the same object.

        The import runs in a separate thread, so a plug-in that hangs, exits or raises something that is not an
        `Exception` ends neither this thread nor the process.

        Raises:
            UnknownBackendError: If it is not installed.
            PluginError: If its module cannot be imported, takes longer than `IMPORT_SECONDS`, or does not provide it.
        """
        entry = self.entry(name)
        origin = f"backend {name!r} of {entry.distribution} {entry.version}"
        advice = f"Reinstall {entry.distribution}, or report this to its authors."
        with self._lock:
            loading = self._loading.get(name)
            # A failed import may be tried again, as in Python; one that is still running is not started twice.
            if loading is None or (loading[0].done() and loading[0].exception() is not None):
                loading = self._loading[name] = Future[VisionBackend](), time.monotonic() + IMPORT_SECONDS
                what = f"visionaccel-import-{name}"
                threading.Thread(target=self._load, args=(entry, loading[0]), name=what, daemon=True).start()
        found, end = loading
        try:
            error = found.exception(max(0.0, end - time.monotonic()))
        except TimeoutError:
            raise PluginError(
                f"{origin} cannot be loaded: importing module {entry.module} took more than {IMPORT_SECONDS:g} s.",
                hint=advice,
            ) from None
        if isinstance(error, PluginError):
            raise error
        if error is not None:  # the user must learn which plug-in raised it
            raise PluginError(f"{origin} cannot be loaded: {type(error).__name__}: {error}", hint=advice) from error
        return found.result()

    def _load(self, entry: BackendEntry, loading: Future[VisionBackend]) -> None:
        try:
            loading.set_result(self._loaded(entry))
        except BaseException as error:  # also SystemExit, with which a plug-in must not end this process
            loading.set_exception(error)

    def _loaded(self, entry: BackendEntry) -> VisionBackend:
        plugin = self._points[entry.name].load()
        with self._lock:
            if not self.plugins.is_registered(plugin):
                self.plugins.register(plugin)
                self.plugins.check_pending()
            others = self.plugins.get_plugins() - {plugin}
            hook = self.plugins.subset_hook_caller("visionaccel_backends", others)
        provided = [kind for answer in hook() for kind in answer if kind.name == entry.name]
        if len(provided) != 1 or not issubclass(provided[0], VisionBackend):
            raise PluginError(
                f"backend {entry.name!r} of {entry.distribution} {entry.version}: module {entry.module} must provide "
                f"exactly one VisionBackend named {entry.name!r}.",
                hint="Return it from the hook visionaccel_backends, with `name` equal to the entry point's name.",
            )
        backend: VisionBackend = provided[0]()
        return backend


_making = threading.RLock()
_default = cache(Registry)


def default_registry() -> Registry:
    """Return the registry of installed backends, which all threads of the process share."""
    with _making:  # a second registry would have no observers
        return _default()


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "unknown")


def _origin(point: EntryPoint) -> str:
    name, version = _distribution(point)
    return f"{name} {version} ({point.value})"
