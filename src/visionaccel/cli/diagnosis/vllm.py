"""vLLM: whether it is there, of a release that was tried, and given its vision encoder by this package."""

from __future__ import annotations

import os
from collections.abc import Iterable

from visionaccel.backends import AUTO, Finding
from visionaccel.cli.diagnosis.versions import installed
from visionaccel.cli.diagnosis.vllm_child import ACTIVATION
from visionaccel.integrations.vllm import BACKEND_VARIABLES
from visionaccel.integrations.vllm.compat.releases import TRIED_RELEASES
from visionaccel.isolation import FindingProcess

__all__ = ["of_vllm"]

_CHILD = "visionaccel.cli.diagnosis.vllm_child"
_PLUGINS = "VLLM_PLUGINS"
_PLUGIN = "visionaccel"


def of_vllm(limit: float) -> Iterable[Finding]:
    """What is found of vLLM, the last of it in a child process.

    Args:
        limit: Seconds that importing it may take.
    """
    version = installed("vllm")
    if version is None:
        yield Finding("installed", "pass", "no; visionaccel works without it")
        return
    yield _release(version)
    wanted = any(os.environ.get(name, "").strip() for name in BACKEND_VARIABLES)
    yield _wanted(wanted)
    excluded = _excluded(wanted)
    if excluded is not None:
        yield excluded
        return
    environment = os.environ if wanted else {**os.environ, BACKEND_VARIABLES[0]: AUTO}
    with FindingProcess("vLLM", _CHILD, [], limit, environment) as child:
        found = child.findings()
    for finding in found:
        if wanted or finding.name != ACTIVATION or finding.status != "pass":
            yield finding
        else:
            detail = f"{finding.detail} once VISIONACCEL_BACKEND is set; tried with {AUTO}"
            yield Finding(finding.name, "pass", detail)


def _release(version: str) -> Finding:
    if version.startswith(TRIED_RELEASES):
        return Finding("release", "pass", f"{version}, which visionaccel was run on")
    releases = ", ".join(release.rstrip(".") for release in TRIED_RELEASES)
    return Finding(
        "release", "warning", f"{version}, which visionaccel was not run on", f"If it fails, install one of {releases}."
    )


def _wanted(wanted: bool) -> Finding:
    name = BACKEND_VARIABLES[0]
    if wanted:
        return Finding(name, "pass", "set, so that vLLM's vision encoder is replaced")
    fix = f"Set {name} to a backend's name or to {AUTO} in the server's environment."
    return Finding(name, "warning", "unset, so that vLLM is left alone", fix)


def _excluded(wanted: bool) -> Finding | None:
    """That vLLM is told to leave this package's plug-in out, if it is."""
    allowed = os.environ.get(_PLUGINS)
    if allowed is None or _PLUGIN in allowed.split(","):
        return None
    return Finding(
        _PLUGINS,
        "failure" if wanted else "warning",
        f"{allowed!r} leaves {_PLUGIN} out, so that vLLM does not load it",
        f"Add {_PLUGIN} to {_PLUGINS}, or unset it.",
    )
