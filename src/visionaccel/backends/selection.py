"""Chooses the backend that runs an encoder, and keeps every candidate's verdict as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from visionaccel.backends.registry import BackendEntry, Registry, default_registry
from visionaccel.backends.spec import Accepted, Rejected, Verdict, VisionBackend
from visionaccel.core.containment import contained
from visionaccel.core.program import Coverage, Program
from visionaccel.errors import BackendUnavailableError, PluginError, SettingsError

AUTO = "auto"


class ProgramSource(Protocol):
    """A tower or a bundle, whose programs backends are asked to run."""

    @property
    def family(self) -> str:
        """Name of the vision tower's family."""

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        """Return its programs in these formats, the preferred first."""


@dataclass(frozen=True)
class Candidate:
    """One backend's answer for one encoder.

    Attributes:
        entry: The installed backend.
        verdict: Its answer.
        programs: The programs that it accepted, the first for each coverage.
        asked: False if `auto` was requested and the backend is `only_by_name`.
    """

    entry: BackendEntry
    verdict: Verdict
    programs: tuple[Program, ...]
    asked: bool = True


@dataclass(frozen=True)
class Selection:
    """The outcome of a selection.

    Attributes:
        requested: A backend's name or `auto`.
        device: The requested device, or None for each backend's default.
        candidates: The named backend, or with `auto` every installed one.
        chosen: The candidate to use, or None if all refused.
    """

    requested: str
    device: str | None
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    def require(self) -> tuple[str, tuple[Program, ...]]:
        """Return the name of the chosen backend and the programs that it accepted.

        Raises:
            BackendUnavailableError: If every candidate refused; the message contains each reason and hint.
        """
        if self.chosen is not None:
            return self.chosen.entry.name, self.chosen.programs
        asked = [candidate for candidate in self.candidates if candidate.asked]
        if not asked:
            raise BackendUnavailableError(
                "no backend is installed.", hint="Install one, for example: pip install 'visionaccel[onnxrt]'."
            )
        refusals = [
            f"{candidate.entry.name}: {candidate.verdict.reason} {candidate.verdict.hint}"
            for candidate in asked
            if isinstance(candidate.verdict, Rejected)
        ]
        where = f" on device {self.device!r}" if self.device else ""
        raise BackendUnavailableError(f"no backend can run this encoder{where}. " + " ".join(refusals))


def check_names(backend: str | None, fallbacks: Iterable[str]) -> None:
    """Refuse settings that name a backend that is not installed, before anything is opened.

    Args:
        backend: The chosen backend; None or `auto` for none in particular.
        fallbacks: The fallbacks, which must be named.

    Raises:
        SettingsError: If a fallback is `auto`.
        UnknownBackendError: If a backend is not installed.
    """
    named = [backend] if backend not in (None, AUTO) else []
    for name in (*named, *fallbacks):
        if name == AUTO:
            raise SettingsError(
                "VISIONACCEL_FALLBACK='auto' is not supported: a fallback must be chosen by name.",
                hint="Set it to a backend, such as torch_ref.",
            )
        default_registry().entry(str(name))


def select(registry: Registry, source: ProgramSource, requested: str = AUTO, device: str | None = None) -> Selection:
    """Ask the named backend, or with `auto` every installed one, which programs of a tower or bundle it can run.

    Of several that accept, the highest score is chosen, then the first by name.

    Raises:
        UnknownBackendError: If a named backend is not installed.
        PluginError: If a named backend's plug-in is broken (with `auto`, a broken plug-in counts as a refusal).
        CheckpointError: If the tower's weights are missing or broken.
    """
    named = requested != AUTO
    entries = (registry.entry(requested),) if named else registry.entries
    candidates = tuple(_ask(registry, entry, source, device, strict=named) for entry in entries)
    accepting = [each for each in candidates if isinstance(each.verdict, Accepted)]
    # Candidates are sorted by name, and max() returns the first of equals.
    return Selection(requested, device, candidates, max(accepting, key=attrgetter("verdict.score"), default=None))


def _ask(
    registry: Registry, entry: BackendEntry, source: ProgramSource, device: str | None, *, strict: bool
) -> Candidate:
    try:
        backend = registry.load(entry.name)
        taken = _formats(backend, entry, device)
    except PluginError as error:
        if strict:
            raise
        return Candidate(entry, Rejected(error.message, error.hint or ""), ())
    if backend.only_by_name and not strict:
        unnamed = Rejected("`auto` does not choose this backend.", f"Set VISIONACCEL_BACKEND={entry.name}.")
        return Candidate(entry, unnamed, (), asked=False)
    programs = source.programs(taken)
    if not programs:
        formats = ", ".join(sorted(taken)) or "none"
        reason = f"this encoder (family {source.family}) has no program for this backend; supported formats: {formats}."
        return Candidate(entry, Rejected(reason, "Choose a different backend."), ())
    verdicts = [(program, _verdict(backend, entry, program, device)) for program in programs]
    accepted: dict[Coverage, Program] = {}
    for program, verdict in verdicts:
        if isinstance(verdict, Accepted):
            accepted.setdefault(program.coverage, program)
    if not accepted:
        return Candidate(entry, verdicts[0][1], ())
    best = max((verdict for _, verdict in verdicts if isinstance(verdict, Accepted)), key=attrgetter("score"))
    if len(accepted) < len({program.coverage for program in programs}):
        kept = ", ".join(program.name for program in accepted.values())
        best = Accepted(best.score, f"{best.notes}; programs {kept} of {len(programs)}")
    return Candidate(entry, best, tuple(accepted.values()))


def _formats(backend: VisionBackend, entry: BackendEntry, device: str | None) -> frozenset[str]:
    try:
        with contained():
            return frozenset(backend.formats_on(device))
    except Exception as error:
        raise PluginError(
            f"backend {entry.name!r} of {entry.distribution} {entry.version} failed to list its formats: "
            f"{type(error).__name__}: {error}",
            hint=f"Report this to the authors of {entry.distribution}.",
        ) from error


def _verdict(backend: VisionBackend, entry: BackendEntry, program: Program, device: str | None) -> Verdict:
    try:
        with contained():
            if program.device is not None and backend.kind_of(device) != program.device:
                reason = f"program {program.name!r} was made for device {program.device!r}."
                return Rejected(reason, f"Set VISIONACCEL_DEVICE={program.device}.")
            return backend.probe(program, device)
    except Exception as error:  # a defect of one plug-in: the other backends are still asked
        reason = f"the backend's probe failed with {type(error).__name__}: {error}."
        return Rejected(reason, f"Report this to the authors of {entry.distribution}.")
