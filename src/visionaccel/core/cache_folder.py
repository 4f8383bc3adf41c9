"""Where this user's caches are, by the XDG base directory specification.

Library calls read no settings of visionaccel from the environment. XDG_CACHE_HOME, which is read here, changes no
result; oneDNN's limit on instructions, in `visionaccel.core.cpu`, is read because oneDNN obeys it.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """Return the folder of every program's caches; it may not exist.

    Raises:
        RuntimeError: If XDG_CACHE_HOME is not set and the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def our_cache() -> Path:
    """Return the folder for files that this package can make again. Raises the errors of `cache_home`."""
    return cache_home() / "visionaccel"
