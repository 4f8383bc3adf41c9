"""The models of vLLM whose vision encoder is replaced: a row for each, and the class that vLLM has registered."""

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
"""Derives a class when vLLM asks it for a name that `derived_name` gives."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between models."""

    model: str  # vLLM's class for it, as `module:Class`, for the contract; what is derived from is the registered class
    tower: str  # the model's attribute that holds its vision tower
    towers: tuple[str, ...]  # names of the classes that it makes the tower from
    vision: tuple[str, ...]  # names that lead from the model's configuration to the tower's
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
"""By the name under which vLLM registers the model, and a family of towers takes its checkpoints.

Architectures that vLLM resolves to one of these by their suffix count as it.
"""

_stock: dict[str, Any] = {}
"""What the registry had for each architecture that was replaced."""


def register_models() -> None:
    """Register a derived class in the place of vLLM's own, for each architecture that this vLLM has."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        stock = ModelRegistry.models.get(architecture)
        if stock is not None and not is_replaced(architecture):
            _stock[architecture] = stock
            ModelRegistry.register_model(architecture, f"{_MODEL_MODULE}:{derived_name(architecture)}")


def derived_name(architecture: str) -> str | None:
    """The name of a derived class in its module, `ARCHITECTURE__RELEASE__SOURCE`; None if this vLLM has no such model.

    vLLM keeps the flags of a lazily registered class on disk, by this name and the bytes of the class's module. So the
    name says what else they depend on: vLLM's release, and the source of the stock class.
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
    """The architecture whose derived class vLLM makes a model from in this process; None if it takes another class."""
    from vllm import ModelRegistry

    name: str = ModelRegistry._normalize_arch(model.architecture, model)
    entry = ModelRegistry.models.get(name)
    return entry.class_name.partition("__")[0] if _is_derived(entry) else None


def is_replaced(architecture: str) -> bool:
    """Whether vLLM will make a model of that architecture from a class of this package."""
    from vllm import ModelRegistry

    return _is_derived(ModelRegistry.models.get(architecture))


def stock_class(architecture: str) -> Any:
    """The class that vLLM makes the model from, or would without this package."""
    return _stock_entry(architecture).load_model_cls()


def processing_of(model: Any) -> tuple[Any, Any, Any]:
    """The classes of a model's processing information, processor and dummy inputs."""
    registered = model._processor_factory
    return registered.info, registered.processor, registered.dummy_inputs


@contextmanager
def swapped_towers(model: type, towers: tuple[str, ...], make: Callable[..., nn.Module]) -> Iterator[None]:
    """While a model is constructed, have `make` make its vision tower: nothing of the stock one is allocated.

    A constructor finds the tower's class, one of `towers`, as a global of its module, perhaps under another name.
    """
    with ExitStack() as restored:
        for module in {sys.modules[kind.__module__] for kind in model.__mro__}:
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value.__name__ in towers:
                    restored.callback(setattr, module, name, value)
                    setattr(module, name, make)
        yield


def _stock_entry(architecture: str) -> Any:
    from vllm import ModelRegistry

    return _stock.get(architecture) or ModelRegistry.models.get(architecture)


def _is_derived(entry: Any) -> bool:
    return getattr(entry, "module_name", None) == _MODEL_MODULE


def source_files(module: str) -> list[Path]:
    """The files of a module, for a package all in it; found without importing it, which vLLM does when it needs it."""
    parts = module.split(".")
    spec = None
    with suppress(ValueError):  # `__main__` has none
        spec = find_spec(parts[0])
    for part in parts[1:]:
        spec = PathFinder.find_spec(part, spec.submodule_search_locations or []) if spec is not None else None
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return sorted(path for place in spec.submodule_search_locations for path in Path(place).rglob("*.py"))
    return [Path(spec.origin)] if spec.has_location and spec.origin is not None else []
