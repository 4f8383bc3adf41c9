"""Runs the fault suite: plants each fault, asks, lifts it, and looks at what was answered, lost and kept."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import ConfigurationError
from visionaccel.images import ImageProcessor, image_processor
from visionaccel_bench.asking import Answer, ask, metric, metrics_of, text_stream
from visionaccel_bench.faultsuite.changing import change_weights, copy_checkpoint
from visionaccel_bench.faultsuite.matrix import Cell, Serving, cells_of
from visionaccel_bench.faultsuite.outcomes import FaultRow, FaultSuite
from visionaccel_bench.server import VllmServer, serve
from visionaccel_testing.simulated import FaultRule, struck

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[str], None]

ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8")
_DEADLINE = 4.0  # the first encode of a fallback on a busy machine takes more than two
_HANG = 12.0
_CANARY = 0.5
_ENOUGH = 40.0
_PERIOD, _MOMENT = 0.1, 2.0
_REPEATS = 6
_NEIGHBOURS = 2
_SHARE = 0.3
_IMAGES_OF_A_CELL = 12
_DEVICE = {"backend": "simulated", "device": "simulated:onnxrt/cpu@1"}
_OF_FALLBACK: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unopened": ([{"opening": 1, "do": "raise"}], r"Opening encoder 'simulated' failed and is tried once more"),
    "both": (
        [{"all": True, "do": "hang", "seconds": _HANG}],
        r"Encoder 'simulated' is taken out of work: device 'simulated:[^@']*' did not answer",
    ),
}
"""What the simulated fallback does, and what the server's log says then."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one planted fault.

    Attributes:
        cell: The fault.
        answered: What the requests that it struck were answered: `right answer`, `error`, or what else came.
        lost: Requests that got neither an answer nor an error that says why.
        wrong: Answers to any request whose token ids are not stock vLLM's.
        recovery_seconds: From the moment that the fault was lifted to the first right answer by the device; None if
            none came.
        problems: What was not as it must be; empty if the cell passed.
    """

    cell: Cell
    answered: str
    lost: int
    wrong: int
    recovery_seconds: float | None
    problems: tuple[str, ...]

    def row(self) -> FaultRow:
        """As the document has it."""
        serving = self.cell.serving
        return FaultRow(
            fault=self.cell.fault,
            moment=self.cell.moment,
            mode=serving.mode,
            isolation=serving.isolation,
            fallback=serving.fallback,
            expected=self.cell.expected,
            answered=self.answered,
            lost=self.lost,
            wrong=self.wrong,
            recovery_seconds=self.recovery_seconds,
            passed=not self.problems,
            detail=" ".join(self.problems),
        )


class SuiteImages:
    """Pictures of digits, and what stock vLLM reads in them.

    Args:
        checkpoint: The digits model.
        pictures: The pictures, all different.
        expected: Stock's token ids of each.
    """

    def __init__(self, checkpoint: Path, pictures: Sequence[Image], expected: Sequence[tuple[int, ...]]) -> None:
        self.checkpoint, self.pictures, self.expected = checkpoint, tuple(pictures), tuple(expected)
        self._processor: ImageProcessor = image_processor(checkpoint, backend="torchvision")  # as vLLM does

    @classmethod
    def asked_of_stock(cls, count: int, tell: Progress) -> SuiteImages:
        """Ask stock vLLM about that many pictures.

        Raises:
            DeviceError: If stock vLLM is not installed or does not start.
        """
        from digits_vlm import checkpoint_path
        from digits_vlm.samples import held_out_images

        checkpoint, pictures = checkpoint_path(), [sample.image for sample in held_out_images(count)]
        tell("stock vLLM: starting")
        with serve(checkpoint, {}, ARGUMENTS) as server, ThreadPoolExecutor(4) as pool:
            tell(f"stock vLLM: reading {count} pictures")
            answers = list(pool.map(lambda picture: ask(server.url, server.model, picture), pictures))
        expected = [answer.tokens for answer in answers]
        if None in expected:
            raise ConfigurationError("stock vLLM does not answer.", hint="Look at its log.")
        return cls(checkpoint, pictures, [tokens for tokens in expected if tokens is not None])

    def rule(self, fault: str, victim: int, others: Iterable[int]) -> dict[str, Any]:
        """A fault of the simulated device that strikes one picture and none of the others."""
        spared = [self._patches(other) for other in others]
        patches = self._patches(victim)
        for seed in range(10_000):
            rule = FaultRule(share=_SHARE, seed=seed, do="raise")
            if struck(patches, rule) and not any(struck(other, rule) for other in spared):
                return {"share": _SHARE, "seed": seed, "do": fault}
        raise AssertionError("one of so many seeds strikes the victim alone")

    def _patches(self, number: int) -> Any:
        return self._processor(self.pictures[number])[0]


def run_suite(
    servings: Iterable[Serving],
    images: SuiteImages,
    *,
    wanted: Callable[[Cell], bool] = lambda _: True,
    tell: Progress = lambda _: None,
    done: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Plant every fault of the servings, each on a checkpoint whose vision weights changed once its server was up.

    Args:
        servings: The kinds of server, each of which is started once.
        images: The pictures.
        wanted: Which cells to run.
        tell: Is called with what is being done.
        done: Is called with each outcome.

    Raises:
        DeviceError: If a server does not start.
    """
    outcomes = []
    for serving in servings:
        cells = [cell for cell in cells_of(serving) if wanted(cell)]
        if not cells:
            continue
        tell(f"{serving}: starting")
        with temporary_folder("visionaccel-faults-") as folder, ExitStack() as stack:
            switch = folder / "faults.json"
            switch.write_text("")
            _fallback_switch(switch).write_text("")
            checkpoint = copy_checkpoint(images.checkpoint, folder)
            server = stack.enter_context(serve(checkpoint, _settings(serving, switch), ARGUMENTS))
            change_weights(checkpoint, serving.change)  # before any fallback opens or process starts again
            fresh = iter(range(len(images.pictures)))
            for cell in cells:
                tell(f"{cell.fault}, {cell.moment}: {serving}")
                outcome = _CellRun(cell, server, switch, images, fresh).outcome()
                outcomes.append(outcome)
                done(outcome)
                if not server.healthy():
                    break  # the outcome says so; what follows would be its consequence
    return outcomes


