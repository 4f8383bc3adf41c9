"""Vision towers: their description, and the tables, programs and host work that are derived from it."""

from visionaccel.core.tower_spec import Activation, Gated, Linear, Merge, Norm, Positions, Step, TowerSpec
from visionaccel.towers.family import Family, VisionConfiguration
from visionaccel.towers.host import GROUPED, RASTER, Host, PatchEmbedding
from visionaccel.towers.tables import make_tables, tower_tables, window_order
from visionaccel.towers.tower import Tower

__all__ = [
    "GROUPED", "RASTER", "Activation", "Family", "Gated", "Host", "Linear", "Merge", "Norm", "PatchEmbedding",
    "Positions", "Step", "Tower", "TowerSpec", "VisionConfiguration", "make_tables", "tower_tables", "window_order",
]  # fmt: skip
