"""Looks that import a vendor's code or vLLM, each in a child process of the command.

Run as `python -m visionaccel.cli.diagnosis.children FILE LIMIT backend NAME [SOURCE]`, or `... vllm`, with `trying` at
the end if no setting asks for a backend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pydantic import ValidationError

from visionaccel.backends import AUTO, Finding, ProgramSource, VisionBackend, default_registry
from visionaccel.cli.diagnosis.findings import looked
from visionaccel.core.invalid_values import problems_of
from visionaccel.encoder import open_source
from visionaccel.errors import SettingsError, VisionAccelError
from visionaccel.isolation import answer_with, as_finding, give_up_after
from visionaccel.settings import load_settings

_ACTIVATION = "activation"
_RELEASE = "Install a release of vLLM that docs/compatibility.md names."


def main(file: str, limit: str, what: Literal["backend", "vllm"], *arguments: str) -> None:
    """Look at a backend or at vLLM, and write what was found into a file.

    Args:
        file: Where the answer goes.
        limit: Seconds after which the parent no longer waits for it.
        what: What to look at.
        arguments: For a backend its name, and a bundle or checkpoint whose programs to look at too. For vLLM anything
            if a backend is set for this look only.
    """
    give_up_after(float(limit))
    answer_with(file, list((_of_backend if what == "backend" else _of_vllm)(*arguments)))


def _of_backend(name: str, source: str | None = None) -> Iterator[Finding]:
    registry = default_registry()
    entry = registry.entry(name)
    loaded: list[VisionBackend] = []
    problems = _looked("plug-in", lambda: loaded.append(registry.load(name)))
    if problems:
        yield from problems
        return
    (backend,) = loaded
    yield Finding("plug-in", "pass", f"{entry.distribution} {entry.version} loads")
    yield from _looked("devices", lambda: [_devices(backend)])
    yield from _looked("options", lambda: _options(backend))
    yield from _looked("checks", lambda: _checks(backend, source))


def _looked(name: str, look: Callable[[], Sequence[Finding] | None]) -> list[Finding]:
    return [found.finding for found in looked("", name, lambda: look() or ())]


def _devices(backend: VisionBackend) -> Finding:
    devices = ", ".join(map(str, backend.devices()))
    if devices:
        return Finding("devices", "pass", devices)
    return Finding("devices", "failure", "none", "See `visionaccel explain` with a bundle for why.")


def _options(backend: VisionBackend) -> Sequence[Finding]:
    """The options that the environment sets, if they are for this backend."""
    try:
        settings = load_settings()
    except SettingsError:  # the settings have their own finding
        return ()
    if settings.backend != backend.name or not settings.options:
        return ()
    try:
        backend.options.model_validate(dict(settings.options))
    except ValidationError as error:
        known = ", ".join(backend.options.model_fields) or "none"
        return [Finding("VISIONACCEL_OPTIONS", "failure", problems_of(error), f"Options it takes: {known}.")]
    return [Finding("VISIONACCEL_OPTIONS", "pass", ", ".join(settings.options))]


def _checks(backend: VisionBackend, source: str | None) -> list[Finding]:
    opened: ProgramSource | None = None if source is None else open_source(source)
    programs = opened.programs(backend.formats) if opened is not None else ()
    return [as_finding(finding) for finding in backend.checks(programs)]


def _of_vllm(trying: str = "") -> Iterator[Finding]:
    """Load vLLM's plug-ins as its processes do, and report which class it would make our models from."""
    try:
        import vllm
    except Exception as error:
        detail = f"vllm cannot be imported: {type(error).__name__}: {error}"
        yield Finding("import", "failure", detail, "Reinstall vLLM.")
        return
    yield Finding("import", "pass", f"vllm {vllm.__version__}")
    from visionaccel.integrations.vllm.compat import architectures, engine_config

    try:
        engine_config.load_plugins()
    except VisionAccelError as error:
        yield Finding(_ACTIVATION, "failure", f"vLLM would not start: {error.message}", error.hint or "")
        return
    except Exception as error:
        detail = f"vLLM's plug-ins cannot be loaded: {type(error).__name__}: {error}"
        yield Finding(_ACTIVATION, "failure", detail, "Uninstall the plug-in that the message names.")
        return
    known = [name for name in architectures.ARCHITECTURES if architectures.is_registered(name)]
    yield from _contract(known)
    yield _activation(known, bool(trying))


def _contract(architectures: Sequence[str]) -> Iterator[Finding]:
    """Each feature that this vLLM lacks a name for, whether of vLLM in general or of some of the models."""
    from visionaccel.integrations.vllm.compat import contract
    from visionaccel.integrations.vllm.compat.contract import WITHOUT, Feature

    whole = True
    for feature in Feature:
        lacking = [text for architecture in (None, *architectures) for text in contract.missing(feature, architecture)]
        if lacking:
            whole = False
            status: Literal["warning", "failure"] = "failure" if feature is Feature.INLINE else "warning"
            detail = f"{'; '.join(dict.fromkeys(lacking))}. Without it, {WITHOUT[feature]}"
            yield Finding(f"contract: {feature}", status, detail, _RELEASE)
    if whole:
        yield Finding("contract", "pass", "every name of vLLM that visionaccel relies on is there")


def _activation(known: Sequence[str], trying: bool) -> Finding:
    """Which class vLLM makes each model from, of those that it has."""
    from visionaccel.integrations.vllm.compat import architectures

    if not known:
        ours = ", ".join(architectures.ARCHITECTURES)
        return Finding(_ACTIVATION, "failure", f"vLLM has none of the models that visionaccel serves: {ours}", _RELEASE)
    left = [name for name in known if not architectures.is_replaced(name)]
    if left:
        return Finding(
            _ACTIVATION,
            "failure",
            f"vLLM makes {', '.join(left)} from its own class",
            "Install visionaccel into vLLM's environment: `pip show visionaccel` with vLLM's Python shows it.",
        )
    tried = f" once VISIONACCEL_BACKEND is set; tried with {AUTO}" if trying else ""
    return Finding(_ACTIVATION, "pass", f"vLLM makes {', '.join(known)} from visionaccel's class{tried}")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type] # the words that a parent gives
