"""Evaluates an encoder by a task: questions about images that a model answers with it and with its own tower.

The language model, the questions and the decoding are the same; only the embeddings of the images differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from visionaccel.checkpoint import locate_checkpoint
from visionaccel.core.bounded_files import parse_json, read_bounded
from visionaccel.core.invalid_values import problems_of
from visionaccel.errors import InputError, VisionAccelError
from visionaccel.images import load_image
from visionaccel.integrations.transformers.accelerate import load
from visionaccel.integrations.transformers.answering import MOST_TOKENS, Answer, ask, model_device, open_processor

MARGIN = 0.01
"""By how much the encoder's accuracy may be lower than the reference's: one answer in a hundred."""

_ROUNDING = 1e-9

_Text = Annotated[str, Field(min_length=1)]


class Question(BaseModel):
    """One line of a task.

    Attributes:
        image: The image file, relative to the folder of the task, and inside it.
        question: The question about it.
        answer: The expected answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: _Text
    question: _Text
    answer: _Text

    @field_validator("image")
    @classmethod
    def _inside(cls, image: str) -> str:
        if PurePath(image).is_absolute() or ".." in PurePath(image).parts:
            raise ValueError("it is not a path inside the folder of the task")
        return image

    def expects(self, answer: str) -> bool:
        """Return whether an answer is the expected one, apart from whitespace at its ends. Case matters."""
        return answer.strip() == self.answer.strip()


@dataclass(frozen=True, slots=True)
class Task:
    """A task, whose images can all be read.

    Attributes:
        file: The file that it was read from.
        questions: Its questions by the number of their line, from 1.
    """

    file: Path
    questions: Mapping[int, Question]


def read_task(file: Path) -> Task:
    """Read a task: JSON lines with `image`, `question` and `answer`. Empty lines are skipped.

    Raises:
        InputError: If the file cannot be read, has no question, or a line or its image is invalid. The message names
            the line.
    """
    try:
        lines = read_bounded(file).decode().split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}", hint="Pass a file of JSON lines in UTF-8.") from error
    questions = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions[number] = Question.model_validate(parse_json(line))
            load_image(file.parent / questions[number].image)
        except InputError as error:
            raise InputError(
                f"{file}, line {number}: {error.message}", hint="Image files are relative to the folder of the task."
            ) from error
        except ValueError as error:
            raise InputError(
                f"{file}, line {number}: {problems_of(error)}",
                hint='Write one JSON object in each line, such as {"image": "page.png", "question": "...", '
                '"answer": "..."}.',
            ) from error
    if not questions:
        raise InputError(f"{file} has no questions.", hint="Write one JSON object in each line.")
    return Task(file, questions)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers to one question.

    Attributes:
        line: Number of the question's line.
        question: The question.
        fitted: Whether the image was fitted to the grids of the encoder's programs.
        reference: The answer with the model's own tower in float32.
        answer: The answer with the encoder; None if the image could not be encoded.
        failure: Why it could not be encoded.
        drifts: How far apart the log-probabilities of each token of the reference's answer are with the tower and with
            the encoder, after the same tokens before it. Empty after a failure.
    """

    line: int
    question: Question
    fitted: bool
    reference: Answer
    answer: Answer | None
    failure: str | None
    drifts: tuple[float, ...]

    @property
    def agrees(self) -> bool:
        """Whether the tokens of both answers are the same."""
        return self.answer is not None and self.answer.tokens == self.reference.tokens

    @property
    def reference_correct(self) -> bool:
        """Whether the reference's answer is the expected one."""
        return self.question.expects(self.reference.text)

    @property
    def correct(self) -> bool:
        """Whether the encoder's answer is the expected one."""
        return self.answer is not None and self.question.expects(self.answer.text)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of a task.

    Attributes:
        backend: Name of the backend that encoded.
        device: Its device.
        simulated: Whether the device is simulated.
        outcomes: The answers to each question.
    """

    backend: str
    device: str
    simulated: bool
    outcomes: tuple[Outcome, ...]

    @property
    def agreement(self) -> float:
        """The share of answers that are the reference's, token by token."""
        return self._share(outcome.agrees for outcome in self.outcomes)

    @property
    def reference_accuracy(self) -> float:
        """The share of the reference's answers that are correct."""
        return self._share(outcome.reference_correct for outcome in self.outcomes)

    @property
    def accuracy(self) -> float:
        """The share of the encoder's answers that are correct."""
        return self._share(outcome.correct for outcome in self.outcomes)

    @property
    def mean_drift(self) -> float | None:
        """The mean of all drifts; None if no image was encoded."""
        drifts = [drift for outcome in self.outcomes for drift in outcome.drifts]
        return sum(drifts) / len(drifts) if drifts else None

    @property
    def largest_drift(self) -> float | None:
        """The largest of all drifts; None if no image was encoded."""
        return max((drift for outcome in self.outcomes for drift in outcome.drifts), default=None)

    def verdict(self, margin: float = MARGIN) -> str | None:
        """Say what is wrong; None if nothing is.

        Args:
            margin: By how much the encoder's accuracy may be lower than the reference's.
        """
        failed = [outcome for outcome in self.outcomes if outcome.failure is not None]
        if failed:
            count, of, first = len(failed), len(self.outcomes), failed[0]
            return f"{count} of {of} images could not be encoded, the first in line {first.line}: {first.failure}"
        if not self.reference_accuracy:
            return "the reference answered no question correctly, so the task says nothing about the encoder."
        if self.reference_accuracy - self.accuracy > margin + _ROUNDING:
            return (
                f"accuracy {self.accuracy:.1%} is more than {margin:.1%} below the reference's, "
                f"{self.reference_accuracy:.1%}."
            )
        return None

    def _share(self, found: Iterable[bool]) -> float:
        return sum(found) / len(self.outcomes)


