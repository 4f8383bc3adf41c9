"""Every family's tower equals transformers' own, for generated lists of grids."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import write_bundle
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import default_registry
from visionaccel.bundle import open_bundle
from visionaccel.validation import open_reference
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
def test_the_embeddings_are_those_of_transformers(tower, grids, seed, ran):
    folder, config, encoder = tower
    patches = random_patches(grids, config, seed)
    assert_equal(np.asarray(encoder.encode(patches, grids)), reference(folder, patches, grids))
    ran(encoder.tower.family, "torch_ref", "any grid")


def test_the_reference_of_validation_is_transformers_own_tower(tower, tmp_path):
    folder, config, _ = tower
    grids = [(2, 12, 10), (1, 4, 4)]
    patches = random_patches(grids, config)
    exact = reference(folder, patches, grids)
    bundle = open_bundle(write_bundle(folder, tmp_path / "bundle", "4x4", self_contained=True))
    for source in (folder, bundle.tower):
        encoder, independent = open_reference(source, default_registry())
        with encoder:
            assert independent
            assert_equal(np.asarray(encoder.encode(patches, grids)), exact)


def test_without_transformers_class_the_reference_is_the_packages_own_tower_and_says_so(tmp_path, caplog):
    folder = random_checkpoint(tmp_path / "checkpoint", family="dots_ocr")
    bundle = open_bundle(write_bundle(folder, tmp_path / "bundle", "4x4", self_contained=True))
    for source in (folder, bundle.tower):
        encoder, independent = open_reference(source, default_registry())
        with encoder:
            assert not independent
            assert "no vision tower for DotsOCRForCausalLM. The reference is visionaccel's own" in caplog.text
        caplog.clear()
