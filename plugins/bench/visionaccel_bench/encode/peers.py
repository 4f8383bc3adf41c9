"""Towers that are not this package's, built alone with a checkpoint's weights. Runs in a contender's own process only.

A peer is measured as its own users run it: its own layers, its own preparation of weights, its own defaults. Patches
are given to it in its dtype, as its own models give them, and its answer is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import as_host_tensor, as_numpy
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.grid import Grid
from visionaccel.errors import ConfigurationError
from visionaccel.families import Tower

__all__ = ["Opened", "open_peer"]

_FAMILY = "qwen2_5_vl"
"""The towers that the peers are written for."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A tower that is ready.

    Attributes:
        device: What it runs on.
        precision: Dtype of its products.
        about: Releases and settings that decide how fast it is.
        prepare: Patches float32 [P, patch_width] as `run` takes them. Not timed.
        run: Embeddings of prepared patches of one grid, in whatever dtype and library. Timed.
        close: Gives back what it holds.
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
    if tower.family != _FAMILY:
        raise ConfigurationError(f"no peer runs towers of family {tower.family!r}.", hint="Leave the peers out.")
    openers = {"transformers": _transformers, "vllm": _vllm}
    return openers[name](tower, options)


def _transformers(tower: Tower, options: Mapping[str, Any]) -> Opened:
    import torch
    import transformers
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    dtype = getattr(torch, options["dtype"])
    config = Qwen2_5_VLVisionConfig.from_dict(dict(tower.configuration))
    config._attn_implementation = options.get("attention", "sdpa")
    with torch.device("meta"):
        module = Qwen2_5_VisionTransformerPretrainedModel(config)
    module.rotary_pos_emb = type(module.rotary_pos_emb)(config)  # what no checkpoint holds
    module.load_state_dict({name: weight.to(dtype) for name, weight in _weights(tower)}, assign=True)
    module.eval()

    def run(patches: Any, grid: Grid) -> Any:
        with torch.inference_mode():
            return module(patches, torch.tensor([grid.thw])).pooler_output

    releases = f"transformers {transformers.__version__}, torch {torch.__version__}"
    about = f"{releases}, {config._attn_implementation}{_emulated(options['dtype'])}"
    return Opened("cpu", options["dtype"], about, lambda patches: torch.from_numpy(patches).to(dtype), run)


def _vllm(tower: Tower, options: Mapping[str, Any]) -> Opened:
    import torch
    import vllm

    from visionaccel_bench.encode.own_tower import own_tower

    name, eager = options["dtype"], options.get("enforce_eager") == "true"
    dtype = getattr(torch, name)
    weights = ((key, weight.to(dtype)) for key, weight in _weights(tower))
    own = own_tower(tower.checkpoint.folder, tower.configuration, weights, dtype=name, eager=eager)

    def run(patches: Any, grid: Grid) -> Any:
        with torch.inference_mode():
            return own.module(patches, grid_thw=[list(grid.thw)])

    about = f"vLLM {vllm.__version__}, {own.attention}{', eager' if eager else ''}{_emulated(name)}"
    return Opened("cpu", name, about, lambda patches: torch.from_numpy(patches).to(dtype), run, own.close)


def _emulated(dtype: str) -> str:
    """What to add where this CPU has no instructions for a dtype."""
    return ", bfloat16 emulated" if dtype == "bfloat16" and not has_bfloat16() else ""


def _weights(tower: Tower) -> Iterator[tuple[str, Any]]:
    """The tower's tensors by their names below the prefix."""
    for name, stored in tower.weights.items():
        yield name, as_host_tensor(stored.read(), stored.dtype)
