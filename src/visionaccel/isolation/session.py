"""A session whose device lives in a child process."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import Any

from visionaccel.backends import Session
from visionaccel.core.arrays import Array
from visionaccel.core.program import Program
from visionaccel.errors import ConfigurationError, VisionAccelError
from visionaccel.isolation.messages import OpenRequest, packed
from visionaccel.isolation.supervisor import Limits, Supervisor


class IsolatedSession(Session):
    """Runs a program in a child process; what aborts, hangs or kills that process costs the call in flight.

    A new process is started at once, in the background. If that one is lost too before a call succeeded, the next is
    started after a delay, which doubles with each further loss. While a process is starting, calls wait for it, until
    the time of one call has passed since its start; during a delay they fail at once, so that a fallback can take over.

    The child finds the backend as this process does, by its entry point. The program must have been accepted by it, and
    the options must be valid. The capabilities are those of the child's session, but never thread-safe or with tensors.

    Raises:
        VisionAccelError: What the backend raised when it opened the program, of the same type.
        DeviceLostError: If its process died or hung while it opened; none is left.
        ConfigurationError: If the program cannot be sent to another process, or there can be none here.
    """

    def __init__(
        self,
        backend: str,
        program: Program,
        device: str | None,
        options: Mapping[str, Any],
        *,
        limits: Limits | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise ConfigurationError(
                "devices run in child processes only on Linux.", hint="Set VISIONACCEL_ISOLATION=none."
            )
        try:
            request = packed(OpenRequest(backend, program, device, dict(options)))
        except VisionAccelError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"program {program.name!r} cannot be sent to another process: {type(error).__name__}: {error}",
                hint="Set VISIONACCEL_ISOLATION=none.",
            ) from error
        self._supervisor = Supervisor(backend, request, limits or Limits())
        self.capabilities = self._supervisor.start()
        # A session that is dropped, or left open at the end of the program, must not keep the device.
        self._finalizer = weakref.finalize(self, self._supervisor.close)

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while there is none that takes calls."""
        return self._supervisor.pid

    @property
    def restarts(self) -> int:
        """How often a new child took the place of a lost one."""
        return self._supervisor.restarts

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the program once, in the child, on copies of the inputs; the outputs are fresh numpy arrays.

        Raises:
            VisionAccelError: What the session raised; anything else than that as a DeviceError. The child lives on.
            DeviceLostError: If the child died during the call, did not answer in time and was killed, or there is none.
        """
        return self._supervisor.run(inputs)

    def end_calls(self) -> bool:
        """End the child at once: a call in progress raises DeviceLostError, and another child is started."""
        return self._supervisor.end_call()

    def begin_close(self) -> None:
        """Ask the child to end; at once if a call is in progress, which then raises DeviceLostError."""
        self._supervisor.begin_close()

    def close(self) -> None:
        """End the child: politely, or at once if a call is in progress, which then raises DeviceLostError."""
        self._finalizer()
