"""An open model behind visionaccel's contract, and the ONNX graphs that run on the host around its part of a program.

The core runs most host parts itself; those that it does not support are graphs for ONNX Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from visionaccel.backends import Capabilities, Session
from visionaccel.core.arrays import Array
from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.cores import thread_limit
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.program import DEVICE_TENSORS, HOST_AFTER, HOST_BEFORE, Program
from visionaccel.errors import ArtifactError, ConfigurationError, DeviceError, OutputError
from visionaccel_flexmlrt.runtime import simulator_faults


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
    """Return the device's inputs and outputs; None if they are the program's.

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


class FlexMLRTSession(Session):
    """One model of FlexMLRT.

    Args:
        model: The compiled module's `Model`.
        failure: The module's exception.
        inputs: The device's inputs in the model's order, by the names in `run`; likewise the outputs.
        host: Graphs that run on the host around the device's part; None if the core runs the host's part.
        script: The simulator's faults in this session's calls, if any.
    """

    def __init__(
        self,
        model: Any,
        failure: type[Exception],
        capabilities: Capabilities,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        host: HostGraphs | None,
        script: Path | None = None,
    ) -> None:
        self.capabilities, self._script = capabilities, script
        self._model, self._failure = model, failure
        self._inputs, self._outputs, self._host = inputs, outputs, host

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._host is None:
            return self._on_device(inputs)
        return self._host.after(self._on_device(self._host.before(inputs)), inputs)

    def close(self) -> None:
        self._model.close()

    def _on_device(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        given = [np.ascontiguousarray(inputs[spec.name]) for spec in self._inputs]
        try:
            with simulator_faults(self._script):
                arrays = self._model.run(given)
        except (self._failure, UnicodeDecodeError) as error:  # its text may quote bytes of the artifact
            raise DeviceError(
                f"{self.capabilities.device}: {error}",
                hint="Run `visionaccel doctor`; the kernel's log (dmesg) may say more about the device.",
            ) from error
        found = {spec.name: array for spec, array in zip(self._outputs, arrays, strict=True)}
        for name, array in found.items():
            check_written(self.capabilities.device, name, array)
        return found


def check_written(device: str, name: str, array: NDArray[Any]) -> None:
    """Refuse an output that the device did not write, or set to zero: an aborted run can cause both.

    Only the ends of each row are checked unless one is suspicious; the encoder later checks everything for NaN.

    The array [rows, ...] is C-contiguous and was passed to the device with all bits set, which is NaN. Integers may
    have any value and are not checked.

    Raises:
        OutputError: If rows were not written, or contain nothing but zeros.
    """
    if array.dtype.name not in FLOATS or not array.ndim:
        return
    bits = array.reshape(len(array), -1).view(np.dtype(f"u{array.itemsize}"))
    ends = bits[:, [0, -1]]
    poison = np.iinfo(bits.dtype).max
    if not ((ends == poison) | (ends == 0)).any():
        return
    hint = "The device aborted the run; see the kernel's log (dmesg), and amdxdna's timeout_in_sec for long encodes."
    unwritten = (bits == poison).any(axis=1)
    if unwritten.any():
        raise OutputError(f"{device} left {int(unwritten.sum())} of {len(bits)} rows of {name!r} unwritten.", hint=hint)
    cleared = (bits == 0).all(axis=1)
    if cleared.any():
        raise OutputError(
            f"{device} returned zeros in {int(cleared.sum())} of {len(bits)} rows of {name!r}.", hint=hint
        )
