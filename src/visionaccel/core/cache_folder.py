"""Where this user's caches lie, by the XDG base directory specification.

Library calls read no settings of visionaccel from the environment. XDG_CACHE_HOME, here, names a folder and changes no
result; oneDNN's limit on instructions, in `visionaccel.core.cpu`, is read because oneDNN obeys it.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """The folder of every program's caches; it need not exist.

    Raises:
        RuntimeError: If XDG_CACHE_HOME is not set and the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def our_cache() -> Path:
    """The folder for what this package can make again; raises as `cache_home`."""
    return cache_home() / "visionaccel"
