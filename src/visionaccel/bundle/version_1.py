"""Reads manifests of schema version 1 as manifests of version 2.

Version 1 used one family's words: a bucket's windows, their order, and the vision configuration in the place of the
tower's description. The digest in such a manifest covers the version 1 document. `visionaccel validate` upgrades it.
"""

from __future__ import annotations

from typing import Any

from visionaccel.errors import BundleError
from visionaccel.families import family_named

__all__ = ["upgraded"]


def upgraded(document: dict[str, Any], where: str) -> dict[str, Any]:
    """A document of version 1 as one of version 2; what does not fit version 1 stays, and is refused as version 2.

    Args:
        document: The manifest.
        where: How errors name it.

    Raises:
        BundleError: If it states no family or no vision configuration.
        CheckpointError: If the vision configuration is incomplete or impossible.
        UnsupportedArchitectureError: If the family is not known.
    """
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
