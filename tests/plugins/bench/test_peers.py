"""Peers of the encode benchmark: transformers' tower of the checkpoint's model, and which towers vLLM's peer takes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visionaccel import open_encoder
from visionaccel.core.arrays import as_numpy
from visionaccel.core.grid import Grid
from visionaccel.core.program import CHECKPOINT
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel_bench.encode.contender_main import open_peer

GRID = Grid(1, 8, 12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_transformers_takes_the_tower_of_the_model_that_the_checkpoint_names(tiny, dtype, tolerance):
    tower = open_tower(tiny)
    peer = open_peer("transformers", tower, {"dtype": dtype, "attention": "eager"}, torch.get_num_threads())
    assert (peer.device, peer.precision, peer.simulated) == ("cpu", dtype, False)
    assert "eager" in peer.about
    patches = np.random.default_rng(0).standard_normal((GRID.patches, tower.patch_width), dtype=np.float32)
    prepared = peer.prepare(patches)
    assert prepared.dtype == getattr(torch, dtype)
    embeddings = peer.run(prepared, GRID)
    assert embeddings.dtype == getattr(torch, dtype)
    with open_encoder(tiny, backend="onnxrt") as encoder:  # which shares no arithmetic with it
        expected = encoder.encode(patches, [GRID])
    error = np.linalg.norm(as_numpy(embeddings) - expected) / np.linalg.norm(expected)
    assert error < tolerance


def test_transformers_peer_says_which_towers_it_takes(tiny):
    tower = open_tower(tiny)
    (program,) = tower.programs([CHECKPOINT])
    unknown = replace(program, configuration={"architectures": ["NoSuchModel"]})
    with pytest.raises(ConfigurationError, match=r"no vision tower for NoSuchModel.*Leave the peer out"):
        open_peer(
            "transformers", SimpleNamespace(programs=lambda _: [unknown]), {"dtype": "float32"}, torch.get_num_threads()
        )


def test_vllms_peer_says_which_towers_it_takes():
    with pytest.raises(
        ConfigurationError, match="supports only towers of family qwen2_5_vl; this one belongs to qwen2_vl"
    ):
        open_peer("vllm", SimpleNamespace(family="qwen2_vl"), {"dtype": "float32"}, torch.get_num_threads())
