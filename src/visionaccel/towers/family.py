"""A family of towers: how its checkpoints describe the sizes of a tower and store the weights.

Weights must be plain floats of the shapes in the description. Quantised ones are recognised by their dtypes and by the
tensors stored with them, not by the configuration: most quantised checkpoints leave the vision tower as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from sys import float_info
from typing import Any

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.containment import contained
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import APART, JOINT, TowerSpec
from visionaccel.errors import CheckpointError, PluginError, UnsupportedArchitectureError, VisionAccelError

_NAME = re.compile(r"[^{}]*(\{n\}[^{}]*)?")
"""A module's name, in which `{n}` may be a number."""

_RELEASED = "Pass a released checkpoint of this family or a finetune of one, and no override of this value."

_SHOWN = 8
"""Names that an error lists at most."""


class _MissingValueError(KeyError):
    """A configuration has no value of this name."""


class VisionConfiguration:
    """The part of a `config.json` that describes a tower, completed with the family's defaults.

    Its methods raise KeyError if a value is missing and ValueError if it has the wrong type, unless they say otherwise.
    A family does not catch these: they are reported as an error of the checkpoint, with the value's name.

    Attributes:
        where: The name of this configuration in errors: the file and the keys in it.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self._values, self.where = {**defaults, **values}, where

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise _MissingValueError(name)
        return self._values[name]

    def whole(self, name: str) -> int:
        """Return a value that must be an integer."""
        return _whole(name, self[name])

    def wholes(self, name: str) -> tuple[int, ...]:
        """Return a value that must be a list of integers."""
        values = self[name]
        if not isinstance(values, list | tuple):
            raise ValueError(f"{name} is {values!r} and not a list")
        return tuple(_whole(name, value) for value in values)

    def number(self, name: str) -> float:
        """Return a value that must be a finite number."""
        value = self[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= float_info.max:
            raise ValueError(f"{name} has {value!r} where a finite number is expected")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return a value that must be true or false."""
        value = self[name]
        if not isinstance(value, bool):
            raise ValueError(f"{name} has {value!r} where true or false is expected")
        return value

    def require(self, name: str, *known: Any, why: str = "") -> Any:
        """Return a value that must be one of those that are implemented.

        Raises:
            UnsupportedArchitectureError: If it is another.
        """
        found = list(self[name]) if isinstance(self[name], tuple) else self[name]
        if found not in known:
            raise UnsupportedArchitectureError(
                f"{self.where}.{name} is {found!r}; only {' or '.join(map(repr, known))} is implemented{why}.",
                hint=_RELEASED,
            )
        return found

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies, from either of the two places where transformers writes it.

        Raises:
            UnsupportedArchitectureError: If the frequencies do not follow from the base alone.
        """
        try:
            nested = dict(self._values.get("rope_parameters") or {})
            base = float(nested.get("rope_theta", self._values.get("rope_theta", 10000.0)))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"rope_theta cannot be read: {error}") from error
        kind = nested.get("rope_type", "axial")
        if kind not in ("axial", "default"):  # transformers' name, and that in older files
            raise UnsupportedArchitectureError(
                f"{self.where}.rope_parameters.rope_type is {kind!r}; only 'axial' is implemented.", hint=_RELEASED
            )
        return base


@dataclass(frozen=True)
class Family:
    """A kind of vision tower, and how to read it from checkpoints.

    Register it in the entry-point group `visionaccel.families`: one entry point for each architecture, named as in
    `config.json`, all referring to the same object.

    Attributes:
        name: Its name in bundles and messages.
        spec: Returns the description of a tower from its configuration. A `ValueError`, or an error of the
            configuration's methods, is reported as an error of the checkpoint, any other as one of the family.
        config: The path of keys to the tower's configuration in `config.json`.
        defaults: Values that configurations may leave out.
        prefixes: Prefixes of the names of the tower's tensors, in the order in which they are tried. Bundles that hold
            weights use the last.
        names: Modules with another name in some checkpoints: maps that name to the spec's. `{n}` is the first number in
            a name, as in `layers.{n}.mlp`.
        fused: Modules whose rows are concatenated in checkpoints: maps the stored name to the spec's names in order.

    Raises:
        TypeError: If `config` or `prefixes` is not a tuple of non-empty strings, or a module's name is not a string.
        ValueError: If a prefix does not end with a dot, or `{n}` is in only one of two names of a module.
    """

    name: str
    spec: Callable[[VisionConfiguration], TowerSpec]
    config: tuple[str, ...] = ("vision_config",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("model.visual.", "visual.")
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields that are looked up in checkpoints."""
        for what, texts in (("config", self.config), ("prefixes", self.prefixes)):
            fits = isinstance(texts, tuple) and all(isinstance(each, str) and each for each in texts)
            if not fits or not texts:
                raise TypeError(f"{what} of family {self.name!r} must be a tuple of non-empty strings, not {texts!r}")
        for prefix in self.prefixes:
            if not prefix.endswith("."):
                raise ValueError(f"prefixes of family {self.name!r}: {prefix!r} must end with a dot")
        pairs = [("names", *pair) for pair in self.names.items()]
        pairs += [("fused", stored, own) for stored, parts in self.fused.items() for own in parts]
        for what, stored, own in pairs:
            if not _NAME.fullmatch(stored) or not _NAME.fullmatch(own) or ("{n}" in stored) != ("{n}" in own):
                raise ValueError(
                    f"{what} of family {self.name!r}: {stored!r} and {own!r} must both contain {{n}} once, or no braces"
                )

    def configuration(self, config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return the vision configuration within a `config.json`.

        Raises:
            CheckpointError: If it is missing.
        """
        found: Any = config
        for key in self.config:
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{where} is missing.", hint="Pass a vision-language checkpoint.")
        return found

    def described(self, config: Mapping[str, Any], path: str) -> TowerSpec:
        """Return the description of a tower from a `config.json`; errors refer to it as `path`.

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
                f"{where} has no {error}.", hint="Pass a complete checkpoint of this family."
            ) from error
        except ValueError as error:
            raise CheckpointError(
                f"{where}: {error}.", hint="Check that the configuration is intact and belongs to this family."
            ) from error
        except Exception as error:
            raise self._fault(f"failed to describe the tower: {type(error).__name__}: {error}") from error
        if not isinstance(spec, TowerSpec):
            raise self._fault(f"returned a {type(spec).__name__} instead of a TowerSpec")
        return spec

    def _fault(self, what: str) -> PluginError:
        return PluginError(f"family {self.name!r} {what}.", hint="Report this to the authors of the family.")

    def with_configuration(self, config: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a `config.json` with another vision configuration."""

        def put(within: Any, keys: tuple[str, ...]) -> dict[str, Any]:
            below = put(within.get(keys[0], {}), keys[1:]) if len(keys) > 1 else dict(vision)
            return {**within, keys[0]: below}

        return put(config, self.config)

    def weights(self, checkpoint: Checkpoint, spec: TowerSpec) -> dict[str, StoredTensor]:
        """Return a tower's tensors by the spec's names, each with the shape that the spec requires.

        Raises:
            CheckpointError: If there are none, or one is stored in two forms, quantised, part of an adapter, unknown to
                the spec or has another shape.
            PluginError: If the family's `names` or `fused` cannot be used.
        """
        stored = checkpoint.with_prefix(self.prefixes)
        if not stored:
            starts = sorted({".".join(name.split(".")[:2]) for name in checkpoint.tensors})
            raise CheckpointError(
                f"{checkpoint.folder} contains no vision weights: no tensor name starts with "
                f"{' or '.join(map(repr, self.prefixes))}; names start with "
                f"{', '.join(map(repr, starts[:_SHOWN])) or 'nothing'}.",
                hint="If the checkpoint was stripped, set VISIONACCEL_BUNDLE to a folder that has the vision weights.",
            )
        found: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            try:
                forms = list(self._forms(name, tensor))
            except Exception as error:
                raise self._fault(f"failed to map the name {name!r}: {type(error).__name__}: {error}") from error
            for own, part in forms:
                joint = re.sub(r"attn\.[qkv]\.", f"{JOINT}.", own)
                if own in found or (joint != own and joint in stored):
                    raise CheckpointError(
                        f"{tensor.file}: {tensor.name!r} is stored twice: also as part of {joint!r}.",
                        hint="Make a checkpoint in which each weight is stored once.",
                    )
                found[own] = part
        return plain_weights(found, spec)

    def stored_name(self, name: str) -> str:
        """Return the name, without the prefix, under which checkpoints store the spec's tensor of that name."""
        module, _, leaf = name.rpartition(".")
        template, number = _template(module)
        stored = {own: theirs for theirs, own in self.names.items()}
        return f"{stored.get(template, template).replace('{n}', number)}.{leaf}"

    def _forms(self, name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
        """Return a stored tensor under the spec's name, or cut into the rows of several of the spec's tensors."""
        module, _, leaf = name.rpartition(".")
        template, number = _template(module)

        def named(own: str) -> str:
            return f"{own.replace('{n}', number)}.{leaf}"

        parts = self.fused.get(template, ())
        if parts and tensor.shape and tensor.shape[0] % len(parts) == 0:
            length, shape = tensor.length // len(parts), (tensor.shape[0] // len(parts), *tensor.shape[1:])
            for place, part in enumerate(parts):
                yield named(part), replace(tensor, offset=tensor.offset + place * length, length=length, shape=shape)
        else:
            yield named(self.names.get(module) or self.names.get(template, template)), tensor


def _template(module: str) -> tuple[str, str]:
    """Return a module's name with `{n}` for the first number within it, and that number."""
    number = re.search(r"(?<=\.)\d+(?=\.)", module)
    if number is None:
        return module, ""
    return f"{module[: number.start()]}{{n}}{module[number.end() :]}", number[0]


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} has {value!r} where an integer is expected")
    return value


_BUFFER = re.compile(r"(^|\.)rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that older releases of transformers saved with the weights; they are computed from the configuration."""

_COMPANION = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|scales?|biases|scale_inv|scale_2|zero_point|absmax|quant_map|SCB|weight_format"
    r"|weight_packed|weight_shape|weight_scale\w*|input_scale|(weight|input)_global_scale)$|\.quant_state\."
)
"""Names of tensors that quantisers store next to a weight, or instead of it."""

_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")


def plain_weights(tensors: Mapping[str, StoredTensor], spec: TowerSpec) -> dict[str, StoredTensor]:
    """Check the weights of a tower, by the spec's names, and return them without buffers that are computed anyway.

    CheckpointError if one is quantised, part of an adapter, unknown to the spec, or has the wrong shape.
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
                hint="Use an unquantised checkpoint of the same model; its vision tower is usually the same.",
            )
        if wanted is None and _ADAPTER.search(name):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is part of an adapter that is not merged into the vision tower.",
                hint="Merge the adapter into the checkpoint, for example with PEFT's merge_and_unload.",
            )
        if wanted is not None and (*tensor.shape[:2], 1, *tensor.shape[2:]) == wanted:
            tensor = replace(tensor, shape=wanted)  # a convolution over one frame, stored without its axis of time
        if tensor.shape != wanted:
            misfit = (
                f"unknown weight {tensor.name!r}{_instead(tensor.name, name, tensors, spec)}"
                if wanted is None
                else f"{tensor.name!r} is {given}, but the configuration requires {list(wanted)}"
            )
            raise CheckpointError(
                f"{tensor.file}: the vision weights do not fit the configuration: {misfit}.",
                hint="Pass a checkpoint whose configuration and weights belong to the same model.",
            )
        found[name] = tensor
    return found


def has_every_weight(spec: TowerSpec, names: Collection[str]) -> bool:
    """Return whether weights of these names are all that a tower needs."""
    return not _missing(spec, names)


def _missing(spec: TowerSpec, names: Collection[str]) -> list[str]:
    """Return the names of the weights that a tower needs and that are not among `names`."""
    return [
        name
        for name in spec.shapes()
        if name not in names and not (JOINT in name and all(name.replace(JOINT, part) in names for part in APART))
    ]


def _instead(stored: str, name: str, names: Collection[str], spec: TowerSpec) -> str:
    """Describe how an unknown weight's name was read, and which weights are missing: one of them may be meant."""
    read = "" if stored.endswith(name) else f", read as {name!r}"
    missing = _missing(spec, names)
    if not missing:
        return read
    return f"{read}, while {missing[0]!r}{f' and {len(missing) - 1} more are' if missing[1:] else ' is'} missing"


def _format(tensor: StoredTensor) -> str:
    if tensor.dtype.startswith("F8"):
        return " (FP8)"
    if tensor.dtype in ("U8", "I32") and re.search(r"weight(_packed)?$", tensor.name):
        return " (packed 4-bit or 8-bit integers)"
    return ""
