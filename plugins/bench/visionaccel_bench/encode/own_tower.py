"""vLLM's own vision tower, built alone with a checkpoint's weights, as its worker would build it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OwnTower", "own_tower"]


@dataclass(frozen=True, slots=True)
class OwnTower:
    """A tower on the CPU, in evaluation mode.

    Attributes:
        module: Takes patches [P, patch_width] in the tower's dtype and `grid_thw` as nested lists, and gives
            [N, out_width] in that dtype.
        attention: Name of its attention backend.
        close: Gives back what it holds; the module is of no use then.
    """

    module: Any
    attention: str
    close: Callable[[], None]


def own_tower(
    folder: Path, vision_config: Mapping[str, Any], weights: Iterable[tuple[str, Any]], *, dtype: str, eager: bool
) -> OwnTower:
    """Build it. Once in a process: it initialises vLLM's process groups.

    Args:
        folder: The checkpoint, whose configuration decides which implementation of each layer vLLM takes.
        vision_config: The tower's sizes.
        weights: The tower's tensors in that dtype, with their names below the checkpoint's prefix.
        dtype: `float32` or `bfloat16`.
        eager: Without vLLM's compilation.

    Raises:
        Exception: Whatever vLLM raises.
    """
    import torch
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(model=str(folder), dtype=dtype, skip_tokenizer_init=True, enforce_eager=eager)
    settings = arguments.create_engine_config()
    priority = getattr(getattr(settings, "kernel_config", None), "ir_op_priority", None)
    if priority is not None:  # as its workers do at start, since 0.31
        priority.set_default()
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(set_current_vllm_config(settings))
        # Its layers ask for the process groups even where there is one process.
        parallel_state.init_distributed_environment(1, 0, f"file://{Path(store, 'store')}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        config = Qwen2_5_VLVisionConfig.from_dict(dict(vision_config))
        epsilon = getattr(settings.model_config.hf_config, "rms_norm_eps", 1e-6)
        with set_default_torch_dtype(getattr(torch, dtype)):
            module = Qwen2_5_VisionTransformer(config, norm_eps=epsilon, prefix="visual")
        module.load_weights(weights)
        process_weights_after_loading(module, settings.model_config, torch.device("cpu"))  # packs for its products
        attention = getattr(module.attn_backend, "name", str(module.attn_backend))
        return OwnTower(module.eval(), attention, stack.pop_all().close)
