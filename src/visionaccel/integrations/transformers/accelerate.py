"""Puts an encoder in the place of a model's vision tower, in a model in memory or while it is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, Self

import torch
import transformers
from torch import nn

from visionaccel.bundle import Bundle
from visionaccel.checkpoint import Checkpoint, locate_checkpoint
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import hold_source, open_matching
from visionaccel.errors import CheckpointError, ConfigurationError, UnsupportedArchitectureError
from visionaccel.families import Tower, family_of, tower_of
from visionaccel.images import FitPolicy, Fitter, ImageProcessor, fitter_for
from visionaccel.integrations.transformers.tower import (
    EncoderTower,
    put_tower,
    stored_weights,
    tower_in_memory,
    tower_place,
)
from visionaccel.observe import EncoderMetrics
from visionaccel.service import open_guarded
from visionaccel.settings import Settings, load_settings
from visionaccel.trust import GuardedEncoder

logger = safe_logger(__name__)

_REFUSED = ("gguf_file", "output_loading_info", "state_dict", "subfolder")
"""Arguments of `from_pretrained` that load other files than the encoder's, or return more than the model."""


class Accelerated:
    """A model whose vision tower is an encoder. As a context manager, it restores the tower at the end.

    Attributes:
        model: The model, for transformers' `generate`, pipelines and everything else.
        encoder: The chain of encoders, with what it has counted.
    """

    def __init__(
        self, model: Any, tower: EncoderTower, own: nn.Module | None, fit: FitPolicy | Literal["none"]
    ) -> None:
        self.model, self.encoder = model, tower.encoder
        self._tower, self._own, self._fit = tower, own, fit

    def fitter(self, processor: Any) -> Fitter | None:
        """Make what fits images to the grids of the encoder's programs, before the model's processor gets them.

        Args:
            processor: transformers' processor of the model.

        Returns:
            None if the setting `VISIONACCEL_FIT` is `none`. Images are not changed if a program takes every grid.

        Raises:
            ConfigurationError: If the processor would resize images that were fitted, or has no image processor.
        """
        if not hasattr(processor, "image_processor"):
            raise ConfigurationError(
                f"a {type(processor).__name__} has no image processor.", hint="Pass the model's whole AutoProcessor."
            )
        primary = self.encoder.primary
        return fitter_for(primary.tower, primary.coverages, self._fit, ImageProcessor(processor.image_processor))

    @contextmanager
    def own_tower(self) -> Iterator[nn.Module]:
        """Have the model's own tower in its place during the context, without closing the encoder.

        It stays there if the encoder is closed within the context; so does another one that took its place. Moving or
        casting the model does not reach the tower while the encoder is in its place.

        Raises:
            ConfigurationError: If the model was loaded without it.
        """
        if self._own is None:
            raise ConfigurationError(
                "the model was loaded without its vision tower.", hint="Load it with `keep_tower=True`."
            )
        place, now = tower_place(self.model)
        put_tower(place, self._own)
        try:
            yield self._own
        finally:
            if tower_place(self.model)[1] is self._own and not self.encoder.closed:
                put_tower(place, now)

    def restore(self) -> None:
        """Close the encoder, and put the model's own tower back, on the device and with the dtype that it had.

        A model that was loaded without its tower has none: after this it raises a ConfigurationError for images.
        """
        place, now = tower_place(self.model)
        if now is self._tower and self._own is not None:
            put_tower(place, self._own)
        self.encoder.close()

    def __enter__(self) -> Self:
        if self.encoder.closed:
            raise ConfigurationError(
                "the vision encoder of this model is closed.", hint="Call accelerate on the model, or load it again."
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def accelerate(
    model: Any,
    *,
    backend: str | None = None,
    device: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    fallback: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Accelerated:
    """Put an encoder in the place of the vision tower of a model that transformers has loaded.

    The encoder computes with the weights that the tower has now, so changes that were made since the model was loaded
    count too. The tower itself is kept for `Accelerated.restore`; `load` never allocates it.

    Args:
        model: A `PreTrainedModel` with a vision tower.
        backend: Name of an installed backend, or `auto`. The default of this and of the other arguments is the
            variable of the same name, such as `VISIONACCEL_BACKEND`; without one, it is `auto`.
        device: The backend's device.
        bundle: Folder of a bundle or checkpoint with the same vision weights; the model must have their dtype.
        fallback: One or more backends, separated by commas, that encode what this one fails on.
        settings: Other settings by the name of their variable in small letters, without `VISIONACCEL_`.

    Returns:
        The handle. The encoder is open until its `restore`, or until the process ends.

    Raises:
        ConfigurationError: If the model has an encoder already, the bundle belongs to another model, a setting is
            invalid, or the backend cannot run here.
        ArtifactError: If the bundle is broken, or the tower cannot be read: it is quantised, offloaded or unknown.
        DeviceError: If the device fails to open, or encodes the bundle's golden images incorrectly.
    """
    wanted = _settings(backend, device, bundle, fallback, settings)
    place, own = tower_place(model)
    if isinstance(own, EncoderTower):
        raise ConfigurationError("the model has an encoder already.", hint="Call `restore` of its handle first.")
    with tower_in_memory(place, own) as tower:
        source: Tower | Bundle = tower
        if wanted.bundle is not None:
            source = open_matching(wanted.bundle, tower, tower.checkpoint, model=f"this {type(model).__name__}")
        temporary = tower.checkpoint.folder.resolve()
        if any(weight.file.is_relative_to(temporary) for weight in source.tower.weights.values()):
            source = hold_source(source)
    with _opened(source, wanted) as encoder:
        return _put(model, encoder, own, own.state_dict, wanted)


def load(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    device: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    fallback: str | None = None,
    settings: Mapping[str, Any] | None = None,
    model_class: type[transformers.PreTrainedModel] | None = None,
    revision: str | None = None,
    keep_tower: bool = False,
    **arguments: Any,
) -> Accelerated:
    """Load a model without its vision tower, with an encoder in its place.

    Args:
        path: Folder or Hugging Face repository of the checkpoint.
        backend: As for `accelerate`, like `device`, `bundle`, `fallback` and `settings`.
        device: See `backend`.
        bundle: See `backend`. The checkpoint may then be one that was stripped of its vision weights.
        fallback: See `backend`.
        settings: See `backend`.
        model_class: transformers' class of the model; the default is the one that the checkpoint names.
        revision: Revision of the repository.
        keep_tower: Whether to load the tower too, for `Accelerated.own_tower` and `Accelerated.restore`.
        arguments: Arguments of the class's `from_pretrained`, such as `dtype` and `device_map`; not those that load
            other files than the encoder's, or return more than the model.

    Returns:
        The handle, whose `model` is in evaluation mode.

    Raises:
        ConfigurationError: As for `accelerate`, or an argument is refused or changes the configuration of the tower.
        ArtifactError: If the checkpoint or the bundle is broken.
        UnsupportedArchitectureError: If transformers has no such model, or no family describes its tower.
        DeviceError: As for `accelerate`.
    """
    if refused := next((name for name in _REFUSED if arguments.get(name)), None):
        raise ConfigurationError(
            f"load does not accept from_pretrained's argument {refused!r}.",
            hint="Pass the folder of the model, or load the model with from_pretrained and call accelerate.",
        )
    wanted = _settings(backend, device, bundle, fallback, settings)
    stored = locate_checkpoint(path, revision)
    tower = tower_of(stored)
    source = tower if wanted.bundle is None else open_matching(wanted.bundle, tower, stored)
    kind = model_class or _class_of(stored)
    with _opened(source, wanted) as encoder:
        model = (kind if keep_tower else _without_tower(kind)).from_pretrained(stored.folder, **arguments)
        model.__class__ = kind
        _require_configuration(tower_place(model)[1].config, tower)
        own = _loaded_tower(model, tower) if keep_tower else None
        return _put(model, encoder, own, partial(stored_weights, tower), wanted)


def _settings(
    backend: str | None,
    device: str | None,
    bundle: str | os.PathLike[str] | None,
    fallback: str | None,
    others: Mapping[str, Any] | None,
) -> Settings:
    chosen = {"backend": backend, "device": device, "bundle": bundle, "fallback": fallback}
    return load_settings(**{**(others or {}), **{name: value for name, value in chosen.items() if value is not None}})


@contextmanager
def _opened(source: Tower | Bundle, settings: Settings) -> Iterator[GuardedEncoder]:
    """Open the chain of encoders, and close it if the context ends with an error."""
    if len(settings.devices) > 1:
        logger.warning("In transformers, only device %s is used.", settings.devices[0])
    metrics = EncoderMetrics.install() if settings.metrics else None  # before the canary, which counts too
    (encoder,) = open_guarded(source, settings, settings.wanted_devices[:1])
    if metrics is not None:
        metrics.watch_encoder(encoder)
    logger.info("visionaccel: %s", encoder.described("in transformers"))
    try:
        yield encoder
    except BaseException:
        encoder.close()
        raise


def _put(
    model: Any,
    encoder: GuardedEncoder,
    own: nn.Module | None,
    weights: Callable[[], Mapping[str, torch.Tensor]],
    settings: Settings,
) -> Accelerated:
    place, now = tower_place(model)
    tower = EncoderTower(encoder, now.config, weights)
    put_tower(place, tower)
    return Accelerated(model, tower, own, settings.fit)


def _class_of(stored: Checkpoint) -> type[transformers.PreTrainedModel]:
    """Return transformers' class for a checkpoint: the one that it names, or else the one for its `model_type`."""
    for name in stored.architectures:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    kind: type[transformers.PreTrainedModel] | None = None
    with suppress(KeyError):  # not AutoConfig, which may run the checkpoint's own code
        config = transformers.CONFIG_MAPPING[str(stored.config.get("model_type"))]
        kind = transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING.get(config, None)
    if kind is None:
        raise UnsupportedArchitectureError(
            f"transformers {transformers.__version__} has no class for {', '.join(stored.architectures)}.",
            hint="Pass the model's class as `model_class`.",
        )
    return kind


def _require_configuration(vision: transformers.PretrainedConfig, tower: Tower) -> None:
    """Refuse a model whose tower would compute something else than the checkpoint's: its configuration was changed."""
    family, stored = family_of(tower.checkpoint), tower.checkpoint
    config = family.with_configuration(stored.config, vision.to_dict())
    if (found := family.described(config, "the configuration of the model")) != tower.spec:
        raise ConfigurationError(
            f"the configuration of the model changes the vision tower of {stored.folder}: "
            f"{tower.spec.differing(found)}.",
            hint="Leave the vision configuration out of the arguments of load.",
        )


def _loaded_tower(model: nn.Module, tower: Tower) -> nn.Module:
    """Return the tower of a model; transformers makes random weights of those that it does not find."""
    own = tower_place(model)[1]
    loaded = own.state_dict()
    for name, stored in stored_weights(tower).items():
        if name not in loaded or not loaded[name].cpu().equal(stored.to(loaded[name].dtype)):
            raise CheckpointError(
                f"transformers did not load the vision weight {name!r} as {tower.checkpoint.folder} has it.",
                hint="Use the checkpoint in the form in which it was released.",
            )
    return own


def _name_of(module: nn.Module, model: nn.Module) -> str:
    return str(next(name for name, found in model.named_modules() if found is module))


def _without_tower(kind: type[transformers.PreTrainedModel]) -> type[transformers.PreTrainedModel]:
    """Derive a class whose models drop their tower before any memory is allocated for it.

    `from_pretrained` makes a model on the meta device first, and then loads the weights of the modules that it has.
    """

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        kind.__init__(self, *arguments, **named)
        place, own = tower_place(self)
        name = _name_of(own, self)
        placeholder = nn.Module()
        placeholder.config = own.config
        put_tower(place, placeholder)
        self._keys_to_ignore_on_load_unexpected |= {rf"(^|\.){re.escape(name)}\."}

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
