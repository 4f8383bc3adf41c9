"""transformers: an encoder in the place of a model's vision tower. `accelerate` and `load` are all that users call."""

from visionaccel.errors import ConfigurationError

try:
    from visionaccel.integrations.transformers.accelerate import Accelerated, accelerate, load
except ModuleNotFoundError as error:
    if error.name not in ("torch", "transformers"):
        raise
    raise ConfigurationError.missing_extra(__name__, error.name, "visionaccel[transformers]") from error

__all__ = ["Accelerated", "accelerate", "load"]
