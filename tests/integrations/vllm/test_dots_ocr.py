"""The tower of dots.ocr, of which transformers has no class, is vLLM's own."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from strategies import grid_lists
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.families import family_named
from visionaccel_testing.checkpoints import TINY_TOWERS, random_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.models.dots_ocr import DotsOCRForCausalLM, DotsVisionTransformer
    from vllm.model_executor.models.utils import AutoWeightsLoader
    from vllm.transformers_utils.configs.dotsocr import DotsVisionConfig

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = TINY_TOWERS["dots_ocr"]


@pytest.fixture(scope="module")
def process_groups(tmp_path_factory):
    """vLLM's layers use its process groups even in a single process."""
    with set_current_vllm_config(VllmConfig()):
        store = tmp_path_factory.mktemp("groups") / "store"
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module", params=[False, True], ids=["released", "with biases"])
def towers(request, process_groups, tmp_path_factory):
    """An encoder, and vLLM's tower with the same weights."""
    config = {**TINY, "use_bias": request.param}
    folder = random_checkpoint(tmp_path_factory.mktemp("dots"), config, family="dots_ocr")
    theirs = DotsVisionTransformer(DotsVisionConfig(**config), prefix="vision_tower")
    stored = {
        name.removeprefix("vision_tower."): weight for name, weight in load_file(folder / "model.safetensors").items()
    }
    loaded = AutoWeightsLoader(theirs).load_weights(stored.items(), mapper=DotsOCRForCausalLM.hf_to_vllm_mapper)
    assert loaded == {name for name, _ in theirs.named_parameters()}
    for layer in theirs.modules():
        if hasattr(layer, "quant_method"):
            layer.quant_method.process_weights_after_loading(layer)
    with open_encoder(folder, backend="torch_ref", isolation="none") as encoder:
        yield encoder, theirs


@given(triples=grid_lists(most_frames=1))
@settings(max_examples=15)
def test_embeddings_are_those_of_vllms_tower(towers, triples, ran):
    encoder, theirs = towers
    patches = random_patches(triples, TINY)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # or vLLM compiles for each shape
        exact = theirs(torch.from_numpy(patches.copy()), [list(each) for each in triples]).numpy()
    ours = np.asarray(encoder.encode(patches, triples))
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()
    ran("dots_ocr", "torch_ref", "any grid")


def test_defaults_are_vllms():
    theirs = DotsVisionConfig()
    for name, value in family_named("dots_ocr").defaults.items():
        assert getattr(theirs, name) == value, name
