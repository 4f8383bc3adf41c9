"""Reads manifests of earlier schema versions: one step for each version, from it to the next.

Version 1 used one family's words: a bucket's windows, their order, and the vision configuration in the place of the
tower's description. The digest in such a manifest covers the version 1 document. `visionaccel validate` upgrades it.
"""

from __future__ import annotations

from typing import Any

from visionaccel.errors import BundleError
from visionaccel.families import family_named


def upgraded(document: dict[str, Any], where: str) -> dict[str, Any]:
    """A manifest's document as one of the present schema version; what does not fit its own version is left in it.

    Args:
        document: The manifest, of any version.
        where: How errors name it.

    Raises:
        BundleError: If its version is not known, or it states what that version does not have, or lacks what it needs.
        CheckpointError: If the vision configuration of version 1 is incomplete or impossible.
        UnsupportedArchitectureError: If the family is not known.
    """
    version = document.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise BundleError(
            f"{where} is of schema version {version!r}; this visionaccel reads 1 to {SCHEMA_VERSION}.",
            hint="Use the visionaccel that wrote it, or export the bundle again.",
        )
    for step in _STEPS[version - 1 :]:
        document = step(document, where)
    return document


def _from_1(document: dict[str, Any], where: str) -> dict[str, Any]:
    changed = {name: value for name, value in document.items() if name != "vision_config"}
    name, vision = document.get("family"), document.get("vision_config")
    _refuse(document, "spec", where)
    if not isinstance(name, str) or not isinstance(vision, dict):
        raise BundleError(
            f"{where} states no family and vision_config, as schema version 1 has them.",
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
    changed, coverage, host = dict(entry), entry.get("coverage"), entry.get("host")
    if isinstance(coverage, dict):
        _refuse(coverage, "sizes", where)
        if coverage.get("kind") == "bucket":
            sizes = {name: coverage[name] for name in ("patches", "windows") if name in coverage}
            changed["coverage"] = {**{name: coverage[name] for name in coverage if name not in sizes}, "sizes": sizes}
    if isinstance(host, dict):
        _refuse(host, "order", where)
        if "window_order" in host:
            changed["host"] = {
                **{name: host[name] for name in host if name != "window_order"},
                "order": host["window_order"],
            }
    return changed


def _refuse(stated: dict[str, Any], field: str, where: str) -> None:
    """Refuse a field of version 2: releases that wrote version 1 refuse it too."""
    if field in stated:
        raise BundleError(
            f"{where} is of schema version 1 and states {field!r}, which version 1 does not have.",
            hint="Export or fetch the bundle again.",
        )


_STEPS = (_from_1,)
SCHEMA_VERSION = 1 + len(_STEPS)
"""The version that this visionaccel writes."""
