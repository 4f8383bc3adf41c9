"""A pluggable accelerator-backend framework for vision encoders.

`open_encoder` opens a checkpoint's vision tower on a backend; `Encoder.encode` turns patches and grids into embeddings.
`open_service` puts a queue in front of one or several encoders, for callers that do something else while they wait.
Names are imported on first use, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionaccel.core.grid import Grid
    from visionaccel.encoder import Encoder, open_encoder, open_tower
    from visionaccel.errors import VisionAccelError
    from visionaccel.service import EncodeService, open_service

__all__ = [
    "EncodeService", "Encoder", "Grid", "VisionAccelError", "__version__", "open_encoder", "open_service", "open_tower",
]  # fmt: skip

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "visionaccel.encoder",
    "EncodeService": "visionaccel.service",
    "open_encoder": "visionaccel.encoder",
    "open_service": "visionaccel.service",
    "open_tower": "visionaccel.encoder",
    "Grid": "visionaccel.core.grid",
    "VisionAccelError": "visionaccel.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
