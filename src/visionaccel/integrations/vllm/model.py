"""vLLM's models with their vision tower on a visionaccel backend. Each class is derived when vLLM first imports it.

`architectures.register_models` registers a name that is not defined here, and `__getattr__` derives that class from the
one that vLLM had registered for the architecture. vLLM caches the flags of a class on disk, keyed by the bytes of this
file, so every flag that a derived class sets is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from visionaccel.errors import ConfigurationError, VisionAccelError
from visionaccel.families import family_for
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.activation import check_engine
from visionaccel.integrations.vllm.compat import architectures, engine_config, worker
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES
from visionaccel.integrations.vllm.encoder_source import Comparison
from visionaccel.integrations.vllm.inline.visual import AcceleratedTower
from visionaccel.integrations.vllm.processing import FittedInfo, FittedProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class _NoTower(nn.Module):
    """The tower of a model whose prompts may not contain images or videos."""

    deepstack_visual_indexes = None  # Qwen3-Omni reads it to embed audio, too


class Accelerated(compat.Mixin):  # type: ignore[misc]
    """A mixin for a model of vLLM's: it allocates no vision weights, and skips them while loading."""

    accelerated: str  # the architecture

    # The backend takes normalised patches, and supports none of vLLM's CUDA graphs, tensor parallelism and LoRA.
    supports_mm_device_do_normalize = False
    supports_encoder_cudagraph = False
    supports_encoder_tp_data = False
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        towers: list[nn.Module] = []

        def make(*_: Any, **__: Any) -> nn.Module:
            # The arguments for the stock tower differ between releases, so none of them is used.
            served = engine_config.served_model(vllm_config)
            tower: nn.Module = _NoTower()
            if served.takes_media:
                tower = AcceleratedTower(served, receives=engine_config.receives_embeddings(vllm_config))
            towers.append(tower)
            return tower

        known = ARCHITECTURES[self.accelerated].towers
        with architectures.swapped_towers(architectures.stock_class(self.accelerated), known, make):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not towers:
            raise ConfigurationError(
                f"the vision encoder of {self.accelerated} was not replaced: vLLM {compat.release()} makes it from "
                f"a class other than {' or '.join(known)}.",
                hint="Install a release of vLLM that docs/compatibility.md lists, or unset VISIONACCEL_BACKEND.",
            )
        self._served_config = vllm_config  # a reload changes its model's source

    @property
    def _tower(self) -> AcceleratedTower | None:
        """The tower; None where prompts may not contain images or videos, and in later stages of a pipeline."""
        return next((child for child in self.children() if isinstance(child, AcceleratedTower)), None)

    def embed_input_ids(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embed a prompt's tokens, as vLLM does in each step after encoding the step's images."""
        if (tower := self._tower) is not None:
            tower.budget.end_step()
        embedded: torch.Tensor = super().embed_input_ids(*args, **kwargs)
        return embedded

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the language model's weights. The tower's are skipped and, after the start, compared with those in use.

        Raises:
            VisionAccelError: If they differ, and the encoder cannot be opened again from the files that vLLM reads.
        """
        tower = self._tower
        if tower is None or worker.loading():
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
        prefixes = family_for(self.accelerated).prefixes
        for name, weight in weights:
            if not name.startswith(prefixes):
                yield name, weight
            elif comparison is not None:
                comparison.note(name, weight)


def __getattr__(name: str) -> Any:
    """Derive the model class, processing information or processor of this name, if it is a registered one."""
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
    info, processor, _ = architectures.processing_of(stock)
    # As vLLM does without --enable-tower-connector-lora, ignore an adapter's tensors for the vision tower.
    skipped = [*(getattr(stock, "lora_skip_prefixes", None) or ()), *family_for(architecture).prefixes]
    # vLLM's speculative decoding recognises models by their class's name.
    known = {"accelerated": architecture}
    model = _derived(name, Accelerated, stock, stock.__name__, **known, lora_skip_prefixes=skipped)
    ours = _derived(f"{name}Info", FittedInfo, info, **known), _derived(f"{name}Processor", FittedProcessor, processor)
    architectures.register_processing(model, *ours)


def _derived(name: str, ours: type, theirs: type, shown: str | None = None, **attributes: Any) -> type:
    """Derive a class that can be found, and so pickled, by its qualified name in this module."""
    place = {"__module__": __name__, "__qualname__": name}
    globals()[name] = derived = type(shown or name, (ours, theirs), {**place, **attributes})
    return derived
