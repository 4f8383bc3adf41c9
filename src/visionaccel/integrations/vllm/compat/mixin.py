"""The base of what is mixed in before a class of vLLM's, which is known only when that class is."""

from typing import TYPE_CHECKING, Any

__all__ = ["Mixin"]

if TYPE_CHECKING:
    Mixin: Any = object  # so that what the class of vLLM's has is not missed
else:
    Mixin = object
