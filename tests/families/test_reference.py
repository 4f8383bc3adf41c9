"""Every family's tower equals transformers' own, for generated lists of grids."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.validation import REFERENCE_OPTIONS
from visionaccel_testing.checkpoints import ARCHITECTURES, TINY_TOWERS, random_checkpoint

WITH_EXPERTS = {
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "Glm4vMoeForConditionalGeneration": "glm4v",
}
FAMILIES = {name: family for family, name in ARCHITECTURES.items() if family != "dots_ocr"} | WITH_EXPERTS
"""Families by architecture; transformers has no class of dots.ocr."""

GRIDS = st.lists(
    st.tuples(st.integers(1, 3), *(2 * [st.integers(1, 12).map(lambda tokens: 2 * tokens)])), min_size=1, max_size=3
)


@pytest.fixture(scope="module", params=FAMILIES)
def tower(request, tmp_path_factory):
    """A checkpoint of the family, its configuration, and an encoder."""
    family = FAMILIES[request.param]
    folder = random_checkpoint(tmp_path_factory.mktemp(request.param), family=family)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "architectures": [request.param]}))
    with open_encoder(folder, backend="torch_ref", isolation="none") as encoder:
        yield folder, TINY_TOWERS[family], encoder


def assert_equal(found, exact):
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()


@given(grids=GRIDS, seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_the_embeddings_are_those_of_transformers(tower, grids, seed):
    folder, config, encoder = tower
    patches = random_patches(grids, config, seed)
    assert_equal(np.asarray(encoder.encode(patches, grids)), reference(folder, patches, grids))


def test_the_reference_of_validation_is_transformers_own_tower(tower):
    folder, config, _ = tower
    grids = [(2, 12, 10), (1, 4, 4)]
    patches = random_patches(grids, config)
    with open_encoder(folder, backend="torch_ref", options=REFERENCE_OPTIONS, isolation="none") as encoder:
        assert_equal(np.asarray(encoder.encode(patches, grids)), reference(folder, patches, grids))
