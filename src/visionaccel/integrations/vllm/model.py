"""vLLM's models with their vision tower on a visionaccel backend, each class derived when vLLM asks for it.

No model has a class in the source. `architectures.register_models` registers a name that is not defined here, and
`__getattr__` derives that class from the one that vLLM had registered for the architecture. vLLM keeps the flags of a
class on disk by the bytes of this file, so every flag that a derived class sets is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from visionaccel.errors import ConfigurationError, VisionAccelError
from visionaccel.families import weight_prefixes
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.activation import check_engine
from visionaccel.integrations.vllm.compat import architectures, engine_config, worker
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES
from visionaccel.integrations.vllm.compat.multimodal import MULTIMODAL_REGISTRY
from visionaccel.integrations.vllm.inline.visual import AcceleratedTower
from visionaccel.integrations.vllm.processing import FittedInfo, FittedProcessor
from visionaccel.integrations.vllm.reloading import Comparison

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Accelerated(compat.Mixin):  # type: ignore[misc]
    """Mixed in before a model of vLLM's: allocates no vision weights and skips them while loading."""

    accelerated: str  # the architecture

    # The backend takes normalised patches, has no CUDA graph, no tensor-parallel split and no LoRA of vLLM's.
    supports_mm_device_do_normalize = False
    supports_encoder_cudagraph = False
    supports_encoder_tp_data = False
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        towers: list[nn.Module] = []

        def make(*_: Any, **__: Any) -> nn.Module:
            # The stock tower's arguments drift between releases, so none is looked at.
            served = engine_config.served_model(vllm_config)
            if served.takes_media:
                towers.append(AcceleratedTower(served, receives=engine_config.receives_embeddings(vllm_config)))
            else:
                towers.append(nn.Identity())  # prompts may hold no image and no video
            return towers[-1]

        known = ARCHITECTURES[self.accelerated].towers
        with architectures.swapped_towers(architectures.stock_class(self.accelerated), known, make):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not towers:
            raise ConfigurationError(
                f"vLLM {compat.release()} makes the vision encoder of {self.accelerated} from another class than "
                f"{' or '.join(known)}, so that it was not replaced.",
                hint="Install a release of vLLM that docs/compatibility.md names, or unset VISIONACCEL_BACKEND.",
            )
        self._served_config = vllm_config  # a reload names other files in it

    @property
    def _tower(self) -> nn.Module:
        tower: nn.Module = getattr(self, ARCHITECTURES[self.accelerated].tower)
        return tower

    def embed_input_ids(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As vLLM's, which is called in each step after the step's images were encoded."""
        tower = self._tower
        if isinstance(tower, AcceleratedTower):
            tower.budget.end_step()
        embedded: torch.Tensor = super().embed_input_ids(*args, **kwargs)
        return embedded

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the language model's weights; the tower's are skipped, and after the start compared with those in use.

        If they differ, the encoder is opened again from the files that hold them, or this raises why it cannot be.
        """
        tower = self._tower
        if not isinstance(tower, AcceleratedTower) or worker.loading():
            loaded: set[str] = super().load_weights(self._without_tower(weights, None))
            return loaded
        comparison = tower.compare(lambda: engine_config.served_model(self._served_config))
        loaded = super().load_weights(self._without_tower(weights, comparison))
        try:
            tower.settle(comparison, engine_config.served_model(self._served_config))
        except VisionAccelError:
            worker.finish_reload(self, self._served_config.model_config)
            raise
        return loaded

    def _without_tower(
        self, weights: Iterable[tuple[str, torch.Tensor]], comparison: Comparison | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        prefixes = weight_prefixes((self.accelerated,))
        for name, weight in weights:
            if not name.startswith(prefixes):
                yield name, weight
            elif comparison is not None:
                comparison.note(name, weight)


def __getattr__(name: str) -> Any:
    """Derive the model class, the processing information or the processor of that name, if there is to be one."""
    for architecture in ARCHITECTURES:
        if name.startswith(f"{architecture}__"):
            derived = architectures.derived_name(architecture)
            if derived is not None and name in (derived, f"{derived}Info", f"{derived}Processor"):
                _derive(derived, architecture)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _derive(name: str, architecture: str) -> None:
    """Derive a model class, its processing information and its processor, into this module."""
    stock = architectures.stock_class(architecture)
    info, processor, dummy_inputs = architectures.processing_of(stock)
    # The vision part of an adapter is ignored, as vLLM does without --enable-tower-connector-lora.
    skipped = [*(getattr(stock, "lora_skip_prefixes", None) or ()), *weight_prefixes((architecture,))]
    # vLLM's speculative decoding knows models by the name of their class.
    model = _derived(name, Accelerated, stock, architecture, accelerated=architecture, lora_skip_prefixes=skipped)
    register = MULTIMODAL_REGISTRY.register_processor(
        _derived(f"{name}Processor", FittedProcessor, processor),
        info=_derived(f"{name}Info", FittedInfo, info),
        dummy_inputs=dummy_inputs,
    )
    register(model)


def _derived(name: str, ours: type, theirs: type, shown: str | None = None, **attributes: Any) -> type:
    """A class that can be found, and so pickled, by its qualified name in this module."""
    place = {"__module__": __name__, "__qualname__": name}
    globals()[name] = derived = type(shown or name, (ours, theirs), {**place, **attributes})
    return derived
