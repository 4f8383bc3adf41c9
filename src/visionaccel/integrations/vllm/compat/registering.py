"""vLLM's registry of models: which class it makes a model from, and what that class was before."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES
from visionaccel.integrations.vllm.compat.releases import release

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "architecture_of", "is_registered", "is_replaced", "processing_of", "register_models", "stock_class",
    "swapped_towers", "use_model_in_process",
]  # fmt: skip

_stock: dict[str, Any] = {}
"""What the registry had for each architecture that was replaced."""


def register_models(module: str) -> None:
    """Register a derived class in the place of vLLM's own, for each architecture that this vLLM has.

    vLLM keeps the flags of a lazily registered class on disk, by the class's name and the bytes of its module's file.
    So the name says what else the flags of a derived class depend on: vLLM's release and its own model's source.

    Args:
        module: Derives each class when vLLM asks it for the registered name, `ARCHITECTURE__RELEASE__SOURCE`.
    """
    from vllm import ModelRegistry

    running = re.sub(r"\W+", "_", release())
    for architecture in ARCHITECTURES:
        stock: Any = ModelRegistry.models.get(architecture)
        if stock is not None and not is_replaced(architecture):
            _stock[architecture] = stock
            source = _source_digest(str(getattr(stock, "module_name", "")))
            ModelRegistry.register_model(architecture, f"{module}:{architecture}__{running}__{source}")


def architecture_of(name: str) -> str | None:
    """The architecture of a derived class by the class's name; None if it is not the name of one."""
    architecture, marked, _ = name.partition("__")
    return architecture if marked and architecture in ARCHITECTURES else None


def stock_class(architecture: str) -> Any:
    """The class that vLLM makes the model from, or would without this package."""
    from vllm import ModelRegistry

    return (_stock.get(architecture) or ModelRegistry.models[architecture]).load_model_cls()


def processing_of(model: Any) -> tuple[Any, Any, Any]:
    """The classes of a model's processing information, processor and dummy inputs."""
    registered = model._processor_factory
    return registered.info, registered.processor, registered.dummy_inputs


def is_registered(architecture: str) -> bool:
    """Whether vLLM has a class for that architecture, its own or a derived one."""
    from vllm import ModelRegistry

    return architecture in ModelRegistry.models


def is_replaced(architecture: str) -> bool:
    """Whether vLLM will make a model of that architecture from a class of this package."""
    from vllm import ModelRegistry

    return str(getattr(ModelRegistry.models.get(architecture), "module_name", "")).startswith("visionaccel.")


def use_model_in_process(architecture: str) -> None:
    """Let vLLM look at one of its model classes in this process, instead of in a child that imports it."""
    from vllm import ModelRegistry

    found = ModelRegistry.models.get(architecture)
    if found is not None:
        ModelRegistry.register_model(architecture, found.load_model_cls())


@contextmanager
def swapped_towers(model: type, towers: tuple[str, ...], make: Callable[..., nn.Module]) -> Iterator[None]:
    """While a model is constructed, have `make` make its vision tower: nothing of the stock one is allocated.

    A constructor finds the tower's class as a global of its module, which may have another name for it.

    Args:
        model: vLLM's class.
        towers: Names of the classes of its tower.
        make: Gets the arguments of the tower's constructor, which differ between releases.
    """
    modules = {kind.__module__: sys.modules[kind.__module__] for kind in model.__mro__}
    swapped = [
        (module, name, value)
        for module in modules.values()
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__name__ in towers
    ]
    for module, name, _ in swapped:
        setattr(module, name, make)
    try:
        yield
    finally:
        for module, name, value in swapped:
            setattr(module, name, value)


def _source_digest(module: str) -> str:
    """Digest of a module of vLLM's, found without importing it."""
    import vllm

    source = Path(vllm.__path__[0], *module.split(".")[1:]).with_suffix(".py")
    return hashlib.sha256(source.read_bytes() if source.is_file() else b"").hexdigest()[:12]
