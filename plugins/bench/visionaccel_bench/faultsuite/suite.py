"""Runs the fault suite: plants each fault, asks, lifts the fault, and checks what was answered, lost and kept."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visionaccel.checkpoint import locate_checkpoint
from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import ConfigurationError
from visionaccel.families import tower_of
from visionaccel.images import ImageProcessor, image_processor
from visionaccel_bench.faultsuite.cells import Cell, Change, FaultRow, Serving
from visionaccel_bench.server import Answer, VllmServer, ask, metric, metrics_of, serve, text_stream
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
_BREAKER, _ENCODES = "visionaccel_breaker_state", "visionaccel_encode_seconds_count"
_STRIKES = ("visionaccel_failures_total", "visionaccel_breaker_openings_total")
_DEVICE = {"backend": "simulated", "device": "simulated:onnxrt/cpu@1"}
_OF_FALLBACK: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unopened": ([{"opening": 1, "do": "raise"}], r"Opening encoder 'simulated' failed; trying once more"),
    "both": (
        [{"all": True, "do": "hang", "seconds": _HANG}],
        r"Encoder 'simulated' is disabled: device 'simulated:[^@']*' did not answer",
    ),
}
"""What the simulated fallback does, and a pattern of what the server logs then."""


class SuiteImages:
    """Different pictures of digits, and the token ids of stock vLLM's answer about each with the digits model."""

    def __init__(self, checkpoint: Path, pictures: Sequence[Image], expected: Sequence[tuple[int, ...]]) -> None:
        self.checkpoint, self.pictures, self.expected = checkpoint, tuple(pictures), tuple(expected)
        self._processor: ImageProcessor = image_processor(checkpoint, backend="torchvision")  # as vLLM does

    @classmethod
    def asked_of_stock(cls, count: int, tell: Progress) -> SuiteImages:
        """Ask stock vLLM about that many pictures; DeviceError if it is not installed or does not start."""
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
        """Return a fault of the simulated device that strikes one picture and none of the others."""
        patches, *spared = (self._processor(self.pictures[number])[0] for number in (victim, *others))
        for seed in range(10_000):
            rule = FaultRule(share=_SHARE, seed=seed, do="raise")
            if struck(patches, rule) and not any(struck(other, rule) for other in spared):
                return {"share": _SHARE, "seed": seed, "do": fault}
        raise AssertionError("one of so many seeds strikes the victim alone")


def change_weights(checkpoint: Path, change: Change) -> None:
    """Negate every vision weight of a checkpoint, so that an encoder that reads them gives wrong answers."""
    weights = tower_of(locate_checkpoint(checkpoint)).weights.values()
    for file in sorted({tensor.file for tensor in weights}):
        target = file
        if change == "replaced":
            target = file.with_suffix(".new")
            shutil.copyfile(file, target)
        negated = {each.offset: np.negative(each.read()).tobytes() for each in weights if each.file == file}
        with target.open("r+b") as written:
            for offset, data in negated.items():
                written.seek(offset)
                written.write(data)
        if change == "replaced":
            target.replace(file)


def run_suite(cells: Iterable[Cell], images: SuiteImages, tell: Progress) -> Generator[tuple[Cell, FaultRow]]:
    """Plant every fault, each on a checkpoint whose vision weights are changed once its server is up.

    Consecutive cells of one kind of server share one. If a cell ends it, the cells after it are left out.

    Raises:
        DeviceError: A server does not start.
    """
    for serving, planted in groupby(cells, key=lambda cell: cell.serving):
        tell(f"{serving}: starting")
        with temporary_folder("visionaccel-faults-") as folder:
            switch = folder / "faults.json"
            switch.write_text("")
            _fallback_switch(switch).write_text("")
            checkpoint = Path(shutil.copytree(images.checkpoint, folder / "checkpoint"))
            with serve(checkpoint, _settings(serving, switch), ARGUMENTS) as server:
                change_weights(checkpoint, serving.change)  # before any fallback opens or process starts again
                fresh = iter(range(len(images.pictures)))
                for cell in planted:
                    tell(str(cell))
                    yield cell, _CellRun(cell, server, switch, images, fresh).row()
                    if not server.healthy():
                        break  # the row says so; what follows would be its consequence


