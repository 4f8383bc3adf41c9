"""A compiled OpenVINO model behind visionaccel's contract."""

import queue
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino

from visionaccel.arrays import Array
from visionaccel.backends import Capabilities, Session
from visionaccel.errors import DeviceError
from visionaccel.program import Program
from visionaccel_openvino.model import Mapped

__all__ = ["OpenVinoSession"]


class OpenVinoSession(Session):
    """A compiled model and its infer requests. The device reads the caller's arrays and writes the answer's in place.

    Args:
        compiled: The model on its device.
        program: What was compiled.
        capabilities: Those of the session; it has an infer request for each call in flight.
        mapped: The weights that the model was made of. A device may read some of them from there in each call.
    """

    def __init__(
        self, compiled: openvino.CompiledModel, program: Program, capabilities: Capabilities, mapped: Mapped
    ) -> None:
        self.capabilities = capabilities
        self._program, self._mapped = program, mapped
        read = {name for port in compiled.inputs for name in port.names}  # what nothing reads, OpenVINO leaves out
        stored = {spec.name: program.stored_names.get(spec.name, spec.name) for spec in program.inputs}
        self._inputs = {name: inner for name, inner in stored.items() if inner in read}
        self._names = {spec.name: program.stored_names.get(spec.name, spec.name) for spec in program.outputs}
        self._free: queue.SimpleQueue[Any] | None = queue.SimpleQueue()
        for _ in range(capabilities.max_in_flight):
            self._free.put(compiled.create_infer_request())

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        free = self._free
        assert free is not None, "not called after close"
        request = free.get()
        try:
            return self._run(request, inputs)
        finally:
            free.put(request)

    def _run(self, request: Any, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        sizes: dict[str, int] = {}
        for spec in self._program.inputs:
            array = inputs[spec.name]
            sizes |= {name: size for name, size in zip(spec.shape, array.shape, strict=True) if isinstance(name, str)}
            if spec.name in self._inputs:
                request.set_tensor(self._inputs[spec.name], _shared(array))
        outputs: dict[str, Array] = {}
        for spec in self._program.outputs:
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            outputs[spec.name] = np.empty(shape, spec.dtype)
            request.set_tensor(self._names[spec.name], _shared(outputs[spec.name]))
        # start_async rather than infer: neither holds the interpreter's lock, and this one runs in OpenVINO's threads.
        request.start_async()
        request.wait()
        for name, stored in self._names.items():
            # A request that had to reallocate its output would leave this one as it came.
            if request.get_tensor(stored).data.ctypes.data != outputs[name].ctypes.data:
                raise DeviceError(
                    f"OpenVINO returned {name!r} as {list(request.get_tensor(stored).shape)} and not as "
                    f"{list(outputs[name].shape)}.",
                    hint="The program does not fit the checkpoint; export it again.",
                )
        return outputs

    def close(self) -> None:
        self._free = None
        self._mapped = []


def _shared(array: Array) -> openvino.Tensor:
    """The memory of an array as a tensor; given a type, OpenVINO takes one that may not be written to."""
    return openvino.Tensor(array, list(array.shape), _TYPES[array.dtype.name])


_TYPES = {"float32": openvino.Type.f32, "int64": openvino.Type.i64, "int32": openvino.Type.i32}
