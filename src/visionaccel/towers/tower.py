"""The vision tower of one checkpoint: what a family's description of it comes to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, get_args

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import (
    CHECKPOINT,
    ONNX,
    ONNX_STANDARD,
    AnyGrid,
    Bucket,
    Coverage,
    FixedGrid,
    HostSplit,
    OperatorDialect,
    Precision,
    Program,
)
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import ConfigurationError
from visionaccel.towers.family import Family, has_every_weight, plain_weights
from visionaccel.towers.host import GROUPED, RASTER, Host
from visionaccel.towers.operations import Operations, count_operations
from visionaccel.towers.tables import checkpoint_signature, signature, tower_tables


class Tower:
    """The vision tower of one checkpoint: sizes, programs and host-side tables. Holds no weights.

    Frames of a video are independent of each other, so a program of one frame serves videos.

    Args:
        family: How to read the checkpoint.
        checkpoint: Where the weights lie.

    Attributes:
        family: The family's name.
        checkpoint: Where the weights lie.
        spec: The description of the tower. Towers of equal descriptions and weights have equal programs.
        patch_size: Side of a patch in pixels.
        patch_width: Width of a row of patches: channels * temporal patch size * patch size**2.
        merge_size: Patches merged into one token along each side.
        out_width: Width of an embedding as the language model takes it.
        host_weights: Names of the weights that the host needs for a split program.

    Raises:
        CheckpointError: If the configuration is incomplete or impossible.
        UnsupportedArchitectureError: If it asks for something that is not implemented.
    """

    def __init__(self, family: Family, checkpoint: Checkpoint) -> None:
        self._family, self.family, self.checkpoint = family, family.name, checkpoint
        self.spec = family.described(checkpoint.config, f"{checkpoint.folder}/config.json")
        self.patch_size, self.patch_width = self.spec.patch, self.spec.patch_width
        self.merge_size, self.out_width = self.spec.merge, self.spec.out_width
        self.host_weights = self.spec.embed_weights

    @property
    def tower(self) -> Self:
        """Itself: a bundle, the other source of programs, has one too."""
        return self

    @property
    def weight_prefix(self) -> str:
        """What the names of packed weights start with."""
        return self._family.prefixes[-1]

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The vision configuration in the checkpoint's `config.json`."""
        return self._family.configuration(self.checkpoint.config, f"{self.checkpoint.folder}/config.json")

    @property
    def description(self) -> Mapping[str, Any]:
        """The part of the checkpoint's `config.json` that identifies the tower, for a checkpoint of the tower alone."""
        config = self.checkpoint.config
        kept = {name: config[name] for name in ("architectures", "model_type") if name in config}
        return self._family.with_configuration(kept, self.configuration)

    @property
    def stored_names(self) -> frozenset[str]:
        """Full names of what the checkpoint stores for the tower, buffers and unknown tensors too; empty if stripped.

        Raises:
            CheckpointError: If the checkpoint is damaged.
        """
        return frozenset(name for name in self.checkpoint.tensors if name.startswith(self._family.prefixes))

    @cached_property
    def weights(self) -> Mapping[str, StoredTensor]:
        """The tower's tensors, plain floats, by the names of its description.

        Raises:
            CheckpointError: If the checkpoint holds none, or one is quantised, stored in two forms, or unknown.
        """
        return self._family.weights(self.checkpoint, self.spec)

    @property
    def weights_folder(self) -> Path:
        """The deepest folder that holds the weights' files: the base of external-data locations."""
        return Path(os.path.commonpath({tensor.file.parent for tensor in self.weights.values()}))

    def over(self, weights: Mapping[str, StoredTensor]) -> Self:
        """The same tower reading its weights from another place.

        Raises:
            CheckpointError: If one does not fit the description.
        """
        other = copy(self)
        other.weights = plain_weights(weights, self.spec)
        return other

    @property
    def complete(self) -> bool:
        """Whether every weight of the description is there.

        Raises:
            CheckpointError: As `weights`, but not where there are none.
        """
        return bool(self.stored_names) and has_every_weight(self.spec, self.weights)

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        """The programs this tower can give in the wanted formats, cheaply: nothing is written or read yet."""
        wanted, found = set(formats), []
        if CHECKPOINT in wanted:
            inputs, outputs = checkpoint_signature(self.spec)
            found.append(
                Program(
                    name="checkpoint",
                    family=self.family,
                    format=CHECKPOINT,
                    folder=self.checkpoint.folder,
                    inputs=inputs,
                    outputs=outputs,
                    weights=self.weights,
                    uniform_frames=False,
                    spec=self.spec,
                    configuration=self.description,
                    tables=partial(tower_tables, self.spec),
                )
            )
        dialects: dict[str, OperatorDialect] = {ONNX: "microsoft", ONNX_STANDARD: "standard"}
        for stored_as in sorted(wanted & dialects.keys()):
            inputs, outputs = self.signature(AnyGrid(), None)
            folder, dialect = self.weights_folder, dialects[stored_as]
            found.append(
                Program(
                    name="dynamic",
                    family=self.family,
                    format=stored_as,
                    folder=folder,
                    inputs=inputs,
                    outputs=outputs,
                    weights=self.weights,
                    uniform_frames=True,
                    model=partial(_written, self.spec, self.weights, folder, AnyGrid(), "float32", None, dialect),
                )
            )
        return tuple(found)

    def signature(
        self, coverage: Coverage, host: HostSplit | None
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs and outputs of the ONNX model of that coverage."""
        return signature(self.spec, coverage, host)

    def split(self, coverage: Coverage) -> HostSplit:
        """How work is left to the host for a program of that coverage.

        Raises:
            ConfigurationError: If such programs are not split.
        """
        if isinstance(coverage, AnyGrid):
            raise ConfigurationError(
                "a program for any grid leaves nothing but the tables to the host.",
                hint="Split programs of fixed shapes only.",
            )
        grouped = isinstance(coverage, FixedGrid) and self.spec.window is not None
        return HostSplit(GROUPED if grouped else RASTER)

    def check_program(self, coverage: Coverage, split: HostSplit | None) -> None:
        """Refuse a coverage that no program of this tower has, and a split that the host does not support.

        Raises:
            ConfigurationError: If the split's order is not one of the coverage's, a fixed grid has several frames, or a
                bucket counts something else than this tower does, or more than any frame of its patches has.
            GridError: If a fixed grid is not divisible by the merge size.
        """
        if isinstance(coverage, FixedGrid):
            coverage.grid.check_divisible(self.merge_size)
            if coverage.grid.t != 1:
                raise ConfigurationError(
                    f"a program of a fixed grid takes one frame, and {coverage.grid} has {coverage.grid.t}.",
                    hint=f"Name {coverage}: the frames of a video are encoded one by one.",
                )
        if isinstance(coverage, Bucket):
            self._check_bucket(coverage)
        if split is None:
            return
        usual = self.split(coverage)
        if split != usual and not (isinstance(coverage, FixedGrid) and split == HostSplit(RASTER)):
            raise ConfigurationError(
                f"programs for {coverage} of this tower are not split in the order {split.order!r}.",
                hint=f"Name the order {usual.order!r}.",
            )

    def _check_bucket(self, bucket: Bucket) -> None:
        counted = self.sizes_of(Grid(1, self.merge_size, self.merge_size)).keys()
        if bucket.sizes.keys() != counted:
            raise ConfigurationError(
                f"a bucket of this tower counts {' and '.join(counted)}; this one states {' and '.join(bucket.sizes)}.",
                hint="Make buckets with `Tower.bucket`.",
            )
        tokens, rest = divmod(bucket.patches, self.spec.merged)
        if rest or tokens < 1:
            raise ConfigurationError(
                f"{bucket.patches} patches are not a whole number of tokens.",
                hint=f"Name a multiple of {self.spec.merged} patches.",
            )
        if self.spec.window is not None:
            most = -(-tokens // self.spec.window)  # as many as a frame of one row of tokens has
            if not 1 <= bucket.sizes["windows"] <= most:
                raise ConfigurationError(
                    f"{bucket.sizes['windows']} windows do not fit: {bucket.patches} patches are in 1 to {most}.",
                    hint="Make buckets with `Tower.bucket`.",
                )

    def bucket(self, largest: Grid) -> Bucket:
        """The smallest bucket that takes every frame of at most that height and width."""
        return Bucket(self.sizes_of(largest.frame))

    def sizes_of(self, frame: Grid) -> dict[str, int]:
        """What a bucket has to hold of a frame: its patches, and its attention windows if the tower has them."""
        found = {"patches": frame.patches}
        if self.spec.window is not None:
            side = self.spec.window * self.merge_size
            found["windows"] = -(-frame.h // side) * -(-frame.w // side)
        return found

    def fits(self, coverage: Coverage, frame: Grid) -> bool:
        """Whether a program of that coverage takes a frame; `frame` has one temporal step."""
        match coverage:
            case FixedGrid():
                return coverage.grid == frame
            case Bucket():
                return all(size <= coverage.sizes.get(name, 0) for name, size in self.sizes_of(frame).items())
            case AnyGrid():
                return coverage.most_patches is None or frame.patches <= coverage.most_patches

    def host(self, program: Program) -> Host:
        """The host's part of one of this tower's programs.

        Raises:
            CheckpointError: If a weight that the host needs is missing or cannot be read.
        """
        return Host(self.spec, program, self.weights if program.host else {})

    def operations(self, grids: Sequence[Grid]) -> Operations:
        """Floating-point operations of one call."""
        return count_operations(self.spec, grids)

    def onnx_model(
        self,
        folder: Path | None = None,
        *,
        coverage: Coverage = AnyGrid(),  # noqa: B008 - frozen and without state
        precision: Precision = "float32",
        host: HostSplit | None = None,
        dialect: OperatorDialect | None = None,
    ) -> bytes:
        """The tower as an ONNX model, its weights referenced in the files where they lie.

        Args:
            folder: External-data locations are relative to it; it must hold all shards, at any depth. None for
                `weights_folder`.
            coverage: Which grids it takes.
            precision: Dtype of weights and activations; inputs and outputs are float32.
            host: What is left to the host, with fixed shapes and in standard operators only.
            dialect: Whose operators: the standard's, of opset 17 for fixed shapes and 23 for `AnyGrid`, or ONNX
                Runtime's fused ones. None for `microsoft` with `AnyGrid`, else `standard`.

        Raises:
            CheckpointError: If a weight is missing or does not fit the configuration.
            ConfigurationError: If an argument is not known, the combination is not one that is written, the folder does
                not hold the weights, or onnx is not installed.
            GridError: If a fixed grid is not divisible by the merge size.
        """
        chosen = dialect or ("microsoft" if isinstance(coverage, AnyGrid) else "standard")
        for what, value, known in (("precision", precision, Precision), ("dialect", chosen, OperatorDialect)):
            if value not in get_args(known):
                raise ConfigurationError(
                    f"graphs are not written in {what} {value!r}.", hint=f"Name {' or '.join(get_args(known))}."
                )
        self.check_program(coverage, host)
        folder = self.weights_folder if folder is None else folder.resolve()
        if outside := [str(each.file) for each in self.weights.values() if not each.file.is_relative_to(folder)]:
            raise ConfigurationError(
                f"{folder} does not hold the weights, which are in {outside[0]}.",
                hint=f"Pass {self.weights_folder} or a folder above it.",
            )
        if host is not None and chosen == "microsoft":
            raise ConfigurationError(
                "a program in ONNX Runtime's operators leaves nothing but the tables to the host.",
                hint="Split programs in standard operators only.",
            )
        return _written(self.spec, self.weights, folder, coverage, precision, host, chosen)


def _written(*arguments: Any) -> bytes:
    """Call `write_model`. A plain function: a program is sent to child processes without its family."""
    try:  # only a backend that opens this program needs onnx, which takes a noticeable time to import
        from visionaccel.towers.onnx import write_model
    except ModuleNotFoundError as error:
        raise ConfigurationError.missing_extra("writing an ONNX graph", error.name, "visionaccel[onnx]") from error
    return write_model(*arguments)
