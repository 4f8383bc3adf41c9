"""The contract between the core and a backend plug-in.

A backend says whether it can run a program on this machine (`probe`) and opens the program on a device (`open`). The
core does the rest: it checks patches and grids, makes the host-side tables, serialises calls, checks outputs, measures
times, and falls back. A plug-in subclasses `VisionBackend` and `Session` and implements `visionaccel_backends`, a hook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from visionaccel.core.arrays import Array
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.program import Program
from visionaccel.errors import ConfigurationError, SettingsError


@dataclass(frozen=True, slots=True)
class Accepted:
    """The backend can run the program on that device.

    Attributes:
        score: Preference for `auto`: 10 for a plain reference, 50 for an optimised CPU or GPU runtime, 100 for a
            dedicated accelerator. The highest score wins, then the first backend by name.
        notes: What the user should know, such as the execution provider that will be used.
    """

    score: int
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The backend cannot run the program on that device. Both texts are shown to users and must be full sentences.

    Attributes:
        reason: What is missing or does not fit.
        hint: What to do about it.
    """

    reason: str
    hint: str


Verdict: TypeAlias = Accepted | Rejected

Isolation: TypeAlias = Literal["process", "none"]
"""Where a session runs: in a supervised child process with a deadline, or in the caller's process."""

Status: TypeAlias = Literal["pass", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check of `visionaccel doctor`.

    Attributes:
        name: What was checked, in a few words.
        status: The result; after a `warning` the backend still runs.
        detail: What was found.
        fix: What to do about it; empty for `pass`.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """The files of a quantized program, as `VisionBackend.quantize` wrote them.

    Attributes:
        format: The program's format.
        model: The file to open, in the folder that `quantize` was given.
        method: How it was quantized, in one line, for the manifest.
        companions: Further files in that folder that the program needs, by their role.
        tools: Names of distributions whose versions the manifest records, in addition to the backend's own.
    """

    format: str
    model: Path
    method: str
    companions: Mapping[str, Path] = field(default_factory=dict)
    tools: tuple[str, ...] = ()


class Options(BaseModel):
    """Base class of a backend's options: frozen; unknown names are refused. The CLI prints each field's description."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Describes an open session and how the core may call it.

    Attributes:
        device: The device that it runs on, such as `cpu` or `cuda:0`; shown to users.
        precision: Arithmetic of the matrix products, such as `float32` or `bfloat16`.
        deterministic: Whether equal inputs give bitwise equal outputs.
        thread_safe: Whether `run` may be called from several threads at once. Otherwise the core makes one call at a
            time.
        max_in_flight: How many calls an encode service keeps in progress at once; 1 unless `thread_safe`.
        batch_patches: Has no effect: the encode service encodes each item in a separate call.
        takes_tensors: Whether `run` accepts torch tensors on any device and may return tensors. Otherwise every input
            is a C-contiguous numpy array on the host.
        simulated: Whether the device is a simulator; every report says so.
        hardware: The device's model, such as `NVIDIA H200`, if models of this kind of device may compute different
            numbers; otherwise empty.
        emulated: Whether the device lacks instructions for the precision and is slower for it; the log and the
            benchmarks say so.
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

    Attributes:
        capabilities: Set this before `VisionBackend.open` returns; it must not change afterwards.
    """

    capabilities: Capabilities

    @property
    def restarts(self) -> int:
        """How often the device was restarted after it was lost. After each restart the core checks the device again."""
        return 0

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the program once.

        Args:
            inputs: One array for each of `Program.inputs`, by name, with the dtype and shape declared there; a size
                that is a name there varies between calls. The caller owns them: do not write to them, and copy what
                must outlive the call.

        Returns:
            One array for each of `Program.outputs`, by name, with the dtype and shape declared there. The caller owns
            them: never return a buffer that a later call writes to.

        Raises:
            DeviceError: If the device failed; any other exception is reported as one. After that, later calls must
                either work or raise too.
        """

    def end_calls(self) -> bool:
        """Stop the calls in progress, which then raise DeviceError. Called from any thread when a deadline has passed.

        Return whether the calls will end. If not, the core abandons them.
        """
        return False

    def begin_close(self) -> None:  # noqa: B027 - most sessions have nothing to begin
        """Start to release the device, and do not wait; `close` follows. So an encoder's sessions close in parallel."""

    @abstractmethod
    def close(self) -> None:
        """Release the device. Called once, from any thread, when no `run` is in progress."""


class VisionBackend(ABC):
    """Runs encoder programs. The core makes one instance, without arguments, in each process that needs it.

    Keep the constructor empty. All methods are called from any thread.

    Attributes:
        name: The name that users select; equal to the name of the entry point.
        formats: Program formats that it runs, such as `onnx` or `checkpoint` (see `visionaccel.core.program`).
        formats_with_weights: Those of `formats` whose programs contain their weights. For other formats the core copies
            the tower's weights into memory, so that later changes of the files have no effect.
        options: The class of the options that `open` receives.
        isolation: Where its sessions run by default (see `isolation_on`). Choose `process` for vendor code that may
            crash or hang, or that holds only one model per process.
        only_by_name: Whether `auto` ignores it. For simulators.
    """

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    formats_with_weights: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[type[Options]] = Options
    isolation: ClassVar[Isolation] = "none"
    only_by_name: ClassVar[bool] = False

    def devices(self) -> Sequence[str]:
        """List the devices of this machine that the backend could use, for display. Must not allocate a device."""
        return ("cpu",)

    def isolation_on(self, device: str | None) -> Isolation:  # noqa: ARG002
        """Return where sessions on a device run by default: `isolation` on every device, unless overridden."""
        return self.isolation

    def formats_on(self, device: str | None) -> frozenset[str]:  # noqa: ARG002
        """Return the program formats that it runs on a device, a subset of `formats`; all of them unless overridden."""
        return self.formats

    def kind_of(self, device: str | None) -> str:
        """Return the kind of a device, as in `Program.device`: by default the part before the colon."""
        return (device or "").partition(":")[0]

    def checks(self, programs: Sequence[Program]) -> Sequence[Finding]:  # noqa: ARG002
        """Check drivers, libraries and settings of this machine for `visionaccel doctor`.

        Must not allocate a device, and must end within seconds even if something is broken or missing.

        Args:
            programs: Programs in this backend's formats that the user passed, to check as well.
        """
        return ()

    def quantize(
        self,
        program: Program,
        calibration: Iterable[Mapping[str, Array]],  # noqa: ARG002
        folder: Path,  # noqa: ARG002
    ) -> QuantizedModel:
        """Write a program with int8 matrix products and the same inputs and outputs. Optional.

        Called by `visionaccel quantize`, for one program at a time. The core compares the result with the float32
        reference, and discards it if it is not accurate enough.

        Args:
            program: A float32 program in one of `formats`.
            calibration: Inputs from real images, as numpy arrays as `Session.run` receives them. May be iterated
                several times; each iteration makes the arrays again.
            folder: An existing folder to write to. It also holds files of other programs, so start each file name with
                the program's name. The result may refer to the program's weights by name if its format does.

        Raises:
            ConfigurationError: If this backend cannot quantize, or cannot quantize this program.
            ArtifactError: If the program's files are broken.
        """
        raise ConfigurationError(
            f"backend {self.name!r} cannot quantize program {program.name!r}.", hint="Choose a different target."
        )

    @abstractmethod
    def probe(self, program: Program, device: str | None) -> Verdict:
        """Say whether this backend can run `program` on `device` (None: its default), without allocating or loading.

        Called for each program of the encoder in `formats_on(device)`, except those made for another kind of device. Of
        the accepted programs, the first for each coverage is opened. Return `Rejected` instead of raising:
        `visionaccel explain` prints its reason and hint. An exception counts as a refusal by a defective plug-in.
        """

    @abstractmethod
    def open(self, program: Program, device: str | None, options: Any) -> Session:
        """Open a program that `probe` accepted.

        The calling thread is pinned to the encoder's cores, as in `probe` and `Session.run`, and threads that it starts
        inherit them. A thread pool that counts or binds cores by itself must take its size from
        `visionaccel.core.cores.thread_limit`.

        Args:
            program: The program to run.
            device: The device that was passed to `probe`; None for the default.
            options: A validated instance of this class's `options`.

        Raises:
            DeviceError: If the device refuses or fails; any other exception is reported as one.
            ArtifactError: If the program's files are broken.
        """


def checked_options(backend: VisionBackend, options: Mapping[str, Any]) -> Options:
    """Validate options by name; SettingsError, whose hint lists the names, if the backend does not take them."""
    if not isinstance(options, Mapping):
        raise SettingsError(
            f"options of a backend are a {type(options).__name__}, not a mapping.",
            hint="Pass them by name, such as options={'threads': 1}.",
        )
    try:
        return backend.options.model_validate(dict(options))
    except ValidationError as error:
        known = ", ".join(backend.options.model_fields) or "none"
        raise SettingsError(
            f"invalid options for backend {backend.name!r}: {problems_of(error)}.", hint=f"Supported options: {known}."
        ) from error


@dataclass(slots=True)
class CallParts:
    """Seconds that the calls of one encode spend on transfers; sessions add to them.

    Attributes:
        transfer_in: Seconds of copying inputs to the device, or into its process.
        transfer_out: Seconds of copying outputs back.
    """

    transfer_in: float = 0.0
    transfer_out: float = 0.0


_parts: ContextVar[CallParts | None] = ContextVar("visionaccel_call_parts", default=None)


def call_parts() -> CallParts | None:
    """Return the object to which a session's `run` adds the seconds of its transfers; None if they are not measured."""
    return _parts.get()


@contextmanager
def watch_parts() -> Iterator[CallParts]:
    """Measure the transfers of the session calls that this thread makes in the `with` block."""
    parts = CallParts()
    token = _parts.set(parts)
    try:
        yield parts
    finally:
        _parts.reset(token)
