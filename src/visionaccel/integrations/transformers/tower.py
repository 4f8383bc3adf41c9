"""The module in the place of a model's vision tower, and how the tower of a model in memory is read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.arrays import as_host_tensor, is_tensor
from visionaccel.errors import (
    CheckpointError,
    ConfigurationError,
    GridError,
    UnsupportedArchitectureError,
    VisionAccelError,
)
from visionaccel.families import Family, Tower, family_for, family_of, supported_architectures, tower_of
from visionaccel.trust import GuardedEncoder

_IMAGES = "image"  # transformers' name of the modality; videos go through the same module
_WEIGHTS = "model.safetensors"


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):  # type: ignore[misc]
    """What the tower returns: `pooler_output` [N, width], and for each deepstack level another such tensor.

    `last_hidden_state`, the patches before they are merged, is None: no backend returns it.
    """

    deepstack_features: list[torch.Tensor] | None = None


class EncoderTower(nn.Module):
    """Encodes in the place of a model's vision tower. It has no parameters, so nothing of it can be trained.

    A copy of the model shares it. Its state dictionary is that of the tower it replaces, so that a saved model is
    complete; other weights cannot be loaded into it.

    Args:
        encoder: The chain of encoders, which belongs to the handle.
        config: The tower's configuration in transformers.
        weights: Returns the replaced tower's tensors by name.

    Attributes:
        encoder: The chain of encoders.
        config: The tower's configuration in transformers.
        spatial_merge_size: Patches merged into one token along each side.
        dtype: What the model casts pixels to: float32, also where the model has another dtype.
    """

    def __init__(
        self,
        encoder: GuardedEncoder,
        config: transformers.PretrainedConfig,
        weights: Callable[[], Mapping[str, torch.Tensor]],
    ) -> None:
        super().__init__()
        self.encoder, self.config, self._weights = encoder, config, weights
        self.spatial_merge_size = encoder.primary.tower.merge_size
        self.dtype = torch.float32

    @torch.compiler.disable  # type: ignore[untyped-decorator] # threads and locks cannot be traced
    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor | None, **_: Any) -> ImageFeatures:
        """Return the embeddings of images and videos in float32, on the device of their pixels.

        Args:
            hidden_states: [P, patch_width], the processor's pixel values of all items.
            grid_thw: [items, 3], the (t, h, w) of each item.

        Raises:
            ConfigurationError: If the encoder was closed.
            GridError: If there are no grids.
            VisionAccelError: Why an item could not be encoded. A note says which one if there are several.
        """
        if self.encoder.closed:
            raise ConfigurationError(
                "the vision encoder of this model is closed.", hint="Call accelerate on the model, or load it again."
            )
        if grid_thw is None:
            raise GridError(
                "the model was given pixels without their grids.",
                hint="Pass image_grid_thw, or video_grid_thw, of the same processor call.",
            )
        answers = self.encoder.encode_items(hidden_states.detach(), grid_thw.tolist())
        pieces = []
        for number, answer in enumerate(answers, 1):
            if isinstance(answer, VisionAccelError):
                if any(other is not answer for other in answers):  # otherwise it is about the call
                    answer.add_note(f"This is image or video {number} of {len(answers)} in this call.")
                raise answer
            rows = answer.rows if is_tensor(answer.rows) else as_host_tensor(answer.rows, "float32")
            pieces.append(rows.to(hidden_states.device, self.dtype))
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        embeddings, *levels = rows.split(self.encoder.primary.tower.spec.out, dim=1)
        return ImageFeatures(pooler_output=embeddings, deepstack_features=levels or None)

    def __deepcopy__(self, memo: Any) -> EncoderTower:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with an encoder in the place of its tower cannot be pickled; use save_pretrained")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: ARG002
        destination.update({prefix + name: tensor for name, tensor in self._weights().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        if not given:
            return
        known = self._weights()
        for name, tensor in given.items():
            if name not in known or not torch.equal(tensor.cpu(), known[name].cpu()):
                raise ConfigurationError(
                    f"{prefix + name!r} differs from the weights of the encoder, which cannot be given other ones.",
                    hint="Restore the model's own tower, load the weights, and call accelerate again.",
                )


def tower_place(model: nn.Module) -> tuple[transformers.PreTrainedModel, nn.Module]:
    """Return the module of a model that has a vision tower, and the tower: of a thinker, for example.

    Raises:
        UnsupportedArchitectureError: If transformers finds no tower in it.
    """
    for module in _parts(model) if isinstance(model, nn.Module) else ():
        found = module.get_encoder(_IMAGES)
        if isinstance(found, nn.Module) and found is not module:
            return module, found
    raise UnsupportedArchitectureError(
        f"transformers {transformers.__version__} finds no vision tower in a {type(model).__name__}.",
        hint="Pass a vision-language model that transformers has loaded, not its pipeline or processor.",
    )


def put_tower(place: transformers.PreTrainedModel, tower: nn.Module) -> None:
    """Put a module in the place of a tower.

    Raises:
        ConfigurationError: If transformers did not do so: its `set_encoder` may do nothing, without an error.
    """
    place.set_encoder(tower, _IMAGES)
    if place.get_encoder(_IMAGES) is not tower:
        raise ConfigurationError(
            f"transformers {transformers.__version__} did not replace the vision tower of a {type(place).__name__}.",
            hint="Use a release of transformers that `visionaccel[transformers]` allows.",
        )


def _parts(model: nn.Module) -> Iterator[transformers.PreTrainedModel]:
    return (each for each in model.modules() if isinstance(each, transformers.PreTrainedModel))


@contextmanager
def tower_in_memory(place: transformers.PreTrainedModel, own: transformers.PreTrainedModel) -> Iterator[Tower]:
    """Write a model's own tower as a checkpoint, which is removed at the end of the context.

    Raises:
        CheckpointError: If its weights are quantised, not all in memory, or have an adapter.
        UnsupportedArchitectureError: If no family describes it.
    """
    architecture, family = _family_of(place, own)
    config = family.with_configuration({"architectures": [architecture]}, own.config.to_dict())
    family.described(config, f"this {type(place).__name__}")  # errors of the file below would name the file
    tensors = own.state_dict()
    unread = (name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor) or tensor.is_meta)
    if name := next(unread, None):
        raise CheckpointError(
            f"the weights of the model's vision tower, such as {name!r}, are offloaded or quantised.",
            hint="Load the model without that, or with visionaccel.integrations.transformers.load.",
        )
    with tempfile.TemporaryDirectory(prefix="visionaccel-") as name:
        folder = Path(name)
        named = {family.prefixes[-1] + each: tensor.detach().cpu().contiguous() for each, tensor in tensors.items()}
        try:
            (folder / "config.json").write_text(json.dumps(config, default=str))
            save_file(named, folder / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(
                f"the weights of the model's vision tower cannot be written to {folder}: {error}",
                hint="Set TMPDIR to a folder with enough space.",
            ) from error
        yield tower_of(Checkpoint(folder))


def _family_of(place: transformers.PreTrainedModel, own: transformers.PreTrainedModel) -> tuple[str, Family]:
    """Return the architecture and the family of a model in memory.

    It is named in the configuration, or its class is, or it is part of a model that has a family: a thinker. A model
    that has none may contain one: a retriever.
    """
    known = supported_architectures()
    for part in _parts(place):
        if part.get_encoder(_IMAGES) is not own:
            continue
        named = (*(part.config.architectures or ()), type(part).__name__)
        found = next((name for name in named if name in known), None) or _whole_model(part, known)
        if found is not None:
            return found, family_for(found)
    return type(place).__name__, family_for(type(place).__name__)


def _whole_model(place: transformers.PreTrainedModel, known: Iterable[str]) -> str | None:
    """Return the architecture whose configuration has that of `place` above the tower's; None if it has none."""
    for architecture in sorted(known):
        kind = getattr(getattr(transformers, architecture, None), "config_class", None)
        for key in ("", *family_for(architecture).config[:-1]):
            kind = kind.sub_configs.get(key) if key and kind is not None else kind
            if kind is type(place.config):
                return architecture
    return None


def stored_weights(tower: Tower) -> Mapping[str, torch.Tensor]:
    """Read the tensors of a checkpoint's tower by transformers' names.

    Raises:
        CheckpointError: If the checkpoint has none, or they cannot be read.
    """
    stored = tower.checkpoint.with_prefix(family_of(tower.checkpoint).prefixes)
    if not stored:
        raise CheckpointError(
            f"{tower.checkpoint.folder} has no vision weights: the model has no tower, and cannot be saved with one.",
            hint="Use a checkpoint that was not stripped of them.",
        )
    return {name: as_host_tensor(tensor.read(), tensor.dtype) for name, tensor in stored.items()}
