"""Settings: whether each variable is known, has a value that it takes, and names what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from visionaccel.backends import AUTO, Finding, Registry
from visionaccel.errors import UnknownBackendError
from visionaccel.settings import PREFIX, Settings, load_settings

__all__ = ["of_settings", "unknown_variables"]


def of_settings(registry: Registry | None) -> Iterator[Finding]:
    """What is found of the environment's settings.

    Args:
        registry: The installed backends, which settings name; None if they are not known.

    Raises:
        SettingsError: If a value is invalid.
    """
    yield from unknown_variables(os.environ)
    settings = load_settings()
    given = [f"{name}={os.environ[name]}" for name in sorted(_known()) if os.environ.get(name)]
    yield Finding("variables", "pass", ", ".join(given) or "none is set")
    wanted = [("BACKEND", settings.backend), *(("FALLBACK", name) for name in settings.fallback)]
    for field, name in wanted:
        if registry is not None and name not in (None, AUTO):
            yield from _named(registry, f"{PREFIX}{field}", name)
    if AUTO in settings.fallback:
        fix = "Name a backend, such as torch_ref."
        yield Finding(f"{PREFIX}FALLBACK", "failure", f"{AUTO!r}: a fallback must be named", fix)
    if settings.bundle is not None and not settings.bundle.is_dir():
        fix = "Run `visionaccel pull`, or correct the path."
        yield Finding(f"{PREFIX}BUNDLE", "failure", f"{settings.bundle} is not a folder", fix)


def unknown_variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that begin as settings do and are none."""
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in _known():
            near = get_close_matches(name, _known(), 1)
            fix = f"Did you mean {near[0]}?" if near else "Unset it, or see the table of settings."
            yield Finding(name, "warning", "not a setting, and ignored", fix)


def _known() -> set[str]:
    return {PREFIX + name.upper() for name in Settings.model_fields}


def _named(registry: Registry, variable: str, backend: str) -> Iterator[Finding]:
    try:
        registry.entry(backend)
    except UnknownBackendError as error:
        yield Finding(variable, "failure", error.message, error.hint or "")
