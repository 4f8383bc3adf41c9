"""transformers: an encoder in the place of a model's vision tower. `accelerate` and `load` are all that users call."""

from visionaccel.integrations.transformers.accelerate import Accelerated, accelerate, load

__all__ = ["Accelerated", "accelerate", "load"]
