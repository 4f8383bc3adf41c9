"""Checks that import vendor code or vLLM, each in a child process of the command.

Run as `python -m visionaccel.cli.diagnosis.children FILE LIMIT backend NAME [SOURCE]`, or `... vllm`, with `trying` at
the end if no setting chooses a backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from visionaccel.backends import AUTO, Finding, VisionBackend, checked_options, default_registry
from visionaccel.cli.diagnosis.checks import looked, valid_settings
from visionaccel.encoder import open_source
from visionaccel.errors import VisionAccelError
from visionaccel.integrations.vllm.compat import architectures, contract
from visionaccel.integrations.vllm.compat.contract import WITHOUT, Feature
from visionaccel.isolation import as_finding, give_up_after, write_findings

if TYPE_CHECKING:
    from visionaccel.backends.spec import Status

_ACTIVATION, _OPTIONS = "activation", "VISIONACCEL_OPTIONS"
_RELEASE = "Install a release of vLLM that docs/compatibility.md lists."


def main(file: str, limit: str, what: Literal["backend", "vllm"], *arguments: str) -> None:
    """Check a backend or vLLM and write the findings into a file; the parent waits for `limit` seconds."""
    give_up_after(float(limit))
    name, look = ("plug-in", _of_backend) if what == "backend" else ("vLLM", _of_vllm)
    write_findings(file, looked(name, lambda: look(*arguments)))


def _of_backend(name: str, source: str | None = None) -> Iterator[Finding]:
    registry = default_registry()
    backend, entry = registry.load(name), registry.entry(name)
    yield Finding("plug-in", "pass", f"{entry.distribution} {entry.version} loads")
    yield from looked("devices", lambda: _devices(backend))
    yield from looked(_OPTIONS, lambda: _options(backend))
    yield from looked("checks", lambda: _checks(backend, source))


def _devices(backend: VisionBackend) -> Finding:
    if devices := ", ".join(map(str, backend.devices())):
        return Finding("devices", "pass", devices)
    return Finding("devices", "failure", "none", "Run `visionaccel explain` with a bundle to see why.")


def _options(backend: VisionBackend) -> Iterator[Finding]:
    """Check the options that the environment sets, if they are for this backend."""
    settings = valid_settings()
    if settings is None or settings.backend != backend.name or not settings.options:
        return
    checked_options(backend, settings.options)
    yield Finding(_OPTIONS, "pass", ", ".join(settings.options))


def _checks(backend: VisionBackend, source: str | None) -> list[Finding]:
    programs = () if source is None else open_source(source).programs(backend.formats)
    return [as_finding(finding) for finding in backend.checks(programs)]


def _of_vllm(trying: str = "") -> Iterator[Finding]:
    """Load vLLM's plug-ins as its processes do, and check which class it would make the models from."""
    try:
        import vllm
    except Exception as error:
        detail = f"vllm cannot be imported: {type(error).__name__}: {error}"
        yield Finding("import", "failure", detail, "Reinstall vLLM.")
        return
    yield Finding("import", "pass", f"vllm {vllm.__version__}")
    from vllm.plugins import load_general_plugins

    try:
        load_general_plugins()
    except VisionAccelError as error:
        yield Finding(_ACTIVATION, "failure", f"vLLM would not start: {error.message}", error.hint or "")
        return
    except Exception as error:
        detail = f"vLLM's plug-ins cannot be loaded: {type(error).__name__}: {error}"
        yield Finding(_ACTIVATION, "failure", detail, "Uninstall the plug-in that the message names.")
        return
    known = [name for name in architectures.ARCHITECTURES if architectures.derived_name(name) is not None]
    yield from _contract(known)
    yield _activation(known, bool(trying))


def _contract(models: Sequence[str]) -> Iterator[Finding]:
    """Report each feature for which this vLLM lacks a name, and each model of whose own classes it lacks one."""
    complete = True
    for feature in Feature:
        if texts := contract.missing(feature):
            complete = False
            status: Status = "failure" if feature is Feature.INLINE else "warning"
            detail = f"{'; '.join(texts)}. Without it, {WITHOUT[feature]}"
            yield Finding(f"contract: {feature}", status, detail, _RELEASE)
    for model in models:
        for finding in _contract_of(model):
            complete = False
            yield finding
    if complete:
        yield Finding("contract", "pass", "vLLM has every name that visionaccel relies on")


def _contract_of(model: str) -> Iterator[Finding]:
    """Report what one model's own classes lack; other models can be served all the same."""
    name = f"contract: {model}"
    try:
        for feature in Feature:
            own = [text for text in contract.missing(feature, model) if text not in contract.missing(feature)]
            if own:
                detail = f"{'; '.join(own)}. Without it, with this model {WITHOUT[feature]}"
                yield Finding(name, "warning", detail, _RELEASE)
    except VisionAccelError as error:  # another distribution's model
        yield Finding(name, "warning", error.message, error.hint or "")


def _activation(known: Sequence[str], trying: bool) -> Finding:
    """Check which class vLLM makes each of its models from."""
    if not known:
        ours = ", ".join(architectures.ARCHITECTURES)
        return Finding(_ACTIVATION, "failure", f"vLLM has none of the models that visionaccel serves: {ours}", _RELEASE)
    left = [name for name in known if not architectures.is_replaced(name)]
    if left:
        fix = "Install visionaccel into vLLM's environment: `pip show visionaccel` with vLLM's Python shows it."
        return Finding(_ACTIVATION, "failure", f"vLLM makes {', '.join(left)} from its own class", fix)
    tried = f" once VISIONACCEL_BACKEND is set; tried with {AUTO}" if trying else ""
    return Finding(_ACTIVATION, "pass", f"vLLM makes {', '.join(known)} from visionaccel's class{tried}")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type] # the parent passes valid arguments
