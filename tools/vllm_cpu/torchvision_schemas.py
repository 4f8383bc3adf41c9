"""Lets torchvision's CUDA wheel be imported next to CPU torch. Development only.

The wheel's compiled operators need CUDA libraries and do not load, after which torchvision registers shape functions
for operators that do not exist, and its import fails. Declaring the two schemas is enough: image processing uses
torchvision's transforms, which are plain torch. Does nothing where the operators exist.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []
"""torch forgets a declared schema when the library object that declared it is collected."""


class _Declare(importlib.abc.MetaPathFinder):
    """Finds nothing itself; declares the schemas just before the module that needs them is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision._meta_registrations":
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in _SCHEMAS:
                    library.define(schema)
                _libraries.append(library)
        return None


sys.meta_path.insert(0, _Declare())
