"""Towers that are not this package's, built alone with a checkpoint's weights. Runs in a contender's own process only.

A peer is measured as its own users run it: its own layers, its own preparation of weights, its own defaults. It gets
patches in its dtype, as its own models give them, and its answer is taken as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import as_host_tensor, as_numpy
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.grid import Grid
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import ConfigurationError
from visionaccel.families import Tower

_PLACE = "visual"
"""Where the models of transformers that take patches and grids have their tower, and their checkpoints its weights."""

_VLLM_FAMILY = "qwen2_5_vl"


@dataclass(frozen=True, slots=True)
class Opened:
    """A tower that is ready.

    Attributes:
        device: What it runs on.
        precision: Dtype of its products.
        about: Releases and settings that decide how fast it is.
        prepare: Patches float32 [P, patch_width] as `run` takes them. Not timed.
        run: Embeddings of prepared patches of one grid, in any dtype and library. Timed.
        close: Releases what it holds.
        simulated: Whether the device is simulated.
    """

    device: str
    precision: str
    about: str
    prepare: Callable[[NDArray[np.float32]], Any]
    run: Callable[[Any, Grid], Any]
    close: Callable[[], object] = lambda: None
    simulated: bool = False

    def read(self, output: Any) -> NDArray[np.float32]:
        """What `run` returned as float32 [N, out_width]. Not timed."""
        return np.ascontiguousarray(as_numpy(output), dtype=np.float32)


def open_peer(name: str, tower: Tower, options: Mapping[str, Any], threads: int) -> Opened:
    """Build a peer's tower and load its weights.

    Args:
        name: `transformers` or `vllm`.
        tower: The tower, whose checkpoint has the weights.
        options: `dtype`, and the peer's own.
        threads: Threads of its products.

    Raises:
        ConfigurationError: If it cannot run this tower.
        Exception: Whatever the peer's own code raises.
    """
    import torch

    torch.set_num_threads(threads)
    openers = {"transformers": _transformers, "vllm": _vllm}
    return openers[name](tower, options)


def _transformers(tower: Tower, options: Mapping[str, Any]) -> Opened:
    """The tower of the model class that the checkpoint names."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.for_model(**tower.checkpoint.config)
    with torch.device("meta"):  # the whole model, to learn the class of its tower; nothing is allocated
        model = transformers.AutoModelForImageTextToText.from_config(config)
    kind: Any = type(next((each for name, each in model.named_modules() if name.split(".")[-1] == _PLACE), None))
    if not issubclass(kind, transformers.PreTrainedModel):
        raise ConfigurationError(
            f"the peer transformers takes models with a tower named {_PLACE!r}, and {type(model).__name__} has none.",
            hint="Leave the peer out.",
        )
    attention = options.get("attention", "sdpa")
    dtype = getattr(torch, options["dtype"])
    with no_init_weights():
        module = kind._from_config(config.vision_config, attn_implementation=attention)
    stored, weights = _stored(tower), {}
    for name in module.state_dict():
        if name not in stored:
            raise ConfigurationError(
                f"the checkpoint does not hold {name} of {kind.__name__}.", hint="Leave the peer out."
            )
        weights[name] = as_host_tensor(stored[name].read(), stored[name].dtype).to(dtype)
    module.load_state_dict(weights, assign=True)
    module.eval()

    def run(patches: Any, grid: Grid) -> Any:
        with torch.inference_mode():
            found = module(patches, torch.tensor([grid.thw]))
            levels = getattr(found, "deepstack_features", None) or ()
            return torch.cat([found.pooler_output, *levels], dim=1) if levels else found.pooler_output

    releases = f"transformers {transformers.__version__}, torch {torch.__version__}"
    about = f"{releases}, {attention}{_emulated(options['dtype'])}"
    return Opened("cpu", options["dtype"], about, lambda patches: torch.from_numpy(patches).to(dtype), run)


def _vllm(tower: Tower, options: Mapping[str, Any]) -> Opened:
    """The tower of vLLM's Qwen2.5-VL as its worker builds it, once in a process: its process groups are global."""
    if tower.family != _VLLM_FAMILY:
        raise ConfigurationError(
            f"the peer vllm takes towers of family {_VLLM_FAMILY}, and this one is of {tower.family}.",
            hint="Leave the peer out.",
        )
    import torch
    import vllm
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer
    from vllm.utils.torch_utils import set_default_torch_dtype

    name, eager = options["dtype"], options.get("enforce_eager", False)
    dtype, folder = getattr(torch, name), str(tower.checkpoint.folder)
    settings = EngineArgs(
        model=folder, dtype=name, skip_tokenizer_init=True, enforce_eager=eager
    ).create_engine_config()
    priority = getattr(getattr(settings, "kernel_config", None), "ir_op_priority", None)
    if priority is not None:  # as its workers do at start, since 0.31
        priority.set_default()
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(set_current_vllm_config(settings))
        # Its layers ask for the process groups even where there is one process.
        parallel_state.init_distributed_environment(1, 0, f"file://{Path(store, 'store')}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        config = Qwen2_5_VLVisionConfig.from_dict(dict(tower.configuration))
        epsilon = getattr(settings.model_config.hf_config, "rms_norm_eps", 1e-6)
        with set_default_torch_dtype(dtype):
            module = Qwen2_5_VisionTransformer(config, norm_eps=epsilon, prefix=_PLACE)
        module.load_weights(
            (key, as_host_tensor(stored.read(), stored.dtype).to(dtype)) for key, stored in tower.weights.items()
        )
        process_weights_after_loading(module, settings.model_config, torch.device("cpu"))  # packs for its products
        module.eval()
        close = stack.pop_all().close

    def run(patches: Any, grid: Grid) -> Any:
        with torch.inference_mode():
            return module(patches, grid_thw=[list(grid.thw)])

    attention = getattr(module.attn_backend, "name", str(module.attn_backend))
    about = f"vLLM {vllm.__version__}, {attention}{', eager' if eager else ''}{_emulated(name)}"
    return Opened("cpu", name, about, lambda patches: torch.from_numpy(patches).to(dtype), run, close)


def _emulated(dtype: str) -> str:
    """What to add where this CPU has no instructions for a dtype."""
    return ", bfloat16 emulated" if dtype == "bfloat16" and not has_bfloat16() else ""


def _stored(tower: Tower) -> dict[str, StoredTensor]:
    """The tower's tensors, by their names below its place in the checkpoint and by those of its description."""
    tensors = tower.checkpoint.tensors
    return {**tower.weights, **{name.rpartition(f"{_PLACE}.")[2]: tensors[name] for name in tower.stored_names}}
