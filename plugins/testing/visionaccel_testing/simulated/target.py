"""What a simulated device wraps, as its name says: `BACKEND[/DEVICE][@NUMBER][+process]`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from visionaccel.backends import AUTO, Selection, VisionBackend, default_registry, select
from visionaccel.core.program import CHECKPOINT, ONNX, Program
from visionaccel.errors import PluginError, SettingsError

NAME = "simulated"

_FORM = re.compile(r"(?P<backend>[^/@+\s]+)(?:/(?P<device>[^@+\s]+))?(?:@(?P<number>\d+))?(?P<apart>\+process)?")


@dataclass(frozen=True, slots=True)
class Target:
    """The backend and device behind a simulated device.

    Attributes:
        backend: Name of the wrapped backend, or `auto` for the best that takes the program it is opened with.
        device: That backend's device; None for its default.
        number: Tells apart simulated devices that wrap the same; None where there is one.
        apart: It wants a child process, as a vendor's backend may.
    """

    backend: str = AUTO
    device: str | None = None
    number: int | None = None
    apart: bool = False

    @classmethod
    def parse(cls, text: str | None) -> Target:
        """The target that a device's name stands for, such as `onnxrt`, `torch_ref/cuda:0` or `onnxrt/cpu@1`.

        Args:
            text: The name; None for `auto`.

        Raises:
            SettingsError: If it is malformed, or names the simulated backend itself.
        """
        if text is None:
            return cls()
        found = _FORM.fullmatch(text)
        if found is None or found["backend"] == NAME:
            raise SettingsError(
                f"there is no simulated device {text!r}.",
                hint="Name an installed backend that computes the answers, as BACKEND, BACKEND/DEVICE, BACKEND@NUMBER "
                "or BACKEND/DEVICE@NUMBER; 'auto' is the best one here; +process behind it for a child process.",
            )
        number = found["number"]
        number = None if number is None else int(number)
        return cls(found["backend"], found["device"], number, found["apart"] is not None)

    def shown(self, backend: str, device: str) -> str:
        """The simulated device's full name, once it is known what it wraps."""
        return f"{NAME}:{backend}/{device}" + ("" if self.number is None else f"@{self.number}")

    def backend_for(self, program: Program) -> Selection:
        """The selection of a backend for one program, with every candidate's verdict.

        Raises:
            UnknownBackendError: If the named backend is not installed.
            PluginError: If it is broken.
        """
        return select(default_registry(), _Single(program), self.backend, self.device)

    def formats(self) -> frozenset[str]:
        """Program formats that it takes.

        `auto` leaves the checkpoint itself alone where graphs are taken: the programs of one encoder would otherwise be
        computed by two backends.

        Raises:
            UnknownBackendError: If the named backend is not installed.
            PluginError: If it is broken.
        """
        named = self.named_backend()
        if named is not None:
            return named.formats_on(self.device)
        registry, taken = default_registry(), set[str]()
        for entry in registry.entries:
            try:
                backend = registry.load(entry.name)
            except PluginError:
                continue
            if not backend.only_by_name:
                taken |= backend.formats_on(self.device)
        return frozenset(taken - {CHECKPOINT} if ONNX in taken else taken)

    def named_backend(self) -> VisionBackend | None:
        """The named backend; None for `auto`.

        Raises:
            UnknownBackendError: If it is not installed.
            PluginError: If it is broken.
        """
        return None if self.backend == AUTO else default_registry().load(self.backend)


@dataclass(frozen=True, slots=True)
class _Single:
    """One program to choose a backend for."""

    program: Program

    @property
    def family(self) -> str:
        return self.program.family

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        return (self.program,) if self.program.format in set(formats) else ()
