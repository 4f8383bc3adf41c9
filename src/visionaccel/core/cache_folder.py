"""Where this user's caches lie, by the XDG base directory specification.

It is the one variable of the environment that library calls heed: what it names is a place and decides no result.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_home", "our_cache"]


def cache_home() -> Path:
    """The folder of every program's caches; it need not exist.

    Raises:
        RuntimeError: If there is no home folder and nothing else is named.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def our_cache() -> Path:
    """The folder for what this package can make again.

    Raises:
        RuntimeError: As `cache_home`.
    """
    return cache_home() / "visionaccel"
