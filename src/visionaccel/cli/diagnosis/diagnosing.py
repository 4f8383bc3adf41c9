"""The whole diagnosis, group by group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from visionaccel import __version__
from visionaccel.backends import AUTO, Finding, Registry, default_registry
from visionaccel.cli.diagnosis.findings import Diagnosis, Found, looked
from visionaccel.cli.diagnosis.installation import installed, of_environment, of_settings, of_versions
from visionaccel.cli.diagnosis.source import OPENED, Wanted, of_source
from visionaccel.errors import SettingsError
from visionaccel.integrations.vllm import BACKEND_VARIABLES
from visionaccel.integrations.vllm.compat.releases import TRIED_RELEASES
from visionaccel.isolation import FindingProcess
from visionaccel.settings import Settings, load_settings

LIMIT = 60.0
"""Seconds that a backend may take to say what it finds; vLLM, which imports more, may take twice as long."""

SOURCE, VLLM = "source", "vLLM"

_CHILDREN = "visionaccel.cli.diagnosis.children"
_PLUGINS, _PLUGIN = "VLLM_PLUGINS", "visionaccel"


def diagnose(
    source: str | None = None, backend: str | None = None, *, limit: float = LIMIT, vllm: bool = True
) -> Diagnosis:
    """Look at this machine, and at what is installed and set on it. Nothing that is broken here makes it raise.

    Args:
        source: A bundle or checkpoint to look at too; by default the bundle that the settings name, if any.
        backend: Look at this backend only; by default at every installed one.
        limit: Seconds that a backend may take; vLLM may take twice as long.
        vllm: Whether to import vLLM, in a child process.

    Raises:
        UnknownBackendError: If the named backend is not installed.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    registry, found = _registry()
    names: list[str] = []
    plugins: set[str] = set()
    if registry is not None:
        entries = [registry.entry(backend)] if backend else list(registry.entries)
        names, plugins = [entry.name for entry in entries], {entry.distribution for entry in entries}
        found += looked("backends", "backends", lambda: _no_backend(registry))
    settings = _settings()
    source = source or (str(settings.bundle) if settings and settings.bundle and settings.bundle.is_dir() else None)
    findings = [
        *looked("environment", "environment", of_environment),
        *looked("versions", "versions", lambda: of_versions(plugins)),
        *looked("settings", "settings", lambda: of_settings(registry)),
        *found,
    ]
    opens: str | None = None
    if source is not None:
        wanted = _wanted(backend, settings, registry)
        in_source = looked(SOURCE, source, lambda: of_source(source, wanted))
        findings += in_source
        # A source that does not open has its finding; each backend would only repeat it.
        opens = source if any(each.finding.name in OPENED for each in in_source) else None
    with ExitStack() as running:  # all at once: a backend that hangs must not delay the others
        more = () if opens is None else (opens,)
        children = [
            (name, running.enter_context(FindingProcess("plug-in", _CHILDREN, ["backend", name, *more], limit)))
            for name in names
        ]
        in_vllm = looked(VLLM, VLLM, lambda: _of_vllm(2 * limit)) if vllm else []
        for name, child in children:
            findings += [Found(name, finding) for finding in child.findings()]
    findings += in_vllm
    return Diagnosis(__version__, created, tuple(findings))


def _registry() -> tuple[Registry | None, list[Found]]:
    """The installed backends, or why they are not known."""
    opened: list[Registry] = []

    def look() -> Sequence[Finding]:
        opened.append(default_registry())
        return ()

    problems = looked("backends", "backends", look)
    return (opened[0] if opened else None), problems


def _settings() -> Settings | None:
    try:
        return load_settings()
    except SettingsError:  # the settings have their own finding
        return None


def _wanted(backend: str | None, settings: Settings | None, registry: Registry | None) -> Wanted:
    named = backend or (settings.backend if settings is not None else None)
    devices = tuple(device for device in (settings.wanted_devices if settings else ()) if device is not None)
    installed = [] if registry is None else [entry.name for entry in registry.entries]
    return Wanted(None if named == AUTO else named, devices, installed)


def _no_backend(registry: Registry) -> Iterable[Finding]:
    """That nothing can encode here, if that is so."""
    if all(entry.name == "simulated" for entry in registry.entries):
        fix = "Install one, such as: pip install 'visionaccel[onnxrt]'"
        yield Finding("backends", "failure", "none is installed", fix)


def _of_vllm(limit: float) -> Iterator[Finding]:
    """What is found of vLLM: whether it is there, and of a tried release; the rest in a child process.

    Args:
        limit: Seconds that importing it may take.
    """
    version = installed("vllm")
    if version is None:
        yield Finding("installed", "pass", "no; visionaccel works without it")
        return
    yield _release(version)
    name = BACKEND_VARIABLES[0]
    wanted = any(os.environ.get(variable, "").strip() for variable in BACKEND_VARIABLES)
    if wanted:
        yield Finding(name, "pass", "set, so that vLLM's vision encoder is replaced")
    else:
        fix = f"Set {name} to a backend's name or to {AUTO} in the server's environment."
        yield Finding(name, "warning", "unset, so that vLLM is left alone", fix)
    allowed = os.environ.get(_PLUGINS)
    if allowed is not None and _PLUGIN not in allowed.split(","):
        detail = f"{allowed!r} leaves {_PLUGIN} out, so that vLLM does not load it"
        fix = f"Add {_PLUGIN} to {_PLUGINS}, or unset it."
        yield Finding(_PLUGINS, "failure" if wanted else "warning", detail, fix)
        return
    arguments, environment = (["vllm"], os.environ) if wanted else (["vllm", "trying"], {**os.environ, name: AUTO})
    with FindingProcess("vLLM", _CHILDREN, arguments, limit, environment) as child:
        yield from child.findings()


def _release(version: str) -> Finding:
    if version.startswith(TRIED_RELEASES):
        return Finding("release", "pass", f"{version}, which visionaccel was run on")
    releases = ", ".join(release.rstrip(".") for release in TRIED_RELEASES)
    return Finding(
        "release", "warning", f"{version}, which visionaccel was not run on", f"If it fails, install one of {releases}."
    )