def evaluate(
    checkpoint: str | os.PathLike[str],
    task: Task,
    *,
    backend: str | None = None,
    device: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    most_tokens: int = MOST_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask a model the questions of a task, with an encoder and with the model's own tower in float32.

    Images are fitted to the encoder's programs, as they are in vLLM, but not for the reference: what fitting costs
    counts too. No fallback encodes in the place of the backend.

    Args:
        checkpoint: Folder or Hugging Face repository of the model.
        task: The questions.
        backend: As for `load`, like `device`, `bundle` and `settings`.
        device: See `backend`.
        bundle: See `backend`.
        settings: See `backend`.
        most_tokens: The maximum length of an answer.
        progress: Called with the number of answered questions and of all.

    Raises:
        VisionAccelError: The errors of `load`, `open_processor` and `Accelerated.fitter`.
        InputError: If the model's processor refuses an image.
    """
    folder = locate_checkpoint(checkpoint).folder
    processor = open_processor(folder)
    outcomes = []
    with load(
        folder,
        backend=backend,
        device=device,
        bundle=bundle,
        fallback="none",
        settings={**(settings or {}), "shadow": 0.0},
        keep_tower=True,
    ) as handle:
        fitter = handle.fitter(processor)
        handle.model.to(model_device())
        with handle.own_tower() as tower:
            tower.to(model_device(), torch.float32)
        asked = partial(ask, handle.model, processor, most_tokens=most_tokens, scored=True)
        for line, question in task.questions.items():
            image = load_image(task.file.parent / question.image)
            try:
                with handle.own_tower():
                    reference = asked([image], question.question)
                fitted = image if fitter is None else fitter.fit(image)
            except InputError as error:
                raise InputError(f"{task.file}, line {line}: {error.message}", hint=error.hint) from error
            answer, drifts, failure = None, tuple[float, ...](), None
            try:
                answer, drifts = _compared(partial(asked, [fitted], question.question), reference)
            except VisionAccelError as error:
                failure = str(error)
            outcomes.append(Outcome(line, question, fitted is not image, reference, answer, failure, drifts))
            if progress is not None:
                progress(len(outcomes), len(task.questions))
        primary = handle.encoder.primary
        return Evaluation(primary.backend, primary.capabilities.device, primary.capabilities.simulated, tuple(outcomes))


def _compared(asked: Callable[..., Answer], reference: Answer) -> tuple[Answer, tuple[float, ...]]:
    """Return the encoder's answer, and the drifts of the reference's tokens."""
    answer = asked()
    same = answer if answer.tokens == reference.tokens else asked(given=reference.tokens)
    pairs = zip(reference.log_probabilities, same.log_probabilities, strict=True)
    return answer, tuple(abs(exact - found) for exact, found in pairs)
