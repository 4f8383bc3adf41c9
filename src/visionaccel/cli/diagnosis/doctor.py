"""The command `visionaccel doctor`: the whole diagnosis, group by group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Annotated

import typer

from visionaccel import __version__
from visionaccel.backends import AUTO, Finding, Registry, default_registry
from visionaccel.backends.spec import Status
from visionaccel.cli.diagnosis import checks
from visionaccel.cli.diagnosis.checks import Diagnosis, Found, looked
from visionaccel.cli.output import Json, finite, print_json, print_table, results
from visionaccel.integrations.vllm import BACKEND_VARIABLES
from visionaccel.integrations.vllm.compat import TRIED_RELEASES
from visionaccel.isolation import CheckProcess

_LIMIT = 60.0
_INSTALL = "pip install 'visionaccel[onnxrt]'"
_CHILDREN = "visionaccel.cli.diagnosis.children"
_VLLM, _PLUGINS, _PLUGIN = "vLLM", "VLLM_PLUGINS", "visionaccel"
_COUNTED: Mapping[Status, str] = {"failure": "failed", "warning": "with a warning", "pass": "passed"}
_STYLES: Mapping[Status, str] = {"pass": "green", "warning": "yellow", "failure": "bold red"}


def doctor(
    source: Annotated[
        str | None, typer.Argument(help="Bundle or checkpoint to check as well. Default: VISIONACCEL_BUNDLE, if set.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Check only this backend. Default: all installed ones.")] = None,
    no_vllm: Annotated[bool, typer.Option("--no-vllm", help="Skip vLLM, which takes seconds to import.")] = False,
    limit: Annotated[
        float,
        typer.Option(min=1, max=3600, callback=finite, help="Seconds for each backend; vLLM may take twice as long."),
    ] = _LIMIT,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 after any failure.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, settings, drivers and libraries of each backend, a bundle, and vLLM.

    Each backend, and vLLM, is checked in a separate process, so a crash or hang there is only a finding.

    Exit status 1 if --backend is given and something that it needs is missing; with --strict, after any failure.
    """
    found = diagnose(source, backend, limit=limit, vllm=not no_vllm)
    if as_json:
        print_json(found.document())
    else:
        print_table(
            "",
            ("about", "what", "status", "found, and what to do"),
            [(about, of.name, of.status, f"{of.detail}\n{of.fix}".rstrip()) for about, of in found.findings],
            styles=[_STYLES[of.status] for _, of in found.findings],
        )
        results.print(", ".join(f"{found.count(status)} {word}" for status, word in _COUNTED.items()) + ".")
    failed = [about for about, finding in found.findings if finding.status == "failure"]
    if (strict and failed) or (backend and any(about != _VLLM for about in failed)):
        raise typer.Exit(1)


def diagnose(
    source: str | None = None, backend: str | None = None, *, limit: float = _LIMIT, vllm: bool = True
) -> Diagnosis:
    """Check this machine, and what is installed and set on it. What is broken is a finding, not an exception.

    Args:
        source: A bundle or checkpoint to check too; by default the bundle of the settings, if any.
        backend: Check only this backend; by default all installed ones.
        limit: Seconds that a backend may take; vLLM may take twice as long.
        vllm: Whether to import vLLM, in a child process.

    Raises:
        UnknownBackendError: If the named backend is not installed.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    registries: list[Registry] = []
    no_backend = _found("backends", lambda: _backends(registries))
    registry = registries[0] if registries else None
    every = [] if registry is None else list(registry.entries)
    entries = every if registry is None or backend is None else [registry.entry(backend)]
    plugins = {entry.distribution for entry in entries}
    settings = checks.valid_settings()
    findings = [
        *_found("environment", checks.of_environment),
        *_found("versions", lambda: checks.of_versions(plugins)),
        *_found("settings", lambda: checks.of_settings(registry)),
        *no_backend,
    ]
    if source is None and settings is not None and settings.bundle is not None and settings.bundle.is_dir():
        source = str(settings.bundle)
    opens: list[str] = []
    if source is not None:
        named = backend or (settings.backend if settings else None)
        devices = [device for device in settings.wanted_devices if device is not None] if settings else []
        wanted = None if named == AUTO else named
        looks = looked(source, lambda: checks.of_source(source, wanted, devices, [entry.name for entry in every]))
        findings += [Found("source", finding) for finding in looks]
        # Backends would only repeat the finding about a source that does not open.
        opens = [source] if looks[0].status == "pass" else []
    with ExitStack() as running:  # all at the same time: a backend that hangs must not delay the others
        children = {
            entry.name: running.enter_context(
                CheckProcess("plug-in", _CHILDREN, ["backend", entry.name, *opens], limit)
            )
            for entry in entries
        }
        in_vllm = _found(_VLLM, lambda: _of_vllm(2 * limit)) if vllm else []
        findings += [Found(name, finding) for name, child in children.items() for finding in child.findings()]
    return Diagnosis(__version__, created, (*findings, *in_vllm))


def _found(about: str, look: Callable[[], Iterable[Finding]]) -> list[Found]:
    return [Found(about, finding) for finding in looked(about, look)]


def _backends(registries: list[Registry]) -> Iterator[Finding]:
    """List the installed backends, and report if none can encode."""
    registries.append(default_registry())
    if all(entry.name == "simulated" for entry in registries[0].entries):
        yield Finding("backends", "failure", "none is installed", f"Install one, such as: {_INSTALL}")


def _of_vllm(limit: float) -> Iterator[Finding]:
    """Check vLLM's release and settings, then the rest in a child process, which may take `limit` seconds."""
    version = checks.installed("vllm")
    if version is None:
        yield Finding("installed", "pass", "no; visionaccel works without it")
        return
    if version.startswith(TRIED_RELEASES):
        yield Finding("release", "pass", f"{version}, on which visionaccel was tested")
    else:
        fix = f"If it fails, install one of {', '.join(release.rstrip('.') for release in TRIED_RELEASES)}."
        yield Finding("release", "warning", f"{version}, on which visionaccel was not tested", fix)
    name = BACKEND_VARIABLES[0]
    wanted = any(os.environ.get(variable, "").strip() for variable in BACKEND_VARIABLES)
    if wanted:
        yield Finding(name, "pass", "set, so vLLM's vision encoder is replaced")
    else:
        fix = f"Set {name} to a backend's name or to {AUTO} in the server's environment."
        yield Finding(name, "warning", "not set, so vLLM is unchanged", fix)
    allowed = os.environ.get(_PLUGINS)
    if allowed is not None and _PLUGIN not in allowed.split(","):
        detail = f"{allowed!r} leaves {_PLUGIN} out, so vLLM does not load it"
        fix = f"Add {_PLUGIN} to {_PLUGINS}, or unset it."
        yield Finding(_PLUGINS, "failure" if wanted else "warning", detail, fix)
        return
    arguments, environment = (["vllm"], os.environ) if wanted else (["vllm", "trying"], {**os.environ, name: AUTO})
    with CheckProcess("vLLM", _CHILDREN, arguments, limit, environment) as child:
        yield from child.findings()
