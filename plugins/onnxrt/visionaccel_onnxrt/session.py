"""An open inference session behind visionaccel's contract: its settings, its weights and its calls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionaccel.backends import Capabilities, Session
from visionaccel.core.arrays import Array
from visionaccel.core.program import Program


class OnnxRuntimeSession(Session):
    """One ONNX Runtime inference session. Inputs and outputs are host arrays; each call returns new outputs.

    Args:
        session: The inference session.
        weights: The memory of its weights, which the inference session does not keep alive.
    """

    def __init__(self, session: Any, weights: Sequence[Any], program: Program, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._session: Any = session
        self._weights = weights
        self._stored = program.stored_names
        self._outputs = [spec.name for spec in program.outputs]

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        feed = {self._stored.get(name, name): array for name, array in inputs.items()}
        found = self._session.run([self._stored.get(name, name) for name in self._outputs], feed)
        return dict(zip(self._outputs, found, strict=True))

    def close(self) -> None:
        self._session = None
        self._weights = ()


EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CAST_CHAIN_ELIMINATION = "optimization.enable_cast_chain_elimination"
SPINNING = "session.intra_op.allow_spinning"
UNPACKED = "session.disable_prepacking"
INT8_IN_FULL = "session.x64quantprecision"
"""On x86 without VNNI, use slower kernels for int8 products, which do not cut sums off at 16 bits."""

ERRORS_ONLY = 3
"""The log level."""


def bind_weights(model: bytes, folder: Path, settings: Any) -> list[Any]:
    """Add the external weights of a model to the options of the session that will run it, as mapped memory.

    ONNX Runtime opens external data only by paths below the model's folder; a model in memory has no such path.

    Args:
        model: A serialized ONNX model.
        folder: The folder that the locations of its external data are relative to.
        settings: The session's options.

    Returns:
        Objects that must live as long as the session.

    Raises:
        ArtifactError: If the model or a weight cannot be read.
    """
    import onnxruntime

    from visionaccel.backends.onnx_weights import mapped_weights  # which imports onnx

    weights = mapped_weights(model, folder)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(*weight) for weight in weights.values()]
    settings.add_external_initializers(list(weights), values)
    return values
