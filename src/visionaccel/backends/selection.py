"""Which backend runs an encoder, and why: every candidate's verdict is kept as data."""

from __future__ import annotations

from dataclasses import dataclass

from visionaccel.backends.registry import BackendEntry, Registry
from visionaccel.backends.spec import Accepted, Rejected, Verdict
from visionaccel.errors import BackendUnavailableError, PluginError
from visionaccel.families.base import Tower
from visionaccel.program import Program

__all__ = ["AUTO", "Candidate", "Selection", "select"]

AUTO = "auto"


@dataclass(frozen=True)
class Candidate:
    """One backend's answer for one encoder.

    Attributes:
        entry: The installed backend.
        verdict: Its answer.
        program: The program it accepted, or None.
    """

    entry: BackendEntry
    verdict: Verdict
    program: Program | None


@dataclass(frozen=True)
class Selection:
    """The outcome of a selection.

    Attributes:
        requested: A backend's name or `auto`.
        device: The requested device, or None for each backend's default.
        candidates: Every backend that was asked.
        chosen: The one to use, or None if all refused.
    """

    requested: str
    device: str | None
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    def require(self) -> tuple[str, Program]:
        """Name and program of the chosen backend.

        Raises:
            BackendUnavailableError: If every candidate refused; the message holds each reason and hint.
        """
        if self.chosen is not None and self.chosen.program is not None:
            return self.chosen.entry.name, self.chosen.program
        if not self.candidates:
            raise BackendUnavailableError(
                "no backend is installed.", hint="Install one, for example: pip install 'visionaccel[onnxrt]'."
            )
        refusals = [
            f"{candidate.entry.name}: {candidate.verdict.reason} {candidate.verdict.hint}"
            for candidate in self.candidates
            if isinstance(candidate.verdict, Rejected)
        ]
        where = f" on device {self.device!r}" if self.device else ""
        raise BackendUnavailableError(f"no backend can run this encoder{where}. " + " ".join(refusals))


def select(registry: Registry, tower: Tower, requested: str = AUTO, device: str | None = None) -> Selection:
    """Ask the named backend, or with `auto` every installed one, whether it can run the tower.

    Raises:
        UnknownBackendError: If a named backend is not installed.
        PluginError: If a named backend's plug-in is broken (with `auto`, a broken plug-in is a refusal).
        CheckpointError: If the tower's weights are missing or broken.
    """
    named = requested != AUTO
    entries = (registry.entry(requested),) if named else registry.entries
    candidates = tuple(_ask(registry, entry, tower, device, strict=named) for entry in entries)
    accepted = [candidate for candidate in candidates if isinstance(candidate.verdict, Accepted)]
    chosen = max(accepted, key=_rank, default=None)
    return Selection(requested, device, candidates, chosen)


def _rank(candidate: Candidate) -> int:
    # Candidates come in the order of their names, and max() keeps the first of equals.
    return candidate.verdict.score if isinstance(candidate.verdict, Accepted) else -1


def _ask(registry: Registry, entry: BackendEntry, tower: Tower, device: str | None, *, strict: bool) -> Candidate:
    try:
        backend = registry.load(entry.name)
    except PluginError as error:
        if strict:
            raise
        return Candidate(entry, Rejected(error.message, error.hint or ""), None)
    programs = tower.programs(backend.formats)
    if not programs:
        formats = ", ".join(sorted(backend.formats))
        reason = f"it takes programs in {formats}; family {tower.family} offers none of these."
        return Candidate(entry, Rejected(reason, "Name another backend."), None)
    best: Candidate | None = None
    for program in programs:
        try:
            verdict = backend.probe(program, device)
        except Exception as error:  # A probe that raises is a defect of one plug-in; the others must still be asked.
            reason = f"its probe failed with {type(error).__name__}: {error}."
            verdict = Rejected(reason, f"Report this to the authors of {entry.distribution}.")
        candidate = Candidate(entry, verdict, program if isinstance(verdict, Accepted) else None)
        if best is None or _rank(candidate) > _rank(best):
            best = candidate
    assert best is not None
    return best
