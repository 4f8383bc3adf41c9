"""A compiled OpenVINO model behind visionaccel's contract."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino

from visionaccel.backends import Capabilities, Session
from visionaccel.core.arrays import Array
from visionaccel.core.program import Program
from visionaccel.errors import DeviceError
from visionaccel_openvino.model import Mapped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pool:
    """The idle requests of a compiled model, and the weights that they read."""

    mapped: Mapped
    free: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


class OpenVinoSession(Session):
    """A compiled model and its infer requests. The device reads the caller's arrays and writes to the returned ones.

    After a failed request, for example one that ran out of memory, all later calls of the model may fail or be wrong.
    So it is compiled again for the next call.

    Args:
        make: Reads the model and compiles it for its device; called at once, and after a failure. The weights are kept,
            since a device may read some of them in each call.
        program: The program that is compiled.
        capabilities: The session's; it has an infer request for each call in flight.
    """

    def __init__(
        self, make: Callable[[], tuple[openvino.CompiledModel, Mapped]], program: Program, capabilities: Capabilities
    ) -> None:
        self.capabilities = capabilities
        self._program = program
        compiled, mapped = make()
        read = {name for port in compiled.inputs for name in port.names}  # OpenVINO leaves out unused inputs
        stored = {spec.name: program.stored_names.get(spec.name, spec.name) for spec in program.inputs}
        self._inputs = {name: inner for name, inner in stored.items() if inner in read}
        self._names = {spec.name: program.stored_names.get(spec.name, spec.name) for spec in program.outputs}
        self._make: Callable[[], tuple[openvino.CompiledModel, Mapped]] | None = make
        self._lock = threading.Lock()
        self._pool: _Pool | None = self._pool_of(compiled, mapped)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with self._lock:
            assert self._make is not None, "not called after close"
            if self._pool is None:
                self._pool = self._pool_of(*self._make())
            pool = self._pool
        request = pool.free.get()
        try:
            return self._run(request, inputs, pool)
        finally:
            pool.free.put(request)

    def _pool_of(self, compiled: openvino.CompiledModel, mapped: Mapped) -> _Pool:
        pool = _Pool(mapped)
        for _ in range(self.capabilities.max_in_flight):
            pool.free.put(compiled.create_infer_request())
        return pool

    def _run(self, request: Any, inputs: Mapping[str, Array], pool: _Pool) -> Mapping[str, Array]:
        sizes: dict[str, int] = {}
        for spec in self._program.inputs:
            array = inputs[spec.name]
            sizes |= {name: size for name, size in zip(spec.shape, array.shape, strict=True) if isinstance(name, str)}
            if spec.name in self._inputs:
                request.set_tensor(self._inputs[spec.name], _shared(array))
        outputs: dict[str, Array] = {}
        for spec in self._program.outputs:
            if any(isinstance(size, str) and size not in sizes for size in spec.shape):
                continue  # its size does not depend on those of the inputs
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            outputs[spec.name] = np.empty(shape, spec.dtype)
            request.set_tensor(self._names[spec.name], _shared(outputs[spec.name]))
        # Neither start_async nor infer holds the interpreter's lock; start_async runs in OpenVINO's threads.
        try:
            request.start_async()
            request.wait()
        except RuntimeError:
            logger.warning("An OpenVINO call failed. The program will be compiled again for the next call.")
            with self._lock:
                if self._pool is pool:
                    self._pool = None
            raise
        for name, stored in self._names.items():
            if name not in outputs:
                outputs[name] = request.get_tensor(stored).data.copy()  # the request reuses its memory
                continue
            # A request that reallocates its output does not write to this one.
            if request.get_tensor(stored).data.ctypes.data != outputs[name].ctypes.data:
                raise DeviceError(
                    f"OpenVINO returned {name!r} with shape {list(request.get_tensor(stored).shape)}, not "
                    f"{list(outputs[name].shape)}.",
                    hint="The program does not fit the checkpoint; export it again.",
                )
        return outputs

    def close(self) -> None:
        self._pool = self._make = None


def _shared(array: Array) -> openvino.Tensor:
    """Return a tensor in the memory of an array; with an explicit type, OpenVINO accepts a read-only one."""
    return openvino.Tensor(array, list(array.shape), _TYPES[array.dtype.name])


_TYPES = {"float32": openvino.Type.f32, "int64": openvino.Type.i64, "int32": openvino.Type.i32}
