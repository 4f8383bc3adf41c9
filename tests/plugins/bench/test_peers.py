"""Peers of the encode benchmark: transformers' towers of any family, and which towers vLLM's peer takes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import Grid
from visionaccel.errors import ConfigurationError
from visionaccel_bench.encode.peers import open_peer

GRID = Grid(1, 4, 8)
OPTIONS = {"dtype": "float32"}


@pytest.fixture
def qwen2_vl(tmp_path):
    """A tower of a family that vision encoders here need not know, its checkpoint, and transformers' own of it."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 16, "patch_size": 4}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    config = {**model.config.to_dict(), "architectures": ["Qwen2VLForConditionalGeneration"]}
    tower = model.model.visual
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"visual.{name}": weight for name, weight in tower.state_dict().items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    described = SimpleNamespace(
        checkpoint=checkpoint, family="qwen2_vl", weights={}, stored_names=frozenset(checkpoint.tensors)
    )
    return described, tower


def test_transformers_takes_the_family_from_the_checkpoint(qwen2_vl):
    described, tower = qwen2_vl
    peer = open_peer("transformers", described, OPTIONS, torch.get_num_threads())
    patches = np.random.default_rng(0).standard_normal((GRID.patches, 3 * 2 * 4 * 4), dtype=np.float32)
    with torch.inference_mode():
        expected = tower(torch.from_numpy(patches), torch.tensor([GRID.thw])).pooler_output
    np.testing.assert_allclose(peer.read(peer.run(peer.prepare(patches), GRID)), expected, atol=1e-5)


def test_a_weight_that_is_missing_is_named(qwen2_vl):
    described, _ = qwen2_vl
    described.stored_names -= {"visual.merger.ln_q.weight"}
    with pytest.raises(ConfigurationError, match=r"does not hold merger\.ln_q\.weight"):
        open_peer("transformers", described, OPTIONS, torch.get_num_threads())


def test_vllms_peer_says_which_towers_it_takes(qwen2_vl):
    with pytest.raises(ConfigurationError, match="takes towers of family qwen2_5_vl, and this one is of qwen2_vl"):
        open_peer("vllm", qwen2_vl[0], OPTIONS, torch.get_num_threads())
