"""Bundles of what AMD's Vitis AI compiler leaves: the folder is read, checked against a checkpoint, and packed."""

from visionaccel_flexmlrt.vitisai.importing import Imported, import_vitisai
from visionaccel_flexmlrt.vitisai.layout import ImportRequest

__all__ = ["ImportRequest", "Imported", "import_vitisai"]
