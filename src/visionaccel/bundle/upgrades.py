"""Reads manifests of earlier releases. Their digest covers the document as it was written.

Schema version 1 used the terms of one family: a bucket's windows, their order, and the vision configuration instead of
the tower's description. `visionaccel validate` upgrades such a manifest.
"""

from __future__ import annotations

from typing import Any

from visionaccel.errors import BundleError
from visionaccel.families import family_named

SCHEMA_VERSION = 2
"""The version that this visionaccel writes."""

_RETIRED = ("answers", "failure")
"""Fields of a certificate for the output of a small example model, which earlier releases wrote."""


def upgraded(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a manifest's document in the current schema version; the reader refuses fields that are still unknown.

    Raises:
        BundleError: If its version is unknown, or fields do not fit that version or are missing.
    """
    version = document.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version!r}; this visionaccel reads versions 1 to {SCHEMA_VERSION}.",
            hint="Use the visionaccel that wrote it, or export the bundle again.",
        )
    certificate = document.get("certificate")
    if isinstance(certificate, dict):
        kept = {name: value for name, value in certificate.items() if name not in _RETIRED}
        document = {**document, "certificate": kept}
    return document if version == SCHEMA_VERSION else _from_1(document, where)


def _from_1(document: dict[str, Any], where: str) -> dict[str, Any]:
    changed = {name: value for name, value in document.items() if name != "vision_config"}
    name, vision = document.get("family"), document.get("vision_config")
    _refuse(document, "spec", where)
    if not isinstance(name, str) or not isinstance(vision, dict):
        raise BundleError(
            f"{where} lacks family or vision_config, which schema version 1 requires.",
            hint="Export or fetch the bundle again.",
        )
    family = family_named(name)
    changed["spec"] = family.described(family.with_configuration({}, vision), where).document()
    changed["schema_version"] = 2
    if isinstance(document.get("programs"), list):
        changed["programs"] = [_program(entry, where) for entry in document["programs"]]
    return changed


def _program(entry: Any, where: str) -> Any:
    if not isinstance(entry, dict):
        return entry
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in entry.items()}
    coverage, host = changed.get("coverage"), changed.get("host")
    if isinstance(coverage, dict):
        _refuse(coverage, "sizes", where)
        if coverage.get("kind") == "bucket":
            coverage["sizes"] = {name: coverage.pop(name) for name in ("patches", "windows") if name in coverage}
    if isinstance(host, dict):
        _refuse(host, "order", where)
        if "window_order" in host:
            host["order"] = host.pop("window_order")
    return changed


def _refuse(stated: dict[str, Any], field: str, where: str) -> None:
    """Refuse a field of version 2, as the releases that wrote version 1 do."""
    if field in stated:
        raise BundleError(
            f"{where} has schema version 1 and the field {field!r}, which version 1 does not allow.",
            hint="Export or fetch the bundle again.",
        )
