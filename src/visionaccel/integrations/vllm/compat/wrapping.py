"""Replaces methods of vLLM's by functions that call them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_OURS = "_wrapped_by_visionaccel"
"""An attribute of each method that was wrapped here, as other plug-ins wrap methods too."""


def wrap_once(kind: Any, name: str, wrapper: Callable[[Any], Any]) -> bool:
    """Replace a method by the one that `wrapper` makes of it, once; return whether this call did."""
    method = getattr(kind, name, None)
    if method is None or hasattr(method, _OURS):
        return False
    wrapped = functools.wraps(method)(wrapper(method))
    setattr(wrapped, _OURS, True)
    setattr(kind, name, wrapped)
    return True
