"""Host parts that the core does not run itself: ONNX graphs before and after the device's part, on ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from visionaccel.core.arrays import Array
from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.cores import thread_limit
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.program import DEVICE_TENSORS, HOST_AFTER, HOST_BEFORE, Program
from visionaccel.errors import ArtifactError, ConfigurationError


class _Tensor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    dtype: str
    shape: tuple[int, ...]


class _Tensors(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]


def device_tensors(program: Program) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] | None:
    """The device's inputs and outputs; None if they are the program's.

    Raises:
        ArtifactError: If the companion that lists them is damaged.
    """
    path = program.companions.get(DEVICE_TENSORS)
    if path is None:
        return None
    try:
        listed = _Tensors.model_validate(json.loads(read_bounded(path)))
    except (OSError, ValueError, ValidationError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {problems_of(error)}", hint="Import the artifact again."
        ) from error
    inputs, outputs = (tuple(TensorSpec(t.name, t.dtype, t.shape) for t in s) for s in (listed.inputs, listed.outputs))
    return inputs, outputs


class HostGraphs:
    """The graphs before and after the device's part; either may be missing.

    Raises:
        ConfigurationError: If ONNX Runtime is not installed.
        ArtifactError: If a graph cannot be loaded.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._before = self._session(program.companions.get(HOST_BEFORE))
        self._after = self._session(program.companions.get(HOST_AFTER))

    def before(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Compute the device's inputs from the program's."""
        named = {self._stored(name): array for name, array in inputs.items()}
        return named if self._before is None else _run(self._before, named)

    def after(self, outputs: Mapping[str, Array], inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Compute the program's outputs from the device's; the graph may also read the program's inputs."""
        named = {**{self._stored(name): array for name, array in inputs.items()}, **outputs}
        found = named if self._after is None else _run(self._after, named)
        return {spec.name: found[self._stored(spec.name)] for spec in self._program.outputs}

    def _stored(self, name: str) -> str:
        return self._program.stored_names.get(name, name)

    @staticmethod
    def _session(path: Path | None) -> Any:
        if path is None:
            return None
        try:
            import onnxruntime
        except ImportError as error:
            what = "the host's part of this artifact"
            raise ConfigurationError.missing_extra(what, "onnxruntime", "visionaccel-flexmlrt[onnxrt]") from error
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = thread_limit() or 0  # 0: its default
        try:
            return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise ArtifactError(f"{path} cannot be loaded: {error}", hint="Import the artifact again.") from error


def _run(session: Any, named: Mapping[str, Array]) -> Mapping[str, Array]:
    names = [output.name for output in session.get_outputs()]
    fed = {wanted.name: named[wanted.name] for wanted in session.get_inputs()}
    return dict(zip(names, session.run(names, fed), strict=True))
