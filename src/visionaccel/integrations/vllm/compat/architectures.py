"""The models of vLLM whose vision encoder is replaced: one row for each, and the class that vLLM registered for it."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from visionaccel.integrations.vllm.compat import release

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig

_MODEL_MODULE = "visionaccel.integrations.vllm.model"
"""Derives a class when vLLM imports a name from it that `derived_name` returned."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between models."""

    model: str  # vLLM's class as `module:Class`, for the contract; the registered class may be a different one
    tower: str  # the model's attribute for its vision tower
    towers: tuple[str, ...]  # names of the classes that it makes the tower from
    vision: tuple[str, ...]  # path of attributes from the model's configuration to the tower's
    epsilon: str  # the entry of the model's configuration that vLLM's tower adds to variances
    # For the smallest and the largest area: the entry of the image processor's `size`, and the option that replaces it.
    pixel_limits: tuple[tuple[str, str], tuple[str, str]]


_MODELS = "vllm.model_executor.models"

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "Qwen2_5_VLForConditionalGeneration": Architecture(
            model=f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
            tower="visual",
            towers=("Qwen2_5_VisionTransformer",),
            vision=("vision_config",),
            epsilon="rms_norm_eps",
            pixel_limits=(("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")),
        ),
    }
)
"""Keyed by the name under which vLLM registers the model; a family of towers must read its checkpoints.

An architecture that vLLM resolves to one of these by its suffix counts as that one.
"""

_stock: dict[str, Any] = {}
"""vLLM's own registry entries of the architectures that were replaced."""


def register_models() -> None:
    """Register a derived class instead of vLLM's own, for each architecture that this vLLM has."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        stock = _registered(architecture)
        if stock is not None and not _is_derived(stock):
            _stock[architecture] = stock
            ModelRegistry.register_model(architecture, f"{_MODEL_MODULE}:{derived_name(architecture)}")


def derived_name(architecture: str) -> str | None:
    """Return a derived class's name in its module, `ARCHITECTURE__RELEASE__SOURCE`; None if this vLLM lacks the model.

    vLLM caches the flags of a lazily registered class on disk, keyed by this name and the bytes of the class's module.
    So the name contains what else they depend on: vLLM's release, and a digest of the stock class's source.
    """
    stock = _stock_entry(architecture)
    if stock is None:
        return None
    kind = getattr(stock, "model_cls", None)
    module, name = (kind.__module__, kind.__qualname__) if kind is not None else (stock.module_name, stock.class_name)
    digest = hashlib.sha256(f"{module}:{name}".encode())
    for path in source_files(module):
        digest.update(path.read_bytes())
    return f"{architecture}__{re.sub(r'[^a-zA-Z0-9]+', '_', release())}__{digest.hexdigest()[:12]}"


def replaced_architecture(model: ModelConfig) -> str | None:
    """Return the architecture whose derived class vLLM makes a model from in this process; None for any other class."""
    from vllm import ModelRegistry

    entry = _registered(ModelRegistry._normalize_arch(model.architecture, model))
    return entry.class_name.partition("__")[0] if _is_derived(entry) else None


def is_replaced(architecture: str) -> bool:
    """Return whether vLLM will make a model of this architecture from a class of this package."""
    return _is_derived(_registered(architecture))


def stock_class(architecture: str) -> Any:
    """Return the class from which vLLM makes the model, or would without this package."""
    return _stock_entry(architecture).load_model_cls()


def processing_of(model: Any) -> tuple[Any, Any, Any]:
    """Return the classes of a model's processing information, processor and dummy inputs."""
    registered = model._processor_factory
    return registered.info, registered.processor, registered.dummy_inputs


def register_processing(model: Any, info: type, processor: type) -> None:
    """Replace the processing information and the processor of a derived model."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    *_, dummy_inputs = processing_of(model)
    MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=dummy_inputs)(model)


@contextmanager
def swapped_towers(model: type, towers: tuple[str, ...], make: Callable[..., nn.Module]) -> Iterator[None]:
    """While a model is constructed, have `make` make its vision tower, so that the stock tower allocates nothing.

    The constructor looks the tower's class, one of `towers`, up in its module's globals, maybe under another name.
    """
    with ExitStack() as restored:
        for module in {sys.modules[kind.__module__] for kind in model.__mro__}:
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value.__name__ in towers:
                    restored.callback(setattr, module, name, value)
                    setattr(module, name, make)
        yield


def source_files(module: str) -> list[Path]:
    """Return the source files of a module or of all of a package, found without importing it."""
    parts = module.split(".")
    spec = None
    with suppress(ValueError):  # `__main__` has no spec
        spec = find_spec(parts[0])
    for part in parts[1:]:
        spec = PathFinder.find_spec(part, spec.submodule_search_locations or []) if spec is not None else None
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return sorted(path for place in spec.submodule_search_locations for path in Path(place).rglob("*.py"))
    return [Path(spec.origin)] if spec.has_location and spec.origin is not None else []


def _registered(architecture: str) -> Any:
    from vllm import ModelRegistry

    return ModelRegistry.models.get(architecture)


def _stock_entry(architecture: str) -> Any:
    return _stock.get(architecture) or _registered(architecture)


def _is_derived(entry: Any) -> bool:
    return getattr(entry, "module_name", None) == _MODEL_MODULE