def images_needed(cells: Iterable[Cell]) -> int:
    """Return how many pictures are enough for each server of some cells."""
    servers = groupby(cells, key=lambda cell: cell.serving)
    return max((sum(1 for _ in planted) * _IMAGES_OF_A_CELL for _, planted in servers), default=0)


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
    """One cell on a running server; `fresh` are the numbers of pictures that the server has not seen."""

    cell: Cell
    server: VllmServer
    switch: Path
    images: SuiteImages
    fresh: Iterator[int]
    problems: list[str] = field(default_factory=list)
    lost: int = 0
    wrong: int = 0

    def row(self) -> FaultRow:
        """Plant the fault, ask, lift it, and wait until the device answers again."""
        cell, serving = self.cell, self.cell.serving
        victims = [next(self.fresh) for _ in range({"repeated": _REPEATS, "restart": 2}.get(cell.moment, 1))]
        neighbours = [next(self.fresh) for _ in range(_NEIGHBOURS if cell.moment == "beside" else 0)]
        before = self._metrics(*_STRIKES)
        try:
            struck_answers = self._struck(victims, neighbours)
        finally:
            self.switch.write_text("")
            _fallback_switch(self.switch).write_text("")
        lifted = time.monotonic()
        answered = sorted({self._judged(number, answer) for number, answer in struck_answers})
        if answered != [{"answer": "right answer", "error": "error"}[cell.expected]]:
            self.problems.append(f"The affected requests were answered: {', '.join(answered)}.")
        if not self._grows(before, *_STRIKES):
            self.problems.append("The fault did not occur.")
        if cell.moment in _OF_FALLBACK:
            _, logged = _OF_FALLBACK[cell.moment]
            if not re.search(logged, self.server.log.read_text(errors="replace")):
                self.problems.append("The fallback's fault did not occur.")
        recovery = self._recovery(lifted)
        for number in (*victims, *neighbours):  # no wrong result is kept anywhere
            if self._judged(number, self._ask(number)) != "right answer":
                self.problems.append(f"Asked again, picture {number} was misread.")
        if not self.server.healthy():
            self.problems.append("The server is not healthy.")
        if self.lost:
            self.problems.append(f"{self.lost} requests were lost.")
        return FaultRow(
            fault=cell.fault,
            moment=cell.moment,
            mode=serving.mode,
            isolation=serving.isolation,
            fallback=serving.fallback,
            expected=cell.expected,
            answered=", ".join(answered),
            lost=self.lost,
            wrong=self.wrong,
            recovery_seconds=recovery,
            passed=not self.problems,
            detail=" ".join(dict.fromkeys(self.problems)),
        )

    def _struck(self, victims: Sequence[int], neighbours: Sequence[int]) -> list[tuple[int, Answer]]:
        """Plant the fault and ask about the victims, and about the neighbours at the same time."""
        fault, moment = self.cell.fault, self.cell.moment
        if fault == "drift" or moment == "repeated":
            self._plant([{"all": True, "do": fault}])
            # No answer shows drift; the canary detects it.
            if fault == "drift" and not _within(_ENOUGH, lambda: self._metrics(_BREAKER) >= 1):
                self.problems.append("The canary did not detect it.")
        else:
            if moment in _OF_FALLBACK:
                rules, _ = _OF_FALLBACK[moment]
                _fallback_switch(self.switch).write_text(json.dumps(rules))
            self._plant([self.images.rule(fault, victims[0], neighbours)])
        if moment == "restart":
            first = self._ask(victims[0])  # ends the process; the next one gives wrong answers from its start
            self._plant([{"all": True, "do": "drift"}])
            return [(victims[0], first), (victims[1], self._ask(victims[1]))]
        if moment != "beside":
            return [(victim, self._ask(victim)) for victim in victims]
        with text_stream(self.server.url, self.server.model) as problems, ThreadPoolExecutor(8) as pool:
            asked = {number: pool.submit(self._ask, number) for number in (*victims, *neighbours)}
            answers = {number: future.result() for number, future in asked.items()}
        self.problems += [f"The text stream next to it: {problem}." for problem in problems]
        for number in neighbours:
            if (judged := self._judged(number, answers[number])) != "right answer":
                self.problems.append(f"Its neighbour {number} was answered: {judged}.")
        return [(victim, answers[victim]) for victim in victims]

    def _plant(self, rules: Sequence[dict[str, Any]]) -> None:
        partial = self.switch.with_suffix(".partial")
        # In a separate process it hangs without end, because the process is killed.
        hangs = {"seconds": _HANG} if self.cell.serving.isolation == "none" else {}
        partial.write_text(json.dumps([rule | (hangs if rule["do"] == "hang" else {}) for rule in rules]))
        partial.replace(self.switch)  # the device never reads half of it

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

    def _recovery(self, since: float) -> float | None:
        """Return the seconds until the device itself answers a picture that it has not seen."""
        if _within(since + _ENOUGH - time.monotonic(), self._answers_by_device):
            return round(time.monotonic() - since, 2)
        self.problems.append(f"The device did not answer again within {_ENOUGH:.0f} s.")
        return None

    def _answers_by_device(self) -> bool:
        if self._metrics(_BREAKER) != 0:
            return False
        before, number = self._metrics(_ENCODES, purpose="request"), next(self.fresh)
        right = self._judged(number, self._ask(number)) == "right answer"
        return right and self._grows(before, _ENCODES, purpose="request")

    def _metrics(self, *names: str, **labels: str) -> float:
        """Return the sum of some of the device's metrics."""
        text = metrics_of(self.server.url)
        return sum(metric(text, name, **_DEVICE, **labels) for name in names)

    def _grows(self, before: float, *names: str, **labels: str) -> bool:
        """Return whether the sum of some metrics grows soon: they are updated a moment after the answer."""
        return _within(_MOMENT, lambda: self._metrics(*names, **labels) > before)


def _within(seconds: float, happens: Callable[[], bool]) -> bool:
    limit = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > limit:
            return False
        time.sleep(_PERIOD)
    return True
