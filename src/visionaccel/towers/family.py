"""A family of towers: how checkpoints state the sizes of a tower, and in which forms they store its weights.

Weights must be plain floats of the shapes in the description. Each tensor is judged by its dtype and by what is stored
next to it, not by what the configuration says of quantisation: most quantised checkpoints keep the vision tower as it
was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.containment import contained
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import APART, JOINT, TowerSpec
from visionaccel.errors import CheckpointError, PluginError, VisionAccelError


class _MissingValueError(KeyError):
    """A configuration does not state a value."""


class VisionConfiguration:
    """The part of a `config.json` that describes a tower, with the defaults for what it leaves out.

    Its methods raise KeyError where a value is missing and ValueError where it is of another kind. A family does not
    catch these: they are reported as the checkpoint's fault, with the value's name.

    Attributes:
        where: How errors name it.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self._values, self.where = {**defaults, **values}, where

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise _MissingValueError(name)
        return self._values[name]

    def whole(self, name: str) -> int:
        """A whole number."""
        return _whole(name, self[name])

    def wholes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self[name]
        if not isinstance(values, list | tuple):
            raise ValueError(f"{name} is {values!r}, which is not a list")
        return tuple(_whole(name, value) for value in values)

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies, from either of the two places that transformers writes it to."""
        try:
            nested = dict(self._values.get("rope_parameters") or {})
            return float(nested.get("rope_theta", self._values.get("rope_theta", 10000.0)))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"rope_theta cannot be read: {error}") from error


@dataclass(frozen=True)
class Family:
    """A kind of tower.

    It is installed as entry points of the group `visionaccel.families`: one for each architecture that a `config.json`
    may name, of that name, for the same object.

    Attributes:
        name: What bundles and messages call it.
        spec: Describes a tower from its configuration. A `ValueError`, and what the configuration's methods raise, is
            reported as the checkpoint's fault, anything else as the family's.
        config: Where the configuration lies in `config.json`.
        defaults: What configurations may leave out.
        prefixes: What the names of the tower's tensors start with, in the order in which they are tried. Packed weights
            have the last.
        names: Modules that some checkpoints store under another name: that name to the spec's. `{n}` is a number.
        fused: Modules stored as one whose rows are those of several: their name to the spec's, in the order of rows.
    """

    name: str
    spec: Callable[[VisionConfiguration], TowerSpec]
    config: tuple[str, ...] = ("vision_config",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("model.visual.", "visual.")
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields that are looked up in a checkpoint."""
        for what, texts in (("config", self.config), ("prefixes", self.prefixes)):
            fits = isinstance(texts, tuple) and all(isinstance(each, str) and each for each in texts)
            if not fits or not texts:
                raise TypeError(
                    f"{what} of family {self.name!r} must be a tuple of texts that are not empty; it is {texts!r}"
                )

    def configuration(self, config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The vision configuration within a `config.json`.

        Raises:
            CheckpointError: If it is not there.
        """
        found: Any = config
        for key in self.config:
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{where} is missing.", hint="Pass a vision-language checkpoint.")
        return found

    def described(self, config: Mapping[str, Any], path: str) -> TowerSpec:
        """The description of the tower of a `config.json`, which errors call `path`.

        Raises:
            CheckpointError: If it is incomplete or impossible.
            PluginError: If `spec` fails in another way.
            UnsupportedArchitectureError: If it asks for something that is not implemented.
        """
        where = f"{path}: {'.'.join(self.config)}"
        found = self.configuration(config, where)
        try:
            with contained():
                spec = self.spec(VisionConfiguration(found, self.defaults, where))
        except VisionAccelError:
            raise
        except _MissingValueError as error:
            raise CheckpointError(
                f"{where} does not state {error}.", hint="Pass a complete checkpoint of this family."
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}.", hint="The configuration is damaged or foreign.") from error
        except Exception as error:
            raise self._fault(f"failed to describe the tower: {type(error).__name__}: {error}") from error
        if not isinstance(spec, TowerSpec):
            raise self._fault(f"described the tower as a {type(spec).__name__}, which is not a TowerSpec")
        return spec

    def _fault(self, what: str) -> PluginError:
        return PluginError(f"family {self.name!r} {what}.", hint="Report this to the authors of the family.")

    def with_configuration(self, config: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
        """A `config.json` with another vision configuration."""

        def put(within: Any, keys: tuple[str, ...]) -> dict[str, Any]:
            below = put(within.get(keys[0], {}), keys[1:]) if len(keys) > 1 else dict(vision)
            return {**within, keys[0]: below}

        return put(config, self.config)

    def weights(self, checkpoint: Checkpoint, spec: TowerSpec) -> dict[str, StoredTensor]:
        """A tower's tensors by the spec's names, each of the shape that the spec demands.

        Raises:
            CheckpointError: If there are none, one is stored in two forms, or as `plain_weights`.
            PluginError: If the family's `names` or `fused` cannot be used.
        """
        stored = checkpoint.with_prefix(self.prefixes)
        if not stored:
            raise CheckpointError(
                f"{checkpoint.folder} holds no vision weights (no tensor starts with "
                f"{' or '.join(map(repr, self.prefixes))}).",
                hint="The checkpoint was stripped; set VISIONACCEL_BUNDLE to a folder that has the vision weights.",
            )
        found: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            try:
                forms = list(self._forms(name, tensor))
            except Exception as error:
                raise self._fault(f"failed to name {name!r}: {type(error).__name__}: {error}") from error
            for own, part in forms:
                joint = re.sub(r"attn\.[qkv]\.", f"{JOINT}.", own)
                if own in found or (joint != own and joint in stored):
                    raise CheckpointError(
                        f"{tensor.file}: {tensor.name!r} is stored in another form too, as part of {joint!r}.",
                        hint="Make a checkpoint in which each weight is stored once.",
                    )
                found[own] = part
        return plain_weights(found, spec)

    def _forms(self, name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
        """A stored tensor by the spec's names: as it is, under another name, or cut into the rows of several."""
        module, _, leaf = name.rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        template = module if number is None else f"{module[: number.start()]}{{n}}{module[number.end() :]}"

        def named(own: str) -> str:
            return f"{own.replace('{n}', number[0]) if number else own}.{leaf}"

        parts = self.fused.get(template, ())
        if parts and tensor.shape and tensor.shape[0] % len(parts) == 0:
            length, shape = tensor.length // len(parts), (tensor.shape[0] // len(parts), *tensor.shape[1:])
            for place, part in enumerate(parts):
                yield named(part), replace(tensor, offset=tensor.offset + place * length, length=length, shape=shape)
        else:
            yield named(self.names.get(module) or self.names.get(template, template)), tensor


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} holds {value!r}, which is not a whole number")
    return value


