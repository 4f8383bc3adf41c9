"""What the commands say about the model of a bundle or checkpoint: its family, and whether vLLM can serve it."""

from __future__ import annotations

from dataclasses import dataclass

from visionaccel.families import Tower, supported_architectures
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Model:
    """The model of a vision tower.

    Attributes:
        family: The tower's family.
        architecture: The architecture in `config.json` that the family was found by.
        modes: The modes in which vLLM can serve it with a backend; empty if visionaccel has no row for it.
    """

    family: str
    architecture: str
    modes: tuple[str, ...]

    @property
    def in_vllm(self) -> str:
        """How vLLM can serve it, as the end of a sentence."""
        if self.modes:
            return f"vLLM can serve {self.architecture} with a backend, in-line and pipelined"
        return f"vLLM cannot serve {self.architecture} with a backend, because visionaccel has no row for it"


def model_of(tower: Tower) -> Model:
    """Return the model of a tower. vLLM is not imported."""
    known = supported_architectures()
    architecture = next(name for name in tower.checkpoint.architectures if name in known)
    return Model(tower.family, architecture, ("inline", "pipelined") if architecture in ARCHITECTURES else ())
