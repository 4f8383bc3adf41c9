"""Makes bundles of artifacts that AMD's Vitis AI compiler wrote, after checking them against a checkpoint."""

from visionaccel_flexmlrt.vitisai.importing import Imported, import_vitisai
from visionaccel_flexmlrt.vitisai.layout import ImportRequest

__all__ = ["ImportRequest", "Imported", "import_vitisai"]
