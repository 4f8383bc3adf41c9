"""The description of a vision tower: every size and choice, and the names of its weights.

Towers that take patches with a grid are alike: they embed the patches, run blocks of attention and a feed-forward
network, and merge each square of patches into a token. A description contains what differs, as sizes and short
sequences of steps. Tables, graphs, the host's part and a backend's tower all read it.

A step names its weights without the tower's prefix, and without `blocks.N.` in a block or `deepstack.N.` in the merger
of a deepstack level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

NormKind: TypeAlias = Literal["layer", "rms"]
ActivationKind: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]

JOINT, APART = "attn.qkv", ("attn.q", "attn.k", "attn.v")
"""Names of a block's attention projections: one joint weight and bias, or three that are its parts, row after row."""

_MOST, _MOST_WINDOW, _MOST_BLOCKS = 2**20, 2**14, 1024
"""Limits far above every real tower: a forged configuration must not decide how much memory and time the host takes."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation of rows: `layer` has a bias, `rms` has none."""

    name: str
    kind: NormKind
    width: int
    epsilon: float = 1e-6


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer.

    Attributes:
        name: The weight is `name.weight`, the bias `name.bias`.
        inputs: Width of an input row.
        outputs: Width of an output row.
        bias: Whether it has a bias.
        kernel: Side of a convolution's kernel over merged patches, stored as [outputs, hidden, kernel, kernel]; 0 for a
            matrix.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = True
    kernel: int = 0


@dataclass(frozen=True, slots=True)
class Activation:
    """An element-wise function."""

    kind: ActivationKind


@dataclass(frozen=True, slots=True)
class Gated:
    """A gated feed-forward network: down(activation(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear
    activation: ActivationKind


@dataclass(frozen=True, slots=True)
class Merge:
    """Joins the rows of a token's patches into one row. Steps before it act on patches, steps after it on tokens."""


Step: TypeAlias = Norm | Linear | Activation | Gated | Merge


