"""Observers that a process has one of."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from visionaccel.backends import default_registry

__all__ = ["installed"]

_T = TypeVar("_T")
_owners: dict[str, int] = {}
_installing = [threading.RLock()]
os.register_at_fork(after_in_child=lambda: _installing.__setitem__(0, threading.RLock()))


def installed(kind: type[_T], make: Callable[[], _T]) -> _T:
    """The observer of a kind in this process, made and registered now if there is none.

    A fork makes its own: its parent's counts are not its own, and locks may be held by threads that it does not have.

    Args:
        kind: The observer's class.
        make: Makes one.
    """
    plugins, name = default_registry().plugins, kind.__name__
    with _installing[0]:
        found = plugins.get_plugin(name)
        if isinstance(found, kind) and _owners.get(name) == os.getpid():
            return found
        if found is not None:
            plugins.unregister(found)
        made = make()
        plugins.register(made, name)
        _owners[name] = os.getpid()
        return made
