"""The encoder that users call, and how it is opened."""

from visionaccel.encoder.encoder import Encoder, OpenProgram
from visionaccel.encoder.held_weights import WantedWeights, hold_source
from visionaccel.encoder.matching import open_matching, source_digest
from visionaccel.encoder.opening import WantedIsolation, open_encoder, open_source, open_tower

__all__ = [
    "Encoder", "OpenProgram", "WantedIsolation", "WantedWeights", "hold_source", "open_encoder", "open_matching",
    "open_source", "open_tower", "source_digest",
]  # fmt: skip
