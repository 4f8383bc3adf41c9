"""What quantizing is tried on: a tower with a channel much larger than the others, and images to calibrate with."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import Qwen2VLImageProcessor

from visionaccel_testing.checkpoints import TINY, random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The tiny tower with an image processor, and outliers: a channel that is large after a norm, as trained ones have.

    The channel's weights are as much smaller, so that the tower computes what it computed without.
    """
    folder = random_checkpoint(tmp_path_factory.mktemp("outliers") / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    for norm, linears in (("norm1", ["attn.qkv"]), ("norm2", ["mlp.gate_proj", "mlp.up_proj"])):
        weights[f"visual.blocks.0.{norm}.weight"][3] *= 200
        for linear in linears:
            weights[f"visual.blocks.0.{linear}.weight"][:, 3] /= 200
    save_file(weights, folder / "model.safetensors")
    processor = Qwen2VLImageProcessor(
        patch_size=TINY["patch_size"], merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=96 * 96
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of three small images of coarse noise."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(60, 40), (40, 72), (64, 64)]):
        pixels = np.kron(rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3)), np.ones((4, 4, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder
