"""The contract between the core and a backend plug-in.

A backend answers whether it can run a program here (`probe`) and opens it on a device (`open`). The core does the rest:
it checks patches and grids, makes the host-side tables, serialises calls, checks outputs, measures, and falls back.
A plug-in subclasses `VisionBackend` and `Session` and implements the hook `visionaccel_backends`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from visionaccel.core.arrays import Array
from visionaccel.core.program import Program
from visionaccel.errors import ConfigurationError

__all__ = [
    "Accepted", "CallParts", "Capabilities", "Finding", "Isolation", "Options", "QuantizedModel", "Rejected",
    "Session", "Status", "Verdict", "VisionBackend", "call_parts", "watch_parts",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Accepted:
    """The backend can run the program on that device.

    Attributes:
        score: How good a choice it is for `auto`: 10 a plain reference, 50 an optimised CPU or GPU runtime, 100 a
            dedicated accelerator. The highest wins, then the first by name.
        notes: What the user should know, such as the execution provider that will be used.
    """

    score: int
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The backend cannot run the program on that device.

    Attributes:
        reason: What is missing or does not fit.
        hint: What to do about it.
    """

    reason: str
    hint: str


Verdict: TypeAlias = Accepted | Rejected

Isolation: TypeAlias = Literal["process", "none"]
"""Where a session lives: in a separate child process with a deadline and a supervisor, or in the caller's process."""

