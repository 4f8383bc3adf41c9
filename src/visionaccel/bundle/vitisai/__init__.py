"""Bundles of what AMD's Vitis AI compiler leaves: the folder is read, checked against a checkpoint, and packed."""

from visionaccel.bundle.vitisai.findings import ImportRequest
from visionaccel.bundle.vitisai.importing import Imported, import_vitisai

__all__ = ["ImportRequest", "Imported", "import_vitisai"]
