"""An open model behind visionaccel's contract: names, contiguity, and what the device failed to write."""

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
        failure: Its exception.
        inputs: The device's inputs in the model's order, by the names that `run` gets; likewise the outputs.
        host: Graphs that run on the host around the device's; None where the core does the host's part.
        script: What the simulator does wrong in this session's calls, if anything.
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
        # No copy of what is contiguous already.
        given = [np.ascontiguousarray(inputs[spec.name]) for spec in self._inputs]
        try:
            with simulator_faults(self._script):
                arrays = self._model.run(given)
        except (self._failure, UnicodeDecodeError) as error:  # its text may quote bytes of the artifact
            raise DeviceError(
                f"{self.capabilities.device}: {error}",
                hint="Run `visionaccel doctor`; the kernel's log (dmesg) may say more of the device.",
            ) from error
        found = {spec.name: array for spec, array in zip(self._outputs, arrays, strict=True)}
        for name, array in found.items():
            check_written(self.capabilities.device, name, array)
        return found


def check_written(device: str, name: str, array: NDArray[Any]) -> None:
    """Refuse an output that the device did not write, or cleared: aborted runs leave both.

    Only the ends of each row are looked at unless one is suspicious; the encoder looks for NaN everywhere later.

    The array [rows, ...] is C-contiguous and was handed to the device with all bits set, which is NaN. Integers may
    hold anything and are not looked at.

    Raises:
        OutputError: If rows were left as they were, or hold nothing but zeros.
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
