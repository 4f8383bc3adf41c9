"""The tower equals the reference on each backend, and a configuration that it does not know is refused."""

import numpy as np
import pytest
import torch
from reference import reference
from safetensors.torch import load_file

from visionaccel import open_encoder
from visionaccel.errors import UnsupportedArchitectureError
from visionaccel_testing.checkpoints import random_checkpoint

CONFIG = {"layers": 2, "width": 32, "heads": 2, "expansion": 2, "patch": 4, "output_width": 24}
GRIDS = [(1, 4, 6), (2, 8, 4)]  # frames, height and width in patches


def checkpoint(folder, config):
    return random_checkpoint(folder, config, family="tinyvlm", architecture="TinyVLMForConditionalGeneration")


@pytest.mark.parametrize("backend", ["onnxrt", "torch_ref"])
def test_embeddings_equal_the_reference(backend, tmp_path):
    folder = checkpoint(tmp_path, CONFIG)
    patches = np.random.default_rng(0).normal(0, 0.01, (24 + 2 * 32, 3 * 2 * 4 * 4)).astype("float32")
    with open_encoder(folder, backend=backend) as encoder:
        embeddings = encoder.encode(patches, GRIDS)

    weights = {name.removeprefix("vision."): w for name, w in load_file(folder / "model.safetensors").items()}
    frames = torch.from_numpy(patches).split([24, 32, 32])
    sizes = [(4, 6), (8, 4), (8, 4)]
    exact = torch.cat([reference(weights, 2, frame, *size) for frame, size in zip(frames, sizes, strict=True)])
    assert np.abs(embeddings - exact.numpy()).max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("name", "value"), [("activation", "relu"), ("qk_norm", True)])
def test_what_is_not_implemented_is_refused(name, value, tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=f"vision_config.{name} is {value!r}"):
        checkpoint(tmp_path, {**CONFIG, name: value})