def _settings(serving: Serving, switch: Path) -> dict[str, str]:
    settings = {
        "VISIONACCEL_BACKEND": "simulated",
        "VISIONACCEL_DEVICE": "onnxrt@1",
        "VISIONACCEL_OPTIONS": json.dumps({"switch": str(switch)}),
        "VISIONACCEL_MODE": serving.mode,
        "VISIONACCEL_ISOLATION": serving.isolation,
        "VISIONACCEL_FALLBACK": "torch_ref" if serving.fallback else "none",
        "VISIONACCEL_DEADLINE": str(_DEADLINE),
        "VISIONACCEL_CANARY_INTERVAL": str(_CANARY),
        "VISIONACCEL_BREAKER_SECONDS": "0.2",
    }
    if serving.faulty:
        settings |= {
            "VISIONACCEL_DEVICE": "onnxrt@1+process",
            "VISIONACCEL_ISOLATION": "auto",
            "VISIONACCEL_FALLBACK": "simulated,torch_ref",
            "SIMULATED_SWITCH": str(_fallback_switch(switch)),
        }
    return settings


def _fallback_switch(switch: Path) -> Path:
    return switch.with_name("fallback.json")


@dataclass
class _CellRun:
    """One cell on a running server."""

    cell: Cell
    server: VllmServer
    switch: Path
    images: SuiteImages
    fresh: Iterator[int]
    problems: list[str] = field(default_factory=list)
    lost: int = 0
    wrong: int = 0

    def outcome(self) -> Outcome:
        """Plant the fault, ask, lift it, and wait until the device answers again."""
        victims = [next(self.fresh) for _ in range({"repeated": _REPEATS, "restart": 2}.get(self.cell.moment, 1))]
        neighbours = [next(self.fresh) for _ in range(_NEIGHBOURS if self.cell.moment == "beside" else 0)]
        before = self._strikes()
        try:
            struck_answers = self._struck(victims, neighbours)
        finally:
            self.switch.write_text("")
            _fallback_switch(self.switch).write_text("")
        lifted = time.monotonic()
        answered = sorted({self._judged(number, answer) for number, answer in struck_answers})
        if answered != [{"answer": "right answer", "error": "error"}[self.cell.expected]]:
            self.problems.append(f"What it struck was answered: {', '.join(answered)}.")
        if not self._grows(self._strikes, before):
            self.problems.append("The fault did not strike.")
        self._look_at_fallback()
        recovery = self._recovery(lifted)
        for number in (*victims, *neighbours):  # nothing of the fault is kept anywhere
            if self._judged(number, self._ask(number)) != "right answer":
                self.problems.append(f"Asked again, picture {number} was misread.")
        if not self.server.healthy():
            self.problems.append("The server is not healthy.")
        if self.lost:
            self.problems.append(f"{self.lost} requests were lost.")
        return Outcome(
            self.cell, ", ".join(answered), self.lost, self.wrong, recovery, tuple(dict.fromkeys(self.problems))
        )

    def _struck(self, victims: Sequence[int], neighbours: Sequence[int]) -> list[tuple[int, Answer]]:
        fault, moment = self.cell.fault, self.cell.moment
        everything = {"all": True, "do": fault}
        if fault == "drift":
            self._plant([everything])
            self._wait_for_breaker()  # no answer shows it; the canary does
        elif moment == "repeated":
            self._plant([everything])
        elif moment == "restart":
            self._plant([self.images.rule(fault, victims[0], [])])
            first = self._ask(victims[0])  # which ends the process; the next one gives wrong answers from its start
            self._plant([{"all": True, "do": "drift"}])
            return [(victims[0], first), (victims[1], self._ask(victims[1]))]
        else:
            if moment in _OF_FALLBACK:
                rules, _ = _OF_FALLBACK[moment]
                _fallback_switch(self.switch).write_text(json.dumps(rules))
            self._plant([self.images.rule(fault, victims[0], neighbours)])
        if moment != "beside":
            return [(victim, self._ask(victim)) for victim in victims]
        with text_stream(self.server.url, self.server.model) as problems, ThreadPoolExecutor(8) as pool:
            asked = {number: pool.submit(self._ask, number) for number in (*victims, *neighbours)}
            answers = {number: future.result() for number, future in asked.items()}
        self.problems += [f"The text stream next to it: {problem}." for problem in problems]
        for number in neighbours:
            if self._judged(number, answers[number]) != "right answer":
                self.problems.append(f"Its neighbour {number} was answered: {self._judged(number, answers[number])}.")
        return [(victim, answers[victim]) for victim in victims]

    def _look_at_fallback(self) -> None:
        """The fallback's fault struck too, as the server's log says."""
        if self.cell.moment in _OF_FALLBACK:
            _, said = _OF_FALLBACK[self.cell.moment]
            if not re.search(said, self.server.log.read_text(errors="replace")):
                self.problems.append("The fallback's fault did not strike.")

    def _plant(self, rules: Sequence[dict[str, Any]]) -> None:
        partial = self.switch.with_suffix(".partial")
        hangs = {"seconds": _HANG} if self.cell.serving.isolation == "none" else {}  # a process is ended: for good
        partial.write_text(json.dumps([rule | (hangs if rule["do"] == "hang" else {}) for rule in rules]))
        partial.replace(self.switch)  # whole at any time

    def _ask(self, number: int) -> Answer:
        return ask(self.server.url, self.server.model, self.images.pictures[number])

    def _judged(self, number: int, answer: Answer) -> str:
        if answer.lost:
            self.lost += 1
            return f"lost ({answer.error})"
        if answer.tokens is None:
            error = answer.error or ""
            if "could not be encoded" in error:
                return "error"
            return f"an error that does not say why ({error[:200]})"
        if answer.tokens != self.images.expected[number]:
            self.wrong += 1
            return "a wrong answer"
        return "right answer"

    def _wait_for_breaker(self) -> None:
        limit = time.monotonic() + _ENOUGH
        while metric(metrics_of(self.server.url), "visionaccel_breaker_state", **_DEVICE) < 1:
            if time.monotonic() > limit:
                self.problems.append("Nothing noticed it.")
                return
            time.sleep(_PERIOD)

    def _recovery(self, since: float) -> float | None:
        """Seconds until the device itself answers a picture that it has not seen."""
        limit = since + _ENOUGH
        while time.monotonic() < limit:
            if metric(metrics_of(self.server.url), "visionaccel_breaker_state", **_DEVICE) == 0:
                before = self._encoded_by_device()
                number = next(self.fresh)
                right = self._judged(number, self._ask(number)) == "right answer"
                if right and self._grows(self._encoded_by_device, before):
                    return round(time.monotonic() - since, 2)
            time.sleep(_PERIOD)
        self.problems.append(f"The device did not answer again within {_ENOUGH:.0f} s.")
        return None

    def _encoded_by_device(self) -> float:
        return metric(metrics_of(self.server.url), "visionaccel_encode_seconds_count", **_DEVICE, purpose="request")

    def _strikes(self) -> float:
        """How often the device failed, or was taken out of work."""
        text = metrics_of(self.server.url)
        names = ("visionaccel_failures_total", "visionaccel_breaker_openings_total")
        return sum(metric(text, name, **_DEVICE) for name in names)

    def _grows(self, count: Callable[[], float], before: float) -> bool:
        """Whether a count is larger than before; metrics come a moment later than answers."""
        limit = time.monotonic() + _MOMENT
        while count() <= before:
            if time.monotonic() > limit:
                return False
            time.sleep(_PERIOD)
        return True


def images_needed(servings: Iterable[Serving], wanted: Callable[[Cell], bool] = lambda _: True) -> int:
    """How many pictures the servings need at most."""
    return max(sum(map(wanted, cells_of(serving))) * _IMAGES_OF_A_CELL for serving in servings)


def suite_of(outcomes: Sequence[Outcome], created: str) -> FaultSuite:
    """The outcomes, at least one, as a document for `visionaccel report`."""
    return FaultSuite(created=created, simulated=True, rows=tuple(outcome.row() for outcome in outcomes))
