"""vLLM's Qwen2.5-VL with its vision tower on a visionaccel backend. Resolved lazily by vLLM's model registry.

The registry asks for the class by a name that `compat.register_model` has extended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from visionaccel.errors import VisionAccelError
from visionaccel.families import weight_prefixes
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.activation import MODELS, check_engine
from visionaccel.integrations.vllm.compat import (
    MULTIMODAL_REGISTRY,
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
)
from visionaccel.integrations.vllm.inline.tower import AbsentTower, AcceleratedTower
from visionaccel.integrations.vllm.processing import FittedProcessingInfo, FittedProcessor
from visionaccel.integrations.vllm.reloading import Comparison

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig

__all__ = ["AcceleratedQwen25VL"]


@MULTIMODAL_REGISTRY.register_processor(
    FittedProcessor, info=FittedProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class AcceleratedQwen25VL(Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Allocates no vision weights and skips them while loading; all else is vLLM's."""

    # The backend takes normalised patches, has no CUDA graph, no tensor-parallel split and no LoRA of vLLM's. The
    # vision part of an adapter is ignored, as vLLM does without --enable-tower-connector-lora.
    supports_mm_device_do_normalize = False
    supports_encoder_cudagraph = False
    supports_encoder_tp_data = False
    supports_tower_connector_lora = False
    lora_skip_prefixes = ("visual.",)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)

        def make(*_: Any, **__: Any) -> nn.Module:
            # The stock tower's arguments drift between releases, so none is looked at.
            served = compat.served_model(vllm_config)
            if not served.takes_media:
                return AbsentTower()
            return AcceleratedTower(served, receives=compat.receives_embeddings(vllm_config))

        with compat.swapped_tower(Qwen2_5_VLForConditionalGeneration, make):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._served_config = vllm_config  # a reload names other files in it

    def embed_input_ids(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As vLLM's. It is called in each step after the step's images were encoded."""
        if isinstance(self.visual, AcceleratedTower):
            self.visual.budget.end_step()
        embedded: torch.Tensor = super().embed_input_ids(*args, **kwargs)
        return embedded

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the language model's weights; the tower's are skipped, and after the start compared with those in use.

        Raises:
            ConfigurationError: If vLLM is given other weights for the vision encoder than any files hold.
            VisionAccelError: If the encoder cannot be opened again from the files that hold them.
        """
        tower = self.visual
        if not isinstance(tower, AcceleratedTower) or compat.loading():
            loaded: set[str] = super().load_weights(_without_tower(weights, None))
            return loaded
        comparison = tower.compare(lambda: compat.served_model(self._served_config))
        loaded = super().load_weights(_without_tower(weights, comparison))
        try:
            tower.settle(comparison, compat.served_model(self._served_config))
        except VisionAccelError:
            compat.finish_reload(self, self._served_config.model_config)
            raise
        return loaded


def _without_tower(
    weights: Iterable[tuple[str, torch.Tensor]], comparison: Comparison | None
) -> Iterator[tuple[str, torch.Tensor]]:
    prefixes = weight_prefixes(MODELS)
    for name, weight in weights:
        if not name.startswith(prefixes):
            yield name, weight
        elif comparison is not None:
            comparison.note(name, weight)


def __getattr__(name: str) -> Any:
    if name.partition("__")[0] == AcceleratedQwen25VL.__name__:
        return AcceleratedQwen25VL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