_BUFFER = re.compile(r"(^|\.)rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that older releases of transformers saved with the weights; they are computed from the configuration."""

_COMPANION = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|scales?|biases|scale_inv|scale_2|zero_point|absmax|quant_map|SCB|weight_format"
    r"|weight_packed|weight_shape|weight_scale\w*|input_scale|(weight|input)_global_scale)$|\.quant_state\."
)
"""What quantisers store next to a weight, or instead of it."""

_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")


def plain_weights(tensors: Mapping[str, StoredTensor], spec: TowerSpec) -> dict[str, StoredTensor]:
    """The weights of a tower by the spec's names, without buffers that are computed anyway.

    Raises:
        CheckpointError: If one is quantised, part of an adapter, unknown to the spec or of another shape.
    """
    shapes = dict(spec.shapes())
    for name, (rows, *columns) in spec.shapes().items():
        if JOINT in name:
            shapes |= {name.replace(JOINT, part): (rows // len(APART), *columns) for part in APART}
    found = {}
    for name, tensor in sorted(tensors.items()):
        if _BUFFER.search(name):
            continue
        wanted, given = shapes.get(name), f"{tensor.dtype}{list(tensor.shape)}"
        if tensor.dtype not in FLOATS or (wanted is None and _COMPANION.search(name)):
            raise CheckpointError(
                f"{tensor.file}: the vision tower is quantised: {tensor.name!r} is {given}{_format(tensor)}.",
                hint="Use an unquantised checkpoint of the same model: the towers are usually the same bytes.",
            )
        if wanted is None and _ADAPTER.search(name):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is part of an adapter that is not merged into the vision tower.",
                hint="Merge the adapter into the checkpoint, for example with PEFT's merge_and_unload.",
            )
        if tensor.shape != wanted:
            misfit = (
                f"it has no place for {tensor.name!r}"
                if wanted is None
                else f"{tensor.name!r} is {given}, and the configuration demands {list(wanted)}"
            )
            raise CheckpointError(
                f"{tensor.file}: the vision weights do not fit the configuration: {misfit}.",
                hint="Configuration and weights are of different models.",
            )
        found[name] = tensor
    return found


def has_every_weight(spec: TowerSpec, names: Collection[str]) -> bool:
    """Whether a tower can be computed from the weights of these names."""
    return all(
        name in names or (JOINT in name and all(name.replace(JOINT, part) in names for part in APART))
        for name in spec.shapes()
    )


def _format(tensor: StoredTensor) -> str:
    if tensor.dtype.startswith("F8"):
        return " (FP8)"
    if tensor.dtype in ("U8", "I32") and re.search(r"weight(_packed)?$", tensor.name):
        return " (packed 4-bit or 8-bit integers)"
    return ""
