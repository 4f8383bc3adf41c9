"""What tiny models are asked through transformers, in batches with padding on the left, and what they answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from whole_models import Model

TOKENS = 6
"""Tokens of each answer."""

_SIZES = ((2, 2), (3, 2), (2, 5), (5, 3), (7, 2), (1, 9), (9, 1), (4, 4), (8, 8), (9, 10))


class Answers(NamedTuple):
    """Greedy tokens [prompts, TOKENS], and log-probabilities of the vocabulary at each of them."""

    tokens: torch.Tensor
    log_probabilities: torch.Tensor


def prompt(media: str) -> str:
    """A prompt about images and videos."""
    return f"<|im_start|>user\n{media}Read the digits.<|im_end|>\n<|im_start|>assistant\n"


def picture(columns: int, rows: int, side: int, seed: int) -> Image.Image:
    """A picture of that many tokens, a few pixels off, so that it is resized."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    size = columns * side + seed % 5, rows * side - seed % 3
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def asked(model: Model, processor: Any, media: Iterable[str], **data: Any) -> Any:
    """A batch of prompts, as the processor prepares it."""
    if "videos" in data:
        data["do_sample_frames"] = False
        if model.metadata:
            data["video_metadata"] = [_times(len(video)) for video in data["videos"]]
    text = [prompt(each) for each in media]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # transformers' code for GLM and numpy 2
        return processor(text=text, padding=True, padding_side="left", return_tensors="pt", **data)


def batches(model: Model, processor: Any) -> Mapping[str, Any]:
    """20 prompts: about images of many sizes, several images, none, videos, and images next to videos."""
    pictures = [picture(*size, 2 * model.patch, seed) for seed, size in enumerate(_SIZES)]
    clips = [np.stack([np.asarray(picture(4, 3, 32, seed).resize((128, 96))) for seed in range(n)]) for n in (4, 6, 5)]
    image, video = model.image, model.video
    several = [image * 2, "", f"{image}And now: {image}", "42", image * 3]
    found = {
        "images": asked(model, processor, [image] * len(pictures), images=pictures),
        "several images": asked(model, processor, several, images=[pictures[each] for each in (0, 4, 9, 1, 5, 6, 7)]),
        "videos": asked(model, processor, [video] * 3, videos=clips),
    }
    if model.family == "glm4v":  # transformers marks frames of its videos as images, and refuses both in a batch
        found["two videos"] = asked(model, processor, [video * 2, video], videos=clips)
    else:
        mixed = [image + video + image, video + image]
        found["images and videos"] = asked(model, processor, mixed, images=pictures[:3], videos=clips[:2])
    return found


def answered(model: Any, inputs: Mapping[str, torch.Tensor]) -> Answers:
    """Answer a batch of prompts. An Omni model answers with its thinker."""
    found = getattr(model, "thinker", model).generate(
        **inputs,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
    return Answers(tokens, torch.stack(found.logits, dim=1).log_softmax(dim=-1))


def _times(frames: int) -> dict[str, Any]:
    return {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames))}
