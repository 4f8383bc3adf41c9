"""The simulated backend: what its devices wrap, which programs it accepts, and how it opens them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from visionaccel.backends import (
    AUTO,
    Accepted,
    Isolation,
    Options,
    Rejected,
    Selection,
    Session,
    Verdict,
    VisionBackend,
    default_registry,
    select,
)
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.program import CHECKPOINT, EP_CONTEXT, ONNX, ONNX_MODELS, Program
from visionaccel.errors import ConfigurationError, PluginError, SettingsError, VisionAccelError
from visionaccel_testing.simulated.faults import FaultRule, FaultScript
from visionaccel_testing.simulated.latency import Latency, read_recorded
from visionaccel_testing.simulated.session import SimulatedSession

NAME = "simulated"

_FORM = re.compile(r"(?P<backend>[^/@+\s]+)(?:/(?P<device>[^@+\s]+))?(?:@(?P<number>\d+))?(?P<apart>\+process)?")


@dataclass(frozen=True, slots=True)
class Target:
    """The backend and device behind a simulated device.

    Attributes:
        backend: Name of the wrapped backend, or `auto` for the best one for the program.
        device: That backend's device; None for its default.
        number: Distinguishes simulated devices that wrap the same backend; None if only one does.
        apart: Run in a child process, as a vendor's backend may.
    """

    backend: str = AUTO
    device: str | None = None
    number: int | None = None
    apart: bool = False

    @classmethod
    def parse(cls, text: str | None) -> Target:
        """Return the target of a name such as `onnxrt`, `torch_ref/cuda:0` or `onnxrt/cpu@1`; None stands for `auto`.

        Raises:
            SettingsError: If the name is malformed, or that of the simulated backend itself.
        """
        if text is None:
            return cls()
        found = _FORM.fullmatch(text)
        if found is None or found["backend"] == NAME:
            raise SettingsError(
                f"unknown simulated device {text!r}.",
                hint="Choose an installed backend to compute the answers, as BACKEND, BACKEND/DEVICE, BACKEND@NUMBER "
                "or BACKEND/DEVICE@NUMBER, or 'auto' for the best one here. Append +process for a child process.",
            )
        number = None if found["number"] is None else int(found["number"])
        return cls(found["backend"], found["device"], number, found["apart"] is not None)

    def shown(self, backend: str, device: str) -> str:
        """Return the simulated device's full name, for the backend and device that it wraps."""
        return f"{NAME}:{backend}/{device}" + ("" if self.number is None else f"@{self.number}")

    def backend_for(self, program: Program) -> Selection:
        """Return the selection of a backend for one program; raises the errors of `select`."""
        return select(default_registry(), _Single(program, program.family), self.backend, self.device)

    def named_backend(self) -> VisionBackend | None:
        """Return the backend, or None for `auto`; UnknownBackendError or PluginError if it cannot be loaded."""
        return None if self.backend == AUTO else default_registry().load(self.backend)


@dataclass(frozen=True, slots=True)
class _Single:
    """A source of one program, to select a backend for."""

    program: Program
    family: str

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        return (self.program,) if self.program.format in set(formats) else ()


def _switch_of_the_environment() -> Path | None:
    file = os.environ.get("SIMULATED_SWITCH")
    return Path(file) if file else None


class SimulatedOptions(Options):
    """Options of the `simulated` backend."""

    latency: float = Field(0.0, ge=0, allow_inf_nan=False, description="Seconds for each call.")
    per_patch: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Seconds for each patch, added to the latency."
    )
    recorded: Path | None = Field(
        None,
        description='JSON file of measured seconds by a frame\'s height and width in patches, `{"58x74": [7.4, 7.6]}`, '
        "used in turn instead of the two above.",
    )
    faults: tuple[FaultRule, ...] = Field(
        (), description='Faults; the first rule that applies is used: `[{"every": 3, "do": "raise"}]`.'
    )
    switch: Path | None = Field(
        default_factory=_switch_of_the_environment,
        description="File of further rules, read at each call; it may be missing or empty. Default: the environment "
        "variable SIMULATED_SWITCH, for a fallback, which takes no options.",
    )
    max_in_flight: int = Field(1, ge=1, description="Calls that run at the same time.")
    replay: bool = Field(
        False, description="Remember answers, up to 512 MiB, so that the same input is not computed again."
    )
    inner: dict[str, Any] = Field(default_factory=dict, description="Options of the backend that computes the answers.")


