"""Greedy answers to questions about images, by a model and the processor of its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from visionaccel.errors import CheckpointError, ConfigurationError, InputError
from visionaccel.integrations.transformers.tower import tower_place

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TOKENS = 128
"""The maximum length of an answer, unless the caller chooses another."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        text: The answer without special tokens.
        tokens: The generated tokens, including the one that ends the answer.
        log_probabilities: Natural logarithm of the probability that the model gave each token; empty unless asked for.
        encode_seconds: How long the vision tower took, or the encoder in its place.
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    encode_seconds: float


def open_processor(folder: Path) -> Any:
    """Load the processor of a checkpoint folder: its tokenizer, image processor and chat template.

    Code that the checkpoint contains is not run.

    Raises:
        CheckpointError: If the folder does not have all of them, or they cannot be loaded.
        ConfigurationError: If a library that they need is missing.
    """
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)  # nosec B615 # local
    except ImportError as error:
        raise ConfigurationError(
            f"the processor of {folder} cannot be loaded: {error}", hint="Install torch, torchvision and Pillow."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the processor of {folder} cannot be loaded: {error}",
            hint="Download the whole checkpoint: its processor, tokenizer and chat template, too.",
        ) from error
    for part in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, part, None) is None:
            raise CheckpointError(
                f"the processor of {folder} has no {part.replace('_', ' ')}.",
                hint="Use the checkpoint of an instruction-tuned vision-language model, and download all its files.",
            )
    return processor


def model_device() -> str:
    """Return the device that a model should run on: the GPU if torch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def ask(
    model: Any,
    processor: Any,
    images: Sequence[Image],
    question: str,
    *,
    most_tokens: int = MOST_TOKENS,
    scored: bool = False,
    given: Sequence[int] = (),
) -> Answer:
    """Ask a model about images, in a conversation of one question, and decode its answer greedily.

    Args:
        model: A model of transformers, with its own tower or an encoder in its place.
        processor: Its processor.
        images: RGB images, which come before the question.
        question: The question.
        most_tokens: The maximum length of the answer.
        scored: Whether to keep the log-probabilities.
        given: Tokens of an answer that the model has to give, to see how likely it finds each of them.

    Raises:
        InputError: If the processor refuses an image, or the question contains placeholders of images or videos.
        CheckpointError: If the chat template fails, or leaves out the images.
        VisionAccelError: If the encoder could not encode an image.
    """
    speaker, tower = tower_place(model)  # the thinker of an Omni model
    inputs = _inputs(processor, images, question).to(speaker.device)
    start = inputs["input_ids"].shape[1]
    with _timed(tower) as seconds:
        output = speaker.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=len(given) or most_tokens,
            logits_processor=[_Given(given, start)] if given else [],
            output_logits=scored,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, start:].tolist()
    steps = zip(tokens, output.logits or (), strict=scored)
    probabilities = tuple(float(logits[0].double().log_softmax(-1)[token]) for token, logits in steps)
    text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(text, tuple(tokens), probabilities, sum(seconds))


class _Given(transformers.LogitsProcessor):  # type: ignore[misc]
    """Lets only the tokens of one answer be generated, after a prompt of `start` tokens."""

    def __init__(self, answer: Sequence[int], start: int) -> None:
        self._answer, self._start = answer, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._answer[input_ids.shape[1] - self._start]] = 0
        return only


def _inputs(processor: Any, images: Sequence[Image], question: str) -> Any:
    """Return the model's inputs for one question."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    try:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may raise any error
        raise CheckpointError(
            f"the chat template of {processor.tokenizer.name_or_path} failed: {error}",
            hint="Use a checkpoint whose chat template accepts images.",
        ) from error
    if (places := prompt.count(processor.image_token)) != len(images):
        raise InputError(
            f"the prompt has {places} instead of {len(images)} image placeholders.",
            hint=f"Leave {processor.image_token} out of the question, or use a chat template that accepts images.",
        )
    if (video := getattr(processor, "video_token", None)) and video in prompt:
        raise InputError("the prompt has a video placeholder but no video.", hint=f"Leave {video} out of the question.")
    try:
        return processor(text=[prompt], images=list(images), return_tensors="pt")
    except ValueError as error:
        raise InputError(
            f"the model's processor rejected an image: {error}", hint="Pass images that the model accepts."
        ) from error


@contextmanager
def _timed(tower: nn.Module) -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each call of a module."""
    seconds: list[float] = []
    before = tower.register_forward_pre_hook(lambda *_: seconds.append(-_now()))
    after = tower.register_forward_hook(lambda *_: seconds.append(seconds.pop() + _now()))
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()


def _now() -> float:
    """Return the time, after what the GPU has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
