"""Opens the encoder of a served model, checks that it belongs to that model, and compares later weights with it.

The encoder runs on its own copy of the weights, so tensors that vLLM is given after the start, by `reload_weights` or a
trainer, do not reach it. If they differ from those in use, the encoder is opened again from the files that vLLM then
reads, or the tensors are refused if those files do not contain them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from visionaccel.backends import AUTO, default_registry, select
from visionaccel.bundle import Bundle, is_bundle, read_strip_note
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.arrays import as_numpy, dtype_name
from visionaccel.core.cores import on_cores
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.memory_files import FileState
from visionaccel.core.program import AnyGrid, Coverage
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import TowerSpec
from visionaccel.encoder import open_matching, source_digest
from visionaccel.errors import ArtifactError, ConfigurationError
from visionaccel.families import Tower, family_of, tower_of
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import weight_files, worker
from visionaccel.integrations.vllm.compat.engine_config import ServedModel
from visionaccel.settings import Settings
from visionaccel.trust import GuardedEncoder

if TYPE_CHECKING:
    import torch


def served_tower(served: ServedModel, stored: Checkpoint) -> Tower:
    """Return the vision tower that vLLM serves: the checkpoint's weights with the configuration that vLLM resolved."""
    if served.replaces is None or served.vision is None:
        return tower_of(stored)
    resolved = copy(stored)
    resolved.config = {**stored.config, "architectures": [served.replaces]}
    resolved.config = family_of(resolved).with_configuration(resolved.config, served.vision)
    tower = tower_of(resolved)
    with suppress(ArtifactError):
        unchanged = tower_of(stored)
        if unchanged.spec == tower.spec:
            return unchanged
    return tower


def served_spec(served: ServedModel) -> TowerSpec:
    """Return the description of a served model's tower."""
    folder = weight_files.settings_folder(served.source, served.revision)
    return served_tower(served, Checkpoint(folder, files=())).spec


def open_served_source(served: ServedModel, settings: Settings) -> Tower | Bundle:
    """Return the encoder that the settings choose for a served model: a bundle, another checkpoint's, or its own.

    Raises:
        ConfigurationError: If `VISIONACCEL_BUNDLE` is not a folder, or is a bundle of another model.
        ArtifactError: If the bundle or checkpoint is broken.
    """
    stored = _served_checkpoint(served)
    wanted = served_tower(served, stored)
    if settings.bundle is None:
        if wanted.stored_names:
            _ = wanted.weights  # an encoder that is opened late reads these files, not what replaced them
        return wanted
    return open_matching(settings.bundle, wanted, stored)


def stripped_source(served: ServedModel, settings: Settings, used: Tower | Bundle | None) -> Tower | Bundle | None:
    """Return the encoder of a checkpoint that was stripped of other vision weights than those in use.

    None if the checkpoint has vision weights, or no note that names others. `used` is the encoder in use; None if it
    does not have the weights that were served before.

    Raises:
        ConfigurationError: If the settings choose no such encoder.
    """
    folder = weight_files.settings_folder(served.source, served.revision)
    noted = read_strip_note(folder)
    if noted is None or (used is not None and noted == source_digest(used)):
        return None
    if served_tower(served, _served_checkpoint(served)).stored_names:
        return None
    if settings.bundle is None:
        raise ConfigurationError(
            f"the vision weights stripped from {folder} are not those of the vision encoder.",
            hint="Load the checkpoint with its vision weights, or start the server with VISIONACCEL_BUNDLE.",
        )
    return open_served_source(served, settings)


def _served_checkpoint(served: ServedModel) -> Checkpoint:
    """Return the files that vLLM loads; vLLM downloads missing ones."""
    folder = weight_files.settings_folder(served.source, served.revision)
    return Checkpoint(folder, files=weight_files.weight_files(served.source, served.revision, served.load))


def announce(encoders: Sequence[GuardedEncoder], how: str, on_drift: Callable[[], None]) -> None:
    """Log what encodes, and how; have `on_drift` called when one of its devices is distrusted."""
    for link in {link for encoder in encoders for link in encoder.links}:
        link.on_drift(on_drift)
    for encoder in encoders:
        compat.logger().info(f"visionaccel: {encoder.described(how)}")


@dataclass(frozen=True)
class Grids:
    """The grids that the encoder of a served model takes, if it does not take every one."""

    tower: Tower
    coverages: tuple[Coverage, ...]  # of each program that the chosen backend accepts
    rest: bool  # whether a fallback takes all other grids

    def __str__(self) -> str:
        return "; ".join(map(str, self.coverages))