class SimulatedBackend(VisionBackend):
    """A device that returns the answers of a wrapped backend, named by its device, after a configured time."""

    name = NAME
    # The formats of visionaccel-flexmlrt as text: it need not be installed.
    formats_with_weights = frozenset({EP_CONTEXT, "flexmlrt.directory", "flexmlrt.rai"})
    formats = ONNX_MODELS | {CHECKPOINT} | formats_with_weights
    options = SimulatedOptions
    only_by_name = True

    def devices(self) -> Sequence[str]:
        return tuple(entry.name for entry in default_registry().entries if entry.name != self.name)

    def formats_on(self, device: str | None) -> frozenset[str]:
        """Return the wrapped backend's formats.

        For `auto`, checkpoints are left out if a backend takes graphs, so that one backend computes all programs of an
        encoder.
        """
        try:
            target = Target.parse(device)
            named = target.named_backend()
            if named is not None:
                return named.formats_on(target.device)
        except VisionAccelError:  # `probe` reports it
            return self.formats
        registry, taken = default_registry(), set[str]()
        for entry in registry.entries:
            with suppress(PluginError):
                backend = registry.load(entry.name)
                taken |= frozenset() if backend.only_by_name else backend.formats_on(target.device)
        return frozenset(taken - {CHECKPOINT} if ONNX in taken else taken)

    def kind_of(self, device: str | None) -> str:
        try:
            target = Target.parse(device)
            inner = target.named_backend()
            return super().kind_of(target.device) if inner is None else inner.kind_of(target.device)
        except VisionAccelError:  # `probe` reports it
            return ""

    def isolation_on(self, device: str | None) -> Isolation:
        target = Target.parse(device)
        inner = target.named_backend()
        if target.apart:
            return "process"
        return self.isolation if inner is None else inner.isolation_on(target.device)

    def probe(self, program: Program, device: str | None) -> Verdict:
        try:
            target = Target.parse(device)
            selection = target.backend_for(program)
            name, _ = selection.require()
        except ConfigurationError as error:
            return Rejected(
                f"no backend can compute its answers: {error.message}", error.hint or "Choose a different device."
            )
        if target.backend == AUTO and default_registry().load(name).isolation_on(target.device) != self.isolation:
            return Rejected(
                f"{name}, the best backend on this machine, runs in a child process.", f"Set VISIONACCEL_DEVICE={name}."
            )
        assert selection.chosen is not None
        assert isinstance(selection.chosen.verdict, Accepted)
        notes = selection.chosen.verdict.notes
        return Accepted(1, f"SIMULATED device, no hardware; answers by {name}" + (f" ({notes})" if notes else ""))

    def open(self, program: Program, device: str | None, options: SimulatedOptions) -> Session:
        target = Target.parse(device)
        name, _ = target.backend_for(program).require()
        latency = Latency(
            options.latency, options.per_patch, {} if options.recorded is None else read_recorded(options.recorded)
        )
        script = FaultScript(options.faults, options.switch)
        script.opening()
        backend = default_registry().load(name)
        inner = backend.open(program, target.device, _options_of(backend, options.inner))
        capabilities = replace(
            inner.capabilities,
            device=target.shown(name, inner.capabilities.device),
            thread_safe=options.max_in_flight > 1 or inner.capabilities.thread_safe,
            max_in_flight=options.max_in_flight,
            simulated=True,
        )
        return SimulatedSession(inner, capabilities, program, latency, script, replay=options.replay)


def _options_of(backend: VisionBackend, given: dict[str, Any]) -> Options:
    try:
        return backend.options.model_validate(given)
    except ValidationError as error:
        known = ", ".join(backend.options.model_fields) or "none"
        raise SettingsError(
            f"option inner, for the wrapped backend {backend.name!r}: {problems_of(error)}.",
            hint=f"Supported options: {known}.",
        ) from error
