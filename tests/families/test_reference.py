"""Every family's tower equals transformers' own, for generated lists of grids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel_testing.checkpoints import TINY_TOWERS, random_checkpoint

FAMILIES = sorted(TINY_TOWERS.keys() - {"dots_ocr"})  # of which transformers has no class
SIDES = st.integers(1, 12).map(lambda tokens: 2 * tokens)
GRIDS = st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=3)


@pytest.fixture(scope="module", params=FAMILIES)
def tower(request, tmp_path_factory):
    """A checkpoint of the family, its configuration, and an encoder."""
    family = request.param
    folder = random_checkpoint(tmp_path_factory.mktemp(family), family=family)
    with open_encoder(folder, backend="torch_ref", isolation="none") as encoder:
        yield folder, TINY_TOWERS[family], encoder


@given(grids=GRIDS, seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_the_embeddings_are_those_of_transformers(tower, grids, seed):
    folder, config, encoder = tower
    patches = random_patches(grids, config, seed)
    found, exact = np.asarray(encoder.encode(patches, grids)), reference(folder, patches, grids)
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
