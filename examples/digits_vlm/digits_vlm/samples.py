"""Images of handwritten digits with their labels, made from scikit-learn's digits data set.

The 1,797 handwritten samples are split once, by a fixed permutation, into a training and a held-out pool. No
handwritten sample is in both. All results depend only on a `numpy.random.Generator`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

Split = Literal["train", "held_out"]

TRAIN_SAMPLES = 1400
CELL = 28
"""Side of one merged token in pixels (14-pixel patches, merged 2x2)."""


@dataclass(frozen=True)
class DigitsImage:
    """An RGB image and the digits on it, from left to right."""

    image: Image.Image
    truth: str


@dataclass(frozen=True)
class DigitsVideo:
    """RGB frames, uint8 [frames, height, width, 3], of one drifting row of digits, and the digits."""

    frames: NDArray[np.uint8]
    truth: str


@cache
def _pool(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the handwritten samples of a split: strokes float32 [n, 8, 8] in 0..1 and labels int64 [n]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:TRAIN_SAMPLES] if split == "train" else order[TRAIN_SAMPLES:]
    return (data.images[chosen] / 16.0).astype(np.float32), data.target[chosen].astype(np.int64)


def _stroke(sample: NDArray[np.float32], size: int, rng: np.random.Generator, augment: bool) -> NDArray[np.float32]:
    """Scale a sample to `size` x `size` pixels, float32 in 0..1; `augment` rotates and shears it slightly."""
    picture = Image.fromarray((sample * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
    if augment:
        angle, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
        zoom_x, zoom_y = rng.uniform(0.9, 1.15, 2)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]]) @ np.array([[zoom_x, shear], [0, zoom_y]])
        centre = np.array([size / 2, size / 2])
        shift = centre - turn @ centre
        coefficients = (turn[0, 0], turn[0, 1], shift[0], turn[1, 0], turn[1, 1], shift[1])
        picture = picture.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.float32) / 255.0


def _row(
    rng: np.random.Generator, split: Split, height: int, width: int, most: int
) -> tuple[list[tuple[NDArray[np.float32], int, int]], str]:
    """Choose a row of one to `most` digits: their strokes with top-left corners on the canvas, and the digits."""
    strokes, labels = _pool(split)
    smallest = 36
    count = int(min(rng.integers(1, most + 1), max(width // smallest, 1)))
    cell = width / count
    placed, truth = [], ""
    for k, index in enumerate(rng.integers(0, len(labels), count)):
        limit = int(min(cell, height))
        size = int(np.clip(limit * rng.uniform(0.7, 0.98), min(24, limit), min(limit, 160)))
        left = int(k * cell + rng.uniform(0, cell - size))
        top = int(rng.uniform(0, height - size))
        placed.append((_stroke(strokes[index], size, rng, augment=split == "train"), top, left))
        truth += str(labels[index])
    return placed, truth


def _paint(
    placed: list[tuple[NDArray[np.float32], int, int]], height: int, width: int, ground: float, dx: int = 0, dy: int = 0
) -> NDArray[np.uint8]:
    """Paint strokes on a canvas of grey level `ground`, moved by (dx, dy) but kept inside: uint8 [h, w, 3]."""
    canvas = np.full((height, width), ground, dtype=np.float32)
    for stroke, top, left in placed:
        size = len(stroke)
        y, x = int(np.clip(top + dy, 0, height - size)), int(np.clip(left + dx, 0, width - size))
        part = canvas[y : y + size, x : x + size]
        np.maximum(part, stroke, out=part)
    return np.repeat((canvas * 255).astype(np.uint8)[..., None], 3, axis=2)


def random_size(rng: np.random.Generator, largest: int = 252) -> tuple[int, int]:
    """Choose a canvas (height, width) in pixels, of any aspect ratio up to 1:4, multiples of no particular number."""
    height = int(rng.integers(56, int(largest * 0.7)))
    width = int(np.clip(height * np.exp(rng.uniform(np.log(0.6), np.log(4.0))), 56, largest))
    return height, width


def digits_image(
    rng: np.random.Generator, split: Split, size: tuple[int, int] | None = None, most: int = 4
) -> DigitsImage:
    """Make an image with one to `most` digits; `size` is (height, width) in pixels, random if not given."""
    height, width = size or random_size(rng)
    placed, truth = _row(rng, split, height, width, most)
    return DigitsImage(Image.fromarray(_paint(placed, height, width, rng.uniform(0, 0.15))), truth)


def digits_video(
    rng: np.random.Generator, split: Split, size: tuple[int, int] | None = None, frames: int = 4, most: int = 3
) -> DigitsVideo:
    """Make a short clip of one row of digits that drifts by a few pixels per frame."""
    height, width = size or random_size(rng, largest=196)
    placed, truth = _row(rng, split, height, width, most)
    ground, (vx, vy) = rng.uniform(0, 0.15), rng.integers(-2, 3, 2)
    stack = [_paint(placed, height, width, ground, int(vx) * f, int(vy) * f) for f in range(frames)]
    return DigitsVideo(np.stack(stack), truth)


def held_out_images(count: int, seed: int = 2025, largest: int = 308) -> list[DigitsImage]:
    """Make `count` held-out images of many sizes; a smaller count gives a prefix of the list for a larger one."""
    rng = np.random.default_rng(seed)
    return [digits_image(rng, "held_out", random_size(rng, largest)) for _ in range(count)]
