"""Vision weights that vLLM is given after the start, as by `reload_weights` or a trainer: used, or refused.

The encoder runs on its own copy of the weights, so tensors that vLLM is given do not reach it. Weights that differ from
those in use are either found in the files that vLLM then reads, from which the encoder is opened again, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from visionaccel.bundle import Bundle, tower_digest
from visionaccel.core.arrays import as_numpy, dtype_name
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.memory_files import FileState
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import ArtifactError, ConfigurationError
from visionaccel.families import Tower

if TYPE_CHECKING:
    import torch

_HINT = (
    "Save the new weights as a checkpoint and call reload_weights with its weights_path, or leave the vision "
    "encoder's tensors out of the update."
)


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
        """From text; a refusal if the text was cut."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls("", None, "", "a worker's report about its new weights could not be read.")


class StoredWeights:
    """The vision tensors in a source's files, by their names without the prefix."""

    def __init__(self, source: Tower | Bundle, prefixes: tuple[str, ...]) -> None:
        checkpoint = source.tower.checkpoint
        self._stored: Mapping[str, StoredTensor] = {}
        with suppress(ArtifactError):  # a bundle whose programs bring their weights: nothing in it equals anything
            self._stored = checkpoint.with_prefix(prefixes)
        self._states = {tensor.file: tensor.origin for tensor in self._stored.values()}

    def unlike(self, other: StoredWeights | None, given: Collection[str]) -> str | None:
        """The first tensor, by name, that was not given and that the other source does not store likewise."""
        theirs = {} if other is None else other._stored
        for name in sorted(self._stored.keys() - set(given)):
            if name not in theirs or not self._stored[name].holds_the_same_as(theirs[name]):
                return name
        return None

    def unchanged(self) -> bool:
        """Whether the files are as they were when their headers were read."""
        try:
            return all(FileState.of(file) == state for file, state in self._states.items())
        except OSError:
            return False

    def holds(self, name: str, weight: torch.Tensor) -> bool:
        """Whether a tensor has exactly the values that are stored under its name, in any dtype."""
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

    `used` is None if no encoder has the weights that are served; `opened` opens what vLLM's files hold now.
    """

    def __init__(
        self, used: StoredWeights | None, prefixes: tuple[str, ...], opened: Callable[[], Tower | Bundle]
    ) -> None:
        self._used = used if used is not None and used.unchanged() else None
        self._prefixes, self._opened = prefixes, opened
        self.any_given = False  # whether vLLM was given a vision tensor
        self._differing: list[str] = []
        self._new: tuple[Tower | Bundle, StoredWeights] | None = None
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
        self._differing.append(below)
        if self._problem is not None:
            return
        try:
            if self._new is None:
                source = self._opened()
                self._new = source, StoredWeights(source, self._prefixes)
            if not self._new[1].holds(below, weight):
                self._problem = f"{name!r} has other values there"
        except (ArtifactError, ConfigurationError) as error:
            self._problem = error.message

    @property
    def nothing_new(self) -> bool:
        return not self._differing

    def replacement(self) -> Tower | Bundle:
        """The source in vLLM's files whose weights are exactly those that vLLM was given; refused if there is none."""
        problem = self._problem
        if problem is None and self._new is not None:
            source, new = self._new
            odd = new.unlike(self._used, self._differing)
            if odd is None:
                return source
            problem = f"{odd!r} was not given, and has other values there"
        raise ConfigurationError(
            f"vLLM was given new weights for the vision encoder, such as {self._differing[0]!r}, which cannot take "
            f"them: they are not those in the files that vLLM reads ({problem}).",
            hint=_HINT,
        )


def source_digest(source: Tower | Bundle) -> str:
    """Digest of an encoder's weights."""
    return source.manifest.weights_digest if isinstance(source, Bundle) else tower_digest(source)