def grids_of(served: ServedModel, settings: Settings) -> Grids | None:
    """Return the grids that the encoder of a served model will take, without opening it; None if it takes every grid.

    Every process of vLLM that prepares images calls this and gets the same answer.
    """
    if settings.bundle is None or not is_bundle(settings.bundle):
        return None  # an encoder from a checkpoint's weights takes every grid
    source = open_served_source(served, settings)
    with on_cores(worker.started_cores()):  # backends count the cores once, at the first call
        chosen = select(default_registry(), source, settings.backend or AUTO, settings.device).chosen
    if chosen is None:
        return None  # the engine will not start, or start with the fallback, which takes every grid
    coverages = tuple(program.coverage for program in chosen.programs)
    return None if AnyGrid() in coverages else Grids(source.tower, coverages, bool(settings.fallback))


@dataclass(frozen=True)
class Replacement:
    """A worker's message to the engine's process when the weights of the vision encoder change."""

    source: str  # checkpoint folder or repository to open the encoder from
    revision: str | None
    digest: str  # of the weights that it must have
    refusal: str | None = None  # why no encoder has the weights that are served

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Replacement:
        """Read a message; one that was cut is a refusal."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls("", None, "", "a worker's report about its new weights could not be read.")


class StoredWeights:
    """The vision tensors in a source's files, by name without the prefix."""

    def __init__(self, source: Tower | Bundle, prefixes: tuple[str, ...]) -> None:
        self.source = source
        self._stored: Mapping[str, StoredTensor] = {}
        with suppress(ArtifactError):  # a self-contained bundle: its tensors equal none of a checkpoint's
            self._stored = source.tower.checkpoint.with_prefix(prefixes)
        self._states = {tensor.file: tensor.origin for tensor in self._stored.values()}

    def unlike(self, other: StoredWeights | None, given: Collection[str]) -> str | None:
        """Return the first tensor, by name, that was not given and whose values the other source does not store."""
        theirs = {} if other is None else other._stored
        for name in sorted(self._stored.keys() - set(given)):
            if name not in theirs or not self._stored[name].holds_the_same_as(theirs[name]):
                return name
        return None

    def unchanged(self) -> bool:
        """Return whether the files are as they were when their headers were read."""
        try:
            return all(FileState.of(file) == state for file, state in self._states.items())
        except OSError:
            return False

    def holds(self, name: str, weight: torch.Tensor) -> bool:
        """Return whether a tensor has exactly the values that are stored under its name, in any dtype."""
        stored = self._stored.get(name)
        if stored is None or tuple(weight.shape) != stored.shape:
            return False
        if dtype_name(weight) not in FLOATS or stored.dtype not in FLOATS:
            return False
        values, given = stored.read(), np.ascontiguousarray(as_numpy(weight))
        if given.dtype == values.dtype and given.tobytes() == values.tobytes():
            return True
        return bool(np.array_equal(given.astype(np.float64), values.astype(np.float64), equal_nan=True))


class Comparison:
    """Compares vision tensors with the weights in use and, from the first that differs, with those in vLLM's files.

    `used` is None if no encoder has the weights that are served; `opened` opens what vLLM's files contain now.
    """

    def __init__(
        self, used: StoredWeights | None, prefixes: tuple[str, ...], opened: Callable[[], Tower | Bundle]
    ) -> None:
        self._used = used if used is not None and used.unchanged() else None
        self._prefixes, self._opened = prefixes, opened
        self.any_given = False  # whether vLLM was given a vision tensor
        self.differing: list[str] = []  # tensors that differ from those in use
        self._new: StoredWeights | None = None
        self._problem: str | None = None

    def note(self, name: str, weight: torch.Tensor) -> None:
        """Compare one vision tensor, by its full name, that vLLM is given."""
        self.any_given = True
        below = next(name.removeprefix(prefix) for prefix in self._prefixes if name.startswith(prefix))
        try:
            if self._used is not None and self._used.holds(below, weight):
                return
        except ArtifactError:  # the files are being replaced, so the weights in use cannot be read again
            self._used = None
        self.differing.append(below)
        if self._problem is not None:
            return
        try:
            self._new = self._new or StoredWeights(self._opened(), self._prefixes)
            if not self._new.holds(below, weight):
                self._problem = f"{name!r} has different values there"
        except (ArtifactError, ConfigurationError) as error:
            self._problem = error.message

    def replacement(self) -> Tower | Bundle:
        """Return the source in vLLM's files with exactly the weights that vLLM was given, or an error."""
        problem = self._problem
        if problem is None and self._new is not None:
            odd = self._new.unlike(self._used, self.differing)
            if odd is None:
                return self._new.source
            problem = f"{odd!r} was not given, but has different values there"
        raise ConfigurationError(
            f"vLLM was given new weights for the vision encoder, such as {self.differing[0]!r}, which differ from "
            f"those in the files that vLLM reads ({problem}). The encoder can only load weights from files.",
            hint="Save the new weights as a checkpoint and call reload_weights with its weights_path, or leave the "
            "vision encoder's tensors out of the update.",
        )