Status: TypeAlias = Literal["pass", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `visionaccel doctor` checked.

    Attributes:
        name: What was checked, in a few words.
        status: The result; with a warning the backend still runs.
        detail: What was found.
        fix: What to do about it; empty for `pass`.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A quantized program as a backend wrote it.

    Attributes:
        format: Its program format.
        model: The file to open.
        method: What was done, in one line, for the manifest.
        companions: Further files that it needs, by their role.
        tools: Distributions whose releases the manifest states, in addition to the backend's own.
    """

    format: str
    model: Path
    method: str
    companions: Mapping[str, Path] = field(default_factory=dict)
    tools: tuple[str, ...] = ()


class Options(BaseModel):
    """Base of a backend's options: frozen, and unknown names are refused. Describe each field; the CLI prints it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an open session is and how it may be called.

    Attributes:
        device: What it runs on, such as `cpu` or `cuda:0`; reported to users.
        precision: Arithmetic of the matrix products, such as `float32` or `bfloat16`.
        deterministic: The same inputs give the same bits.
        thread_safe: `run` may be called from several threads at once. Otherwise the core makes one call at a time.
        max_in_flight: How many calls an encode service keeps in progress at once; 1 unless `thread_safe`.
        batch_patches: Has no effect: the encode service encodes each item in a separate call.
        takes_tensors: `run` takes torch tensors of any device and may return tensors; otherwise every input is a
            C-contiguous numpy array on the host.
        simulated: The device is a simulator; every report says so.
        hardware: The device's model, such as `NVIDIA H200`, where devices of one kind may compute different numbers;
            empty where the kind decides them.
        emulated: The device has no instructions for the precision, so it is slower; the log and the benchmarks say so.
    """

    device: str
    precision: str
    deterministic: bool = True
    thread_safe: bool = False
    max_in_flight: int = 1
    batch_patches: int = 0
    takes_tensors: bool = False
    simulated: bool = False
    hardware: str = ""
    emulated: bool = False


class Session(ABC):
    """An open program on a device.

    The core calls `run` from any thread that encodes, one call at a time unless `capabilities.thread_safe`.
    """

    capabilities: Capabilities

    @property
    def restarts(self) -> int:
        """How often the device was restarted after it was lost. The core checks it again after each restart."""
        return 0

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the program once.

        Args:
            inputs: One array for each of `Program.inputs`, with the dtypes and shapes declared there. They belong to
                the caller: do not write to them, and copy what outlives the call.

        Returns:
            One array for each of `Program.outputs`. They belong to the caller: never return a buffer that a later call
            writes to.

        Raises:
            DeviceError: If the device failed; any other exception is reported as one. Later calls must work, or fail
                too.
        """

    def end_calls(self) -> bool:
        """End the calls in progress at once; they raise a DeviceError. Called from any thread.

        Returns:
            Whether they end; otherwise the core abandons them.
        """
        return False

    def begin_close(self) -> None:  # noqa: B027 - most sessions have nothing to begin
        """Begin to give back the device, without waiting; `close` follows. The sessions of an encoder end together."""

    @abstractmethod
    def close(self) -> None:
        """Give back the device. Called once, when no `run` is in progress."""


class VisionBackend(ABC):
    """A way to run encoder programs. Each process that needs it makes one instance; keep the constructor empty.

    Attributes:
        name: What users select; equal to the name of the entry point.
        formats: Program formats it takes, such as `onnx` or `checkpoint` (see `visionaccel.core.program`).
        formats_with_weights: Those whose programs bring their weights. For other formats the core copies the tower's
            weights to memory, where changes of the files do not reach them.
        options: The options that `open` takes.
        isolation: Where its sessions live by default (see `isolation_on`). Choose `process` for vendor code that may
            crash, hang, or hold one model for each process.
        only_by_name: `auto` never takes it. For simulators.
    """

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    formats_with_weights: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[type[Options]] = Options
    isolation: ClassVar[Isolation] = "none"
    only_by_name: ClassVar[bool] = False

    def devices(self) -> Sequence[str]:
        """Devices of this machine that the backend could use, for display; must not allocate one."""
        return ("cpu",)

    def isolation_on(self, device: str | None) -> Isolation:  # noqa: ARG002
        """Where sessions on a device live by default; the same on every device unless overridden."""
        return self.isolation

    def formats_on(self, device: str | None) -> frozenset[str]:  # noqa: ARG002
        """Program formats it takes on a device, a subset of `formats`; all of them unless overridden."""
        return self.formats

    def kind_of(self, device: str | None) -> str:
        """The kind of a device as `Program.device` names it; by default what is before its colon."""
        return (device or "").partition(":")[0]

    def checks(self, programs: Sequence[Program]) -> Sequence[Finding]:  # noqa: ARG002
        """What `visionaccel doctor` reports of this machine for this backend: drivers, libraries, settings.

        Must allocate no device and end within seconds, even if something is broken or missing.

        Args:
            programs: Programs in this backend's formats that the user named, to check too.
        """
        return ()

    def quantize(
        self,
        program: Program,
        calibration: Iterable[Mapping[str, Array]],  # noqa: ARG002
        folder: Path,  # noqa: ARG002
    ) -> QuantizedModel:
        """Make a program whose products are of int8, with the same inputs and outputs. Optional.

        Called by `visionaccel quantize`, for one program at a time. The core compares the result with the float32
        reference, and discards it if it is not good enough.

        Args:
            program: A float32 program in one of `formats`.
            calibration: Inputs of real images, as `Session.run` takes them. May be iterated several times; each
                iteration makes the arrays again.
            folder: An existing folder to write to, under names that start with the program's; it holds files of other
                programs too. The result may refer to weights of the program by name where its format does.

        Raises:
            ConfigurationError: If this backend does not quantize, or not such a program.
            ArtifactError: If the program's files are broken.
        """
        raise ConfigurationError(
            f"backend {self.name!r} does not quantize program {program.name!r}.", hint="Name another target."
        )

    @abstractmethod
    def probe(self, program: Program, device: str | None) -> Verdict:
        """Whether this backend can run `program` on `device` (None: its default), without allocating or loading.

        Called for each program of the encoder, but not for those made for another kind of device. Of the accepted
        programs, the first for each coverage is opened. A refusal is a value, not an exception: `visionaccel explain`
        prints its reason and hint.
        """

    @abstractmethod
    def open(self, program: Program, device: str | None, options: Any) -> Session:
        """Open an accepted program.

        The calling thread is pinned to the encoder's cores, here as in `probe` and `Session.run`, and its threads
        inherit them. A pool that counts or binds cores by itself takes its size from
        `visionaccel.core.cores.thread_limit`.

        Args:
            program: What to run.
            device: The device that was probed.
            options: A validated instance of this class's `options`.

        Raises:
            DeviceError: If the device refuses or fails.
            ArtifactError: If the program's files are broken.
        """


@dataclass(slots=True)
class CallParts:
    """Parts of the calls of one encode, in seconds; sessions add to them.

    Attributes:
        transfer_in: Bringing inputs to the device, or into its process.
        transfer_out: Bringing outputs back.
    """

    transfer_in: float = 0.0
    transfer_out: float = 0.0


_parts: ContextVar[CallParts | None] = ContextVar("visionaccel_call_parts", default=None)


def call_parts() -> CallParts | None:
    """Where a session adds, in `run`, the seconds of its transfers; None if they are not measured."""
    return _parts.get()


@contextmanager
def watch_parts() -> Iterator[CallParts]:
    """Measure the transfers of the calls that this thread makes."""
    parts = CallParts()
    token = _parts.set(parts)
    try:
        yield parts
    finally:
        _parts.reset(token)
