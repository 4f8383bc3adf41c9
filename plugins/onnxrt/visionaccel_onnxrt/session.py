"""An open inference session behind visionaccel's contract."""

from collections.abc import Mapping, Sequence
from typing import Any

from visionaccel.backends import Capabilities, Session
from visionaccel.core.arrays import Array
from visionaccel.core.program import Program

__all__ = ["OnnxRuntimeSession"]


class OnnxRuntimeSession(Session):
    """One ONNX Runtime inference session. Inputs and outputs are host arrays; outputs are fresh with every call.

    Args:
        session: The inference session.
        weights: What it reads its weights from, and does not keep alive.
        program: What it runs.
        capabilities: Those of the session.
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
