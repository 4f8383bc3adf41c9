"""The models of vLLM whose vision encoder is replaced: one row for each, and the class that vLLM registered for it."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionaccel.core.entry_points import ArchitectureEntries
from visionaccel.integrations.vllm.architecture import Architecture
from visionaccel.integrations.vllm.compat import release
from visionaccel.integrations.vllm.compat.wrapping import wrap_once

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig

_MODEL_MODULE = "visionaccel.integrations.vllm.model"
"""Derives a class when vLLM imports a name from it that `derived_name` returned."""


_MODELS = "vllm.model_executor.models"

GROUP = "visionaccel.vllm_models"
"""The entry-point group with other distributions' rows."""


def _of_qwen3(model: str) -> Architecture:
    return Architecture(model=f"{_MODELS}.{model}", towers=("Qwen3_VisionTransformer",))


_QWEN2_VL = Architecture(
    model=f"{_MODELS}.qwen2_vl:Qwen2VLForConditionalGeneration", towers=("Qwen2VisionTransformer",)
)
_QWEN3_VL = _of_qwen3("qwen3_vl:Qwen3VLForConditionalGeneration")
_QWEN3_5 = _of_qwen3("qwen3_5:Qwen3_5ForConditionalGeneration")
_GLM4V = Architecture(
    model=f"{_MODELS}.glm4_1v:Glm4vForConditionalGeneration",
    towers=("Glm4vVisionTransformer",),
    usual_epsilon=1e-5,
    limits_count_frames=True,
)
_QWEN2_5_OMNI = Architecture(
    model=f"{_MODELS}.qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration",
    towers=("Qwen2_5_VisionTransformer",),
    epsilon=("thinker_config", "text_config", "rms_norm_eps"),
)

ARCHITECTURES = ArchitectureEntries(
    GROUP,
    Architecture,
    shown="visionaccel.integrations.vllm.Architecture",
    what="vLLM model",
    own={
        "Qwen2VLForConditionalGeneration": _QWEN2_VL,
        "Qwen2_5_VLForConditionalGeneration": Architecture(
            model=f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration", towers=("Qwen2_5_VisionTransformer",)
        ),
        "Qwen2_5OmniModel": _QWEN2_5_OMNI,
        "Qwen2_5OmniForConditionalGeneration": _QWEN2_5_OMNI,
        "Qwen3VLForConditionalGeneration": _QWEN3_VL,
        "Qwen3VLMoeForConditionalGeneration": _of_qwen3("qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration"),
        "Qwen3OmniMoeForConditionalGeneration": Architecture(
            model=f"{_MODELS}.qwen3_omni_moe_thinker:Qwen3OmniMoeThinkerForConditionalGeneration",
            towers=("Qwen3Omni_VisionTransformer",),
            epsilon=("thinker_config", "text_config", "rms_norm_eps"),
        ),
        "Qwen3_5ForConditionalGeneration": _QWEN3_5,
        "Qwen3_5MoeForConditionalGeneration": _of_qwen3("qwen3_5:Qwen3_5MoeForConditionalGeneration"),
        "Glm4vForConditionalGeneration": _GLM4V,
        "Glm4vMoeForConditionalGeneration": replace(
            _GLM4V, model=f"{_MODELS}.glm4_1v:Glm4vMoeForConditionalGeneration"
        ),
        "DotsOCRForCausalLM": Architecture(
            model=f"{_MODELS}.dots_ocr:DotsOCRForCausalLM",
            towers=("DotsVisionTransformer",),
            epsilon=("vision_config", "rms_norm_eps"),
            usual_epsilon=1e-5,
        ),
        # Pooling models, whose classes in vLLM are subclasses of those in their rows.
        "JinaVLForRanking": _QWEN2_VL,
        "ColQwen3": _QWEN3_VL,
        "OpsColQwen3Model": _QWEN3_VL,
        "Qwen3VLNemotronEmbedModel": _QWEN3_VL,
        "ColQwen3_5": _QWEN3_5,
    },
)
"""A row for each model, by the architecture under which vLLM registers it; a family must read its checkpoints.

An architecture that vLLM resolves to one of these by its suffix counts as that one. Other distributions add rows.
"""

_stock: dict[str, Any] = {}
"""vLLM's own registry entries of the architectures that were replaced."""


def register_models() -> None:
    """Register a derived class instead of vLLM's own, for each architecture that this vLLM has.

    A class that another plug-in registers later is replaced as soon as it is, because vLLM loads plug-ins in any order.
    """
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        _replace(architecture)

    def wrapper(register: Any) -> Any:
        def register_model(self: Any, model_arch: str, model_cls: Any) -> None:
            register(self, model_arch, model_cls)
            if model_arch in ARCHITECTURES:
                _replace(model_arch)

        return register_model

    wrap_once(type(ModelRegistry), "register_model", wrapper)


def _replace(architecture: str) -> None:
    from vllm import ModelRegistry

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
    return entry.class_name.rsplit("__", 2)[0] if _is_derived(entry) else None


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