@dataclass(frozen=True, slots=True)
class Positions:
    """A learned table that is resampled to the height and width of each frame and added to the embedded patches.

    Attributes:
        name: The table is `name.weight`, [side * side, hidden].
        side: Number of positions along each side.
        mode: How it is interpolated; `bicubic` is Keys' kernel with a = -0.75, as in torch.
        align_corners: Whether the first and last positions of a frame are those of the table, as in torch.
    """

    name: str
    side: int
    mode: Literal["bilinear", "bicubic"]
    align_corners: bool

    @property
    def taps(self) -> int:
        """Number of table entries that one position is interpolated from."""
        return 4 if self.mode == "bilinear" else 16


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """The description of one tower.

    Attributes:
        patch: Side of a patch in pixels.
        temporal: Number of frames in a patch.
        channels: Number of channels of a pixel.
        merge: Side of a token in patches.
        hidden: Width of a row in the blocks.
        heads: Number of attention heads.
        depth: Number of blocks.
        out: Width of an embedding, and of each deepstack level.
        embed: Embeds patches, [P, patch_width] to [P, hidden]: a linear layer, then norms.
        norm1: Norm before the attention.
        qkv: The projections to queries, keys and values; a checkpoint may store three weights (`APART`).
        proj: Projection after the attention.
        norm2: Norm before the feed-forward network.
        mlp: The feed-forward network, which ends in a linear layer.
        merger: Makes embeddings of the last block's rows, [P, hidden] to [N, out]; merges once.
        positions: Learned positions, in addition to the rotary ones; None if the tower has none.
        window: Side of an attention window in tokens; None if every block attends over whole frames.
        full_blocks: Blocks that attend over whole frames in a tower with windows.
        deepstack: For each deepstack level, the block whose output it is made from; a level's index is the number of
            its merger.
        deepstack_merger: The merger of each level, like `merger`.
        rotary_base: Base of the rotary frequencies.

    Raises:
        ValueError: If a field is invalid or does not fit another; the message names it.
    """

    patch: int
    temporal: int
    channels: int
    merge: int
    hidden: int
    heads: int
    depth: int
    out: int
    embed: tuple[Step, ...]
    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    mlp: tuple[Step, ...]
    merger: tuple[Step, ...]
    positions: Positions | None = None
    window: int | None = None
    full_blocks: tuple[int, ...] = ()
    deepstack: tuple[int, ...] = ()
    deepstack_merger: tuple[Step, ...] = ()
    rotary_base: float = 10000.0

    def __post_init__(self) -> None:
        """Check every field, and that they fit together."""
        _check_value("", self, TowerSpec)
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int" or f.name == "window"}
        sizes["positions.side"] = self.positions and self.positions.side
        for name, size in sizes.items():
            if size is not None and not 1 <= size <= _MOST:
                raise ValueError(f"{name} is {size}; it must be from 1 to {_MOST}")
        blocks = set(range(min(self.depth, _MOST_BLOCKS)))
        rules = {
            f"depth: a tower may have no more than {_MOST_BLOCKS} blocks": self.depth <= _MOST_BLOCKS,
            f"window: windows may have no more than {_MOST_WINDOW} patches": self.window_patches <= _MOST_WINDOW,
            "hidden must be divisible by heads": self.hidden % self.heads == 0,
            "hidden: the width of a head must be divisible by 4": self.head_dim % 4 == 0,
            "rotary_base must be positive": self.rotary_base > 0,
            "full_blocks must name blocks of the tower": set(self.full_blocks) <= blocks,
            "deepstack must name blocks of the tower, each at most once": set(self.deepstack) <= blocks
            and len(set(self.deepstack)) == len(self.deepstack),
            "deepstack and deepstack_merger must be set together": bool(self.deepstack) == bool(self.deepstack_merger),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)
        hidden = self.hidden
        self._check_steps("embed", self.embed, self.patch_width, hidden)
        self._check_steps("norm1, qkv", (self.norm1, self.qkv), hidden, 3 * hidden)
        self._check_steps("proj", (self.proj,), hidden, hidden)
        self._check_steps("norm2, mlp", (self.norm2, *self.mlp), hidden, hidden)
        self._check_steps("merger", self.merger, hidden, self.out, merges=1)
        if self.deepstack:
            self._check_steps("deepstack_merger", self.deepstack_merger, hidden, self.out, merges=1)
        self._check_names()
        if not isinstance(self.embed[0], Linear) or not all(isinstance(step, Norm) for step in self.embed[1:]):
            raise ValueError("embed must be a linear layer followed by norms only")
        if not self.mlp or not isinstance(self.mlp[-1], Linear | Gated):
            raise ValueError("mlp must end with a linear layer")

    def _check_names(self) -> None:
        """Refuse steps that would share their weights."""
        around = [step.name for step in (*_weighted((*self.embed, *self.merger)), self.positions) if step]
        groups = {
            "norm1, qkv, proj, norm2, mlp": [step.name for step in _weighted(self._block)],
            "embed, positions, merger": around,
            "deepstack_merger": [step.name for step in _weighted(self.deepstack_merger)],
        }
        for place, names in groups.items():
            if len(set(names)) < len(names):
                raise ValueError(f"{place}: two steps have the same name and would share their weights")
        for name in around:
            if name.startswith(("blocks.", "deepstack.")):
                raise ValueError(f"embed, positions, merger: {name} is reserved for blocks or deepstack levels")

    def _check_steps(self, name: str, steps: Sequence[Step], width: int, wanted: int, merges: int = 0) -> None:
        """Check that each step of a sequence takes the rows of the step before, and the width of the last rows."""
        if not steps:
            raise ValueError(f"{name} has no steps")
        for each in _weighted(steps):
            if isinstance(each, Norm) and each.epsilon <= 0:
                raise ValueError(f"{name}: epsilon of {each.name} is {each.epsilon}; it must be positive")
            kernel = self.merge, self.hidden * self.merged
            if isinstance(each, Linear) and each.kernel and (each.kernel, each.inputs) != kernel:
                raise ValueError(f"{name}: kernel of {each.name} is {each.kernel}; it must be merge, or 0 for a matrix")
        merged = 0
        for step in steps:
            needs = given = width
            match step:
                case Norm():
                    needs = step.width
                case Linear():
                    needs, width = step.inputs, step.outputs
                case Gated():
                    needs, width = step.gate.inputs, step.down.outputs
                    inner = {step.gate.outputs, step.up.outputs, step.down.inputs}
                    if step.up.inputs != needs or len(inner) > 1 or not 0 < min(inner) <= _MOST:
                        raise ValueError(
                            f"{name}: {step.gate.name}, {step.up.name} and {step.down.name} do not fit together"
                        )
                case Merge():
                    width, merged = width * self.merged, merged + 1
            if needs != given or not 0 < width <= _MOST * self.merged:
                raise ValueError(f"{name}: {step} does not take rows of width {given}")
        if (width, merged) != (wanted, merges):
            raise ValueError(
                f"{name} returns rows of width {width} and merges {merged} times; "
                f"it must return rows of width {wanted} and merge {merges} times"
            )

    @property
    def _block(self) -> tuple[Step, ...]:
        return self.norm1, self.qkv, self.proj, self.norm2, *self.mlp

    @property
    def patch_width(self) -> int:
        """Width of a row of patches."""
        return self.channels * self.temporal * self.patch**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def merged(self) -> int:
        """Number of patches that become one token."""
        return self.merge**2

    @property
    def window_patches(self) -> int:
        """Number of patches in a whole attention window; 0 without windows."""
        return (self.window or 0) ** 2 * self.merged

    @property
    def out_width(self) -> int:
        """Width of an output row: the embedding, followed by the deepstack levels in the order of their blocks."""
        return self.out * (1 + len(self.deepstack))

    def windowed(self, block: int) -> bool:
        """Return whether a block attends within windows."""
        return self.window is not None and block not in self.full_blocks

    def levels_after(self, block: int) -> tuple[int, ...]:
        """Return the deepstack levels that are made from a block's output."""
        return tuple(level for level, after in enumerate(self.deepstack) if after == block)

    @property
    def embed_weights(self) -> tuple[str, ...]:
        """Names of the weights that embed patches, including the learned positions."""
        return tuple(self._embed_shapes())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every weight by its name; attention projections are joint (`JOINT`)."""
        found = self._embed_shapes()
        for block in range(self.depth):
            found |= self._shapes_of(f"blocks.{block}.", self._block)
        found |= self._shapes_of("", self.merger)
        for level in range(len(self.deepstack)):
            found |= self._shapes_of(f"deepstack.{level}.", self.deepstack_merger)
        return found

    def _embed_shapes(self) -> dict[str, tuple[int, ...]]:
        found = self._shapes_of("", self.embed)
        if self.positions is not None:
            found[f"{self.positions.name}.weight"] = (self.positions.side**2, self.hidden)
        return found

    def _shapes_of(self, prefix: str, steps: Sequence[Step]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for step in _weighted(steps):
            if isinstance(step, Linear):
                biased, shape = step.bias, self.stored_shape(step)
            else:
                biased, shape = step.kind == "layer", (step.width,)
            found[f"{prefix}{step.name}.weight"] = shape
            if biased:
                found[f"{prefix}{step.name}.bias"] = shape[:1]
        return found

    def stored_shape(self, linear: Linear) -> tuple[int, ...]:
        """Return the shape in which a linear layer's weight is stored."""
        if linear == self.embed[0]:
            return linear.outputs, self.channels, self.temporal, self.patch, self.patch
        if linear.kernel:
            return linear.outputs, linear.inputs // linear.kernel**2, linear.kernel, linear.kernel
        return linear.outputs, linear.inputs

    def document(self) -> dict[str, Any]:
        """Return the description as JSON values; equal for equal towers.

        A field with its default value is left out, so that a reader that does not know the field can read the rest.
        """
        return dict(_plain(self))

    def differing(self, other: TowerSpec) -> str:
        """Describe the fields in which another tower differs, with both values."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return "; ".join(
            f"{name} is {_plain(ours)}, not {_plain(theirs)}" for name, ours, theirs in pairs if ours != theirs
        )


def _weighted(steps: Sequence[Step]) -> Iterator[Norm | Linear]:
    """Return the steps that have weights."""
    for step in steps:
        if isinstance(step, Gated):
            yield from (step.gate, step.up, step.down)
        elif isinstance(step, Norm | Linear):
            yield step


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        kind = {} if isinstance(value, TowerSpec | Positions) else {"step": type(value).__name__.lower()}
        given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return {**kind, **{name: _plain(each) for name, each in given.items()}}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _check_value(place: str, value: Any, declared: Any) -> None:
    """Raise ValueError for a value that does not have its declared type, and for a number that is not finite."""
    choices = get_args(declared)
    if get_origin(declared) is Literal:
        fits, wanted = value in choices, " or ".join(map(repr, choices))
    elif get_origin(declared) is tuple:
        fits, wanted = isinstance(value, tuple), "a tuple"
        for number, each in enumerate(value if fits else ()):
            _check_value(f"{place}[{number}]", each, choices[0])
    elif choices:
        fits, wanted = type(value) in choices, " or ".join(choice.__name__ for choice in choices)
    elif declared is float:
        fits, wanted = type(value) in (int, float) and -math.inf < value < math.inf, "a finite number"
    else:
        fits, wanted = type(value) is declared, f"of type {declared.__name__}"
    if not fits:
        raise ValueError(f"{place} is {value!r}; it must be {wanted}")
    if is_dataclass(value) and not isinstance(value, type):
        for name, kind in _declared_types(type(value)).items():
            _check_value(f"{place}.{name}".removeprefix("."), getattr(value, name), kind)


_declared_types = cache(get_type_hints)
