"""transformers' vision tower, loaded alone from a checkpoint: the reference for every other form of the tower.

It is built from the checkpoint's configuration and the names of its stored weights. It shares no arithmetic, table or
description with this package or the core, so that it cannot have the same faults.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
import transformers

from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel.errors import UnsupportedArchitectureError
from visionaccel_torch_ref.weights import WeightReader


class TransformersTower:
    """The tower in evaluation mode on a device.

    Args:
        program: The configuration and the stored weights; the language model's are not read.
        dtype: For weights and arithmetic; rotary frequencies stay float32.
        attention: transformers' attention implementation, `sdpa` or `eager`.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: If the weights do not fit the configuration.
        UnsupportedArchitectureError: If transformers has no such tower, or uses other names for its weights than the
            stored ones.
    """

    def __init__(self, program: Program, *, dtype: torch.dtype, attention: str, device: str) -> None:
        kind, config = _tower_class(program)
        # Built on the meta device, so that nothing is allocated twice; the weights are then assigned, not copied.
        with torch.device("meta"):
            tower = kind._from_config(config, attn_implementation=attention)
        reader = WeightReader(program, dtype, device)
        shapes = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
        weights = _own_names(program, shapes, reader)
        _require_own_names(weights, shapes)
        try:
            tower.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise reader.unfit(str(error)) from error
        for name, module in list(tower.named_modules()):
            if any(
                buffer.is_meta for buffer in module.buffers(recurse=False)
            ):  # rotary frequencies, which are computed
                tower.set_submodule(name, type(module)(config))
        self._tower: torch.nn.Module = tower.to(device).eval().requires_grad_(False)

    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Return the embeddings [N, out_width] in the order of the grids, deepstack levels next to each.

        Args:
            patches: [P, patch_width], of the tower's dtype and on its device.
            grids: The grids of the call.
        """
        # One row for each frame: some towers accept videos only in this form, and frames are independent in all.
        triples = torch.tensor([grid.frame.thw for grid in grids for _ in range(grid.t)]).to(patches.device)
        found = self._tower(patches, grid_thw=triples, return_dict=True)
        return torch.cat([found.pooler_output, *(getattr(found, "deepstack_features", None) or ())], dim=1)


def _tower_class(program: Program) -> tuple[Any, Any]:
    """Return transformers' class of the tower, and the checkpoint's configuration for it.

    Some released checkpoints name an architecture that transformers does not have, but a `model_type` that it has.
    """
    document = program.configuration or {}
    named = [str(name) for name in document.get("architectures") or ()]
    configs = [getattr(getattr(transformers, name, None), "config_class", None) for name in named]
    for whole in (*configs, _known_config(document)):
        config, stated = _innermost(whole, document)
        if config is None:
            continue
        models = import_module(config.__module__.replace(".configuration_", ".modeling_"))
        for kind in vars(models).values():
            if isinstance(kind, type) and getattr(kind, "config_class", None) == config:
                return kind, config.from_dict(dict(stated))
    raise _unsupported(f"has no vision tower for {', '.join(named) or 'no architecture'}")


def _known_config(document: Mapping[str, Any]) -> Any:
    """Return transformers' class of a configuration by its `model_type`; None if it has none."""
    kind, known = str(document.get("model_type")), transformers.CONFIG_MAPPING
    return known[kind] if kind in known else None  # noqa: SIM401 - its `get` does not load classes


def _unsupported(what: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"transformers {transformers.__version__} {what}.", hint="Use implementation fast."
    )


def _innermost(config: Any, stated: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Return the class of the tower's configuration, None if transformers has none, and the document's values for it.

    The document has only this part: a single key at each level leads to the tower's configuration.
    """
    below = [key for key in stated if key not in ("architectures", "model_type")]
    if config is None or len(below) != 1 or not isinstance(stated[below[0]], Mapping):
        return config, stated
    part, within = config.sub_configs.get(below[0]), stated[below[0]]
    return _innermost(_known_config(within) if part is transformers.AutoConfig else part, within)


def _own_names(
    program: Program, shapes: Mapping[str, tuple[int, ...]], reader: WeightReader
) -> dict[str, torch.Tensor]:
    """Return the weights by transformers' names; query, key and value are joined if they are stored separately."""
    found: dict[str, torch.Tensor] = {}
    for name, stored in program.weights.items():
        ends = [own for own, shape in shapes.items() if shape == stored.shape and f".{stored.name}".endswith(f".{own}")]
        own = max(ends, key=len, default=name)
        if own in found:
            raise _unsupported(f"has one weight {own!r}, but the checkpoint has two whose names end with it")
        found[own] = reader.read(name)
    for joint in [own for own in shapes if ".qkv." in own and own not in found]:
        parts = [joint.replace(".qkv.", f".{part}.") for part in "qkv"]
        if found.keys() >= set(parts):
            found[joint] = torch.cat([found.pop(part) for part in parts])
    return found


def _require_own_names(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are stored under other names than transformers': the unknown ones have the missing sizes."""
    others = [name for name in weights if name not in shapes]
    lacking = [name for name in shapes if name not in weights]
    if lacking and sum(weights[name].numel() for name in others) == sum(math.prod(shapes[name]) for name in lacking):
        raise _unsupported(
            f"uses other names for the weights of the tower: {lacking[0]!r} is stored under a different name"
        )
