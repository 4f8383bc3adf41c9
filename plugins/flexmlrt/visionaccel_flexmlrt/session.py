"""An open model behind visionaccel's contract: names, contiguity, and a check that the device wrote its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import Capabilities, Session
from visionaccel.core.arrays import Array
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.dtypes import FLOATS
from visionaccel.errors import DeviceError, OutputError
from visionaccel_flexmlrt.host_graphs import HostGraphs
from visionaccel_flexmlrt.runtime import simulator_faults


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
