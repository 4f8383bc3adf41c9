"""The vision tower of one checkpoint: its sizes, programs and tables, from the family's description."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, get_args

from visionaccel.checkpoint import Checkpoint
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
from visionaccel.towers.tables import Signature, checkpoint_signature, signature, tower_tables


class Tower:
    """The vision tower of one checkpoint: sizes, programs and host-side tables. Does not load the weights.

    Frames of a video are independent of each other, so a program for one frame also serves videos.

    Args:
        family: How to read the checkpoint.
        checkpoint: The checkpoint, with configuration and weights.

    Attributes:
        family: The family's name.
        checkpoint: The checkpoint.
        spec: The description of the tower. Towers with equal descriptions and weights have equal programs.
        patch_size: Side of a patch in pixels.
        patch_width: Width of a row of patches: channels * temporal patch size * patch size**2.
        merge_size: Patches merged into one token along each side.
        out_width: Width of an embedding as the language model receives it, deepstack levels included.
        host_weights: Names of the weights that the host needs for a split program.

    Raises:
        CheckpointError: If the configuration is incomplete or impossible.
        PluginError: If the family fails to describe the tower.
        UnsupportedArchitectureError: If the configuration asks for something that is not implemented.
    """

    def __init__(self, family: Family, checkpoint: Checkpoint) -> None:
        self._family, self.family, self.checkpoint = family, family.name, checkpoint
        self.spec = family.described(checkpoint.config, f"{checkpoint.folder}/config.json")
        self.patch_size, self.patch_width = self.spec.patch, self.spec.patch_width
        self.merge_size, self.out_width = self.spec.merge, self.spec.out_width
        self.host_weights = self.spec.embed_weights

    @property
    def tower(self) -> Self:
        """This tower; bundles, the other source of programs, have a `tower` too."""
        return self

    def stored_name(self, name: str) -> str:
        """Return the full name under which bundles store the weight that has this name in the description."""
        return self._family.prefixes[-1] + self._family.stored_name(name)

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The vision configuration in the checkpoint's `config.json`."""
        return self._family.configuration(self.checkpoint.config, f"{self.checkpoint.folder}/config.json")

    @property
    def description(self) -> Mapping[str, Any]:
        """The part of `config.json` that identifies the tower: the configuration of a checkpoint of only the tower."""
        config = self.checkpoint.config
        kept = {name: config[name] for name in ("architectures", "model_type") if name in config}
        return self._family.with_configuration(kept, self.configuration)

    @property
    def stored_names(self) -> frozenset[str]:
        """Full names of the tower's tensors in the checkpoint, with buffers and unknown ones; empty if stripped.

        Raises:
            CheckpointError: If the checkpoint is damaged.
        """
        return frozenset(name for name in self.checkpoint.tensors if name.startswith(self._family.prefixes))

    @cached_property
    def weights(self) -> Mapping[str, StoredTensor]:
        """The tower's tensors, plain floats, by the names of its description; their data is not read yet.

        Raises:
            CheckpointError: If there are none, or one is quantised, part of an adapter, stored in two forms, unknown,
                or has another shape than the description.
        """
        return self._family.weights(self.checkpoint, self.spec)

    @property
    def weights_folder(self) -> Path:
        """The deepest folder that contains all files of weights: external-data locations are relative to it."""
        return Path(os.path.commonpath({tensor.file.parent for tensor in self.weights.values()}))

    def over(self, weights: Mapping[str, StoredTensor]) -> Self:
        """Return the same tower with its weights read from another place.

        Raises:
            CheckpointError: If a weight does not fit the description.
        """
        other = copy(self)
        other.weights = plain_weights(weights, self.spec)
        return other

    @property
    def complete(self) -> bool:
        """Whether the checkpoint has every weight of the description.

        Raises:
            CheckpointError: As for `weights`, except that a checkpoint without any is not an error.
        """
        return bool(self.stored_names) and has_every_weight(self.spec, self.weights)

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        """Return this tower's programs in the wanted formats. Raises the errors of `weights`.

        This is cheap: models are written when they are opened.
        """
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

    def signature(self, coverage: Coverage, host: HostSplit | None) -> Signature:
        """Return the inputs and outputs of the ONNX program with that coverage and split."""
        return signature(self.spec, coverage, host)

    def split(self, coverage: Coverage) -> HostSplit:
        """Return how a program of that coverage is split between host and device.

        Raises:
            ConfigurationError: If programs of that coverage cannot be split.
        """
        if isinstance(coverage, AnyGrid):
            raise ConfigurationError(
                "a program for any grid cannot leave the patch embedding to the host.",
                hint="Split only programs of fixed shapes.",
            )
        grouped = isinstance(coverage, FixedGrid) and self.spec.window is not None
        return HostSplit(GROUPED if grouped else RASTER)

    def check_program(self, coverage: Coverage, split: HostSplit | None) -> None:
        """Refuse a coverage that no program of this tower can have, and a split that the host does not support.

        Raises:
            ConfigurationError: If the split's order does not exist for the coverage, a fixed grid has several frames,
                or the sizes of a bucket are not those that this tower counts, or are impossible.
            GridError: If a fixed grid is not divisible by the merge size.
        """
        if isinstance(coverage, FixedGrid):
            coverage.grid.check_divisible(self.merge_size)
            if coverage.grid.t != 1:
                raise ConfigurationError(
                    f"a program for a fixed grid encodes one frame, but {coverage.grid} has {coverage.grid.t}.",
                    hint=f"Use {coverage}: the frames of a video are encoded one by one.",
                )
        if isinstance(coverage, Bucket):
            self._check_bucket(coverage)
        if split is None:
            return
        usual = self.split(coverage)
        if split != usual and not (isinstance(coverage, FixedGrid) and split == HostSplit(RASTER)):
            raise ConfigurationError(
                f"programs for {coverage} of this tower do not support the token order {split.order!r}.",
                hint=f"Use the order {usual.order!r}.",
            )

    def _check_bucket(self, bucket: Bucket) -> None:
        counted = self.sizes_of(Grid(1, self.merge_size, self.merge_size)).keys()
        if bucket.sizes.keys() != counted:
            raise ConfigurationError(
                f"a bucket of this tower needs sizes for {' and '.join(counted)}, not {' and '.join(bucket.sizes)}.",
                hint="Make buckets with `Tower.bucket`.",
            )
        tokens, rest = divmod(bucket.patches, self.spec.merged)
        if rest or tokens < 1:
            raise ConfigurationError(
                f"{bucket.patches} patches are not a whole number of tokens.",
                hint=f"Use a multiple of {self.spec.merged} patches.",
            )
        if self.spec.window is not None:
            most = -(-tokens // self.spec.window)  # the windows of a frame with one row of tokens
            if not 1 <= bucket.sizes["windows"] <= most:
                raise ConfigurationError(
                    f"{bucket.sizes['windows']} windows do not fit: {bucket.patches} patches form 1 to {most}.",
                    hint="Make buckets with `Tower.bucket`.",
                )

    def bucket(self, largest: Grid) -> Bucket:
        """Return the smallest bucket that takes every frame of at most that height and width."""
        return Bucket(self.sizes_of(largest.frame))

    def sizes_of(self, frame: Grid) -> dict[str, int]:
        """Count what a bucket must hold of a frame: `patches`, and `windows` if the tower has attention windows."""
        found = {"patches": frame.patches}
        if self.spec.window is not None:
            side = self.spec.window * self.merge_size
            found["windows"] = -(-frame.h // side) * -(-frame.w // side)
        return found

    def fits(self, coverage: Coverage, frame: Grid) -> bool:
        """Return whether a program of that coverage takes a frame; `frame` has one temporal step."""
        match coverage:
            case FixedGrid():
                return coverage.grid == frame
            case Bucket():
                return all(size <= coverage.sizes.get(name, 0) for name, size in self.sizes_of(frame).items())
            case AnyGrid():
                return coverage.most_patches is None or frame.patches <= coverage.most_patches

    def host(self, program: Program) -> Host:
        """Return the host's part of one of this tower's programs.

        Raises:
            CheckpointError: If a weight that the host needs is missing or cannot be read.
        """
        return Host(self.spec, program, self.weights if program.host else {})

    def onnx_model(
        self,
        folder: Path | None = None,
        *,
        coverage: Coverage = AnyGrid(),  # noqa: B008 - frozen and without state
        precision: Precision = "float32",
        host: HostSplit | None = None,
        dialect: OperatorDialect | None = None,
    ) -> bytes:
        """Write the tower as an ONNX model that refers to the weights in their files.

        Args:
            folder: External-data locations are relative to it; it must contain all shards, at any depth. None for
                `weights_folder`.
            coverage: Which grids the model takes.
            precision: Dtype of weights and activations; inputs and outputs are float32.
            host: What is left to the host; only for fixed shapes in standard operators.
            dialect: `standard` operators (opset 17 for fixed shapes, 23 for `AnyGrid`), or `microsoft` for ONNX
                Runtime's fused ones. None for `microsoft` with `AnyGrid`, else `standard`.

        Returns:
            The serialized model.

        Raises:
            CheckpointError: If a weight is missing or does not fit the configuration.
            ConfigurationError: If an argument or a combination is not supported, the folder does not contain the
                weights, or onnx is not installed.
            GridError: If a fixed grid is not divisible by the merge size.
        """
        chosen = dialect or ("microsoft" if isinstance(coverage, AnyGrid) else "standard")
        for what, value, known in (("precision", precision, Precision), ("dialect", chosen, OperatorDialect)):
            if value not in get_args(known):
                raise ConfigurationError(f"unknown {what} {value!r}.", hint=f"Choose {' or '.join(get_args(known))}.")
        self.check_program(coverage, host)
        folder = self.weights_folder if folder is None else folder.resolve()
        if outside := [str(each.file) for each in self.weights.values() if not each.file.is_relative_to(folder)]:
            raise ConfigurationError(
                f"{folder} does not contain the weights, which are in {outside[0]}.",
                hint=f"Pass {self.weights_folder} or a folder above it.",
            )
        if host is not None and chosen == "microsoft":
            raise ConfigurationError(
                "a program in ONNX Runtime's operators cannot leave the patch embedding to the host.",
                hint="Split only programs in standard operators.",
            )
        return _written(self.spec, self.weights, folder, coverage, precision, host, chosen)


def _written(*arguments: Any) -> bytes:
    """Call `write_model`. Not a method, because programs are sent to child processes without their family."""
    try:  # only a backend that opens this program needs onnx, which is slow to import
        from visionaccel.towers.onnx import write_model
    except ModuleNotFoundError as error:
        raise ConfigurationError.missing_extra("writing an ONNX graph", error.name, "visionaccel[onnx]") from error
    return write_model(*arguments)
