"""The fast torch tower is transformers' tower: on every grid, in both dtypes, packed or not, and to the same bits."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from safetensors.numpy import load_file, save_file

from strategies import grid_lists
from towers import lowest_cosine, random_patches, reference
from visionaccel import open_encoder
from visionaccel.bundle import ProgramRequest, export_bundle, open_bundle
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import Grid, as_grids
from visionaccel.core.packed_products import PackedWeight
from visionaccel.core.program import CHECKPOINT, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import (
    BackendUnavailableError,
    CheckpointError,
    PluginError,
    SettingsError,
    UnsupportedArchitectureError,
)
from visionaccel.families import family_named
from visionaccel.families.qwen2_5_vl import FAMILY
from visionaccel.towers import Norm, Tower, make_tables, tower_tables
from visionaccel_testing.checkpoints import TINY, TINY_TOWERS, random_checkpoint
from visionaccel_torch_ref import linear
from visionaccel_torch_ref.backend import TorchReferenceBackend, TorchReferenceOptions
from visionaccel_torch_ref.layout import Layouts
from visionaccel_torch_ref.linear import ACTIVATIONS, PackedLinear, PlainLinear, make_linear, why_not_packed
from visionaccel_torch_ref.reference import TransformersTower

EVERY_TRAIT = [(1, 12, 10), (3, 6, 18), (1, 16, 16), (2, 2, 2), (1, 12, 10)]
"""Whole and partial windows, videos, grids that repeat, and windows of one size in several items."""


def opened(checkpoint, **options):
    return open_encoder(checkpoint, backend="torch_ref", options=options)


def relative_error(ours, exact):
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


@pytest.fixture(params=["packed", "plain"])
def linears(request, monkeypatch):
    """With oneDNN's packed products, and as where there are none."""
    if request.param == "plain":
        monkeypatch.setattr(linear, "why_not_packed", lambda *_: "for a test")
    elif why_not_packed(torch.float32, "cpu") is not None:
        pytest.skip(str(why_not_packed(torch.float32, "cpu")))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def fast(request, tiny):
    with opened(tiny, attention=request.param) as encoder:
        yield encoder


@given(triples=grid_lists())
@example(triples=EVERY_TRAIT)
@example(triples=[(1, 2, 2)])
@example(triples=[(1, 2, 66), (1, 66, 2)])
@hypothesis_settings(max_examples=40)
def test_float32_equals_transformers(tiny, fast, triples):
    patches = random_patches(triples)
    ours, exact = fast.encode(patches, triples), reference(tiny, patches, triples)
    assert relative_error(ours, exact) < 3e-6
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


@given(triples=grid_lists())
@example(triples=EVERY_TRAIT)
@hypothesis_settings(max_examples=15)
def test_bfloat16_is_as_near_as_transformers_own(tiny, triples):
    patches = random_patches(triples)
    exact = reference(tiny, patches, triples)
    with opened(tiny, dtype="bfloat16") as fast, opened(tiny, dtype="bfloat16", implementation="transformers") as own:
        ours, theirs = fast.encode(patches, triples), own.encode(patches, triples)
    # Both err at random by their own rounding: in all tokens together alike, in the worst of a few not exactly.
    assert relative_error(ours, exact) < 1.25 * relative_error(theirs, exact)
    assert 1 - lowest_cosine(ours, exact) < 2.5 * (1 - lowest_cosine(theirs, exact))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_or_not_it_is_the_same_tower(tiny, linears, dtype):
    patches = random_patches(EVERY_TRAIT)
    with opened(tiny, dtype=dtype) as encoder:
        ours, exact = encoder.encode(patches, EVERY_TRAIT), reference(tiny, patches, EVERY_TRAIT)
    assert relative_error(ours, exact) < (3e-6 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_heads": 4, "hidden_size": 48, "intermediate_size": 35},
        {"fullatt_block_indexes": []},
        {"fullatt_block_indexes": [0, 1, 2]},
        {"window_size": 16, "out_hidden_size": 7},
    ],
    ids=["heads", "windows only", "full only", "small windows"],
)
def test_sizes_come_from_the_configuration(tmp_path, changed):
    checkpoint = random_checkpoint(tmp_path / "tower", {**TINY, **changed})
    patches = random_patches(EVERY_TRAIT)
    with opened(checkpoint) as encoder:
        ours, exact = encoder.encode(patches, EVERY_TRAIT), reference(checkpoint, patches, EVERY_TRAIT)
    assert relative_error(ours, exact) < 3e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["fast", "transformers"])
def test_the_same_inputs_give_the_same_bits_whatever_came_between(tiny, dtype, implementation):
    grids, others = EVERY_TRAIT, [[(1, 20, 22)], [(2, 4, 4), (1, 2, 8)], *([(1, 2, 2 * i)] for i in range(1, 20))]
    patches = random_patches(grids)
    with opened(tiny, dtype=dtype, implementation=implementation) as encoder:
        assert encoder.capabilities.deterministic
        first = encoder.encode(patches, grids)
        for other in others:  # more than there are layouts kept
            encoder.encode(random_patches(other), other)
            np.testing.assert_array_equal(encoder.encode(patches, grids), first)
    with opened(tiny, dtype=dtype, implementation=implementation) as again:
        np.testing.assert_array_equal(again.encode(patches, grids), first)


def test_tensors_are_answered_with_tensors_that_the_caller_owns(tiny):
    patches = torch.from_numpy(random_patches(EVERY_TRAIT))
    with opened(tiny) as encoder:
        first = encoder.encode(patches, EVERY_TRAIT)
        kept = first.clone()
        first.add_(1)
        assert not first.requires_grad
        assert torch.equal(encoder.encode(patches, EVERY_TRAIT), kept)


def test_threads_are_those_of_the_process_from_the_first_call_on(tiny):
    before = torch.get_num_threads()
    try:
        with opened(tiny, threads=before + 1) as encoder:
            assert torch.get_num_threads() == before
            encoder.encode(random_patches(EVERY_TRAIT), EVERY_TRAIT)
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{"threads": 0}, {"implementation": "faster"}, {"attention": "flash"}])
def test_options_that_it_does_not_know_are_refused(tiny, options):
    with pytest.raises(SettingsError):
        opened(tiny, **options)


# Linear layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_packed_products_are_the_plain_ones(dtype, biased, rows):
    if why_not_packed(dtype, "cpu") is not None:
        pytest.skip(str(why_not_packed(dtype, "cpu")))
    rng = torch.Generator().manual_seed(0)
    weight, bias, x, other = (
        torch.randn(shape, generator=rng).to(dtype) for shape in ((44, 36), (44,), (rows, 36), (rows, 44))
    )
    given, wide = (weight, bias if biased else None), (weight.float(), bias.float() if biased else None)
    packed, exact = make_linear(*given), PlainLinear(*wide)
    assert isinstance(packed, PackedLinear)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, expected in (
        (packed(x), exact(x.float())),
        *((packed.activated(x, kind), exact.activated(x.float(), kind)) for kind in ACTIVATIONS),
        (packed.times(x, other), exact.times(x.float(), other.float())),
        (packed.plus(x, other), exact.plus(x.float(), other.float())),
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), expected, rtol=bound, atol=bound)


def test_a_torch_without_the_packed_products_runs_plain(tiny, monkeypatch):
    def broken(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(PackedWeight, "__init__", broken)
    why_not_packed.cache_clear()
    try:
        assert "no such operator" in why_not_packed(torch.float32, "cpu")
        assert isinstance(make_linear(torch.zeros(4, 4), None), PlainLinear)
        with opened(tiny) as encoder:
            patches = random_patches(EVERY_TRAIT)
            ours = encoder.encode(patches, EVERY_TRAIT)
        assert relative_error(ours, reference(tiny, patches, EVERY_TRAIT)) < 3e-6
    finally:
        why_not_packed.cache_clear()


def test_packed_products_with_another_meaning_are_not_used(monkeypatch):
    monkeypatch.setattr(PackedWeight, "binary", lambda self, x, *_: self.unary(x))
    why_not_packed.cache_clear()
    try:
        assert "differ from plain ones" in why_not_packed(torch.float32, "cpu")
    finally:
        why_not_packed.cache_clear()


# Tables


@given(triples=grid_lists())
@example(triples=EVERY_TRAIT)
@hypothesis_settings(max_examples=40)
def test_frame_order_brings_the_frames_together_and_in_order(tiny, triples):
    spec = open_tower(tiny).spec
    grids = as_grids(triples, 2)
    tables = tower_tables(spec, grids)
    grouped = make_tables(spec, grids, grouped=True)
    rows = len(tables["rotary_cos"])
    np.testing.assert_array_equal(np.sort(tables["frame_order"]), np.arange(rows))
    np.testing.assert_array_equal(tables["window_index"], grouped["window_index"])
    # The input row of each place of the frame order: frame after frame, each with its own rows.
    source = (tables["window_index"][:, None] * 4 + np.arange(4)).ravel()[tables["frame_order"]]
    start = 0
    for length in tables["frame_lengths"]:
        assert set(source[start : start + length]) == set(range(start, start + length))
        start += length
    assert start == rows


def test_layouts_are_made_once_for_a_list_of_grids_and_windows_of_a_size_are_one_run(tiny):
    (program,) = open_tower(tiny).programs([CHECKPOINT])
    layouts = Layouts(program, "cpu")
    grids = as_grids([(1, 12, 10), (1, 16, 16)])
    assert layouts.of(grids) is layouts.of(list(grids))
    layout = layouts.of(grids)
    assert [(run.count, run.length) for run in layout.windows] == [(5, 64), (1, 32), (1, 16), (1, 8)]
    assert layouts.of(grids[:1]).frame_order is None, "one frame needs no order"


# Opening


@pytest.mark.parametrize("implementation", ["fast", "transformers"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"depth": 4}, "blocks.3"),
        ({"depth": 2, "fullatt_block_indexes": [1]}, "blocks.2"),
        ({"intermediate_size": 40}, "blocks.0.mlp"),
        ({"out_hidden_size": 23}, "merger.mlp.2"),
    ],
)
def test_weights_of_another_model_are_refused(tiny, tmp_path, implementation, changed, said):
    other = random_checkpoint(tmp_path / "other", {**TINY, **changed})
    (other / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=rf"(?s)do not fit the configuration.*{said}"):
        opened(other, implementation=implementation)


def test_shards_and_stored_bfloat16_are_read(tmp_path):
    checkpoint = random_checkpoint(tmp_path / "shards", dtype="bfloat16", shards=3, prefix="model.visual.")
    patches = random_patches(EVERY_TRAIT)
    with opened(checkpoint) as encoder:
        ours = encoder.encode(patches, EVERY_TRAIT)
    assert relative_error(ours, reference(checkpoint, patches, EVERY_TRAIT)) < 3e-6


def test_a_program_without_tables_is_refused(tiny):
    (program,) = open_tower(tiny).programs([CHECKPOINT])
    with pytest.raises(PluginError, match="has no tables"):
        TorchReferenceBackend().open(replace(program, tables=None), None, TorchReferenceOptions())


def test_transformers_is_needed_by_its_own_form_only(tiny, monkeypatch):
    monkeypatch.setattr(
        "visionaccel_torch_ref.backend.find_spec", lambda name: None if name == "transformers" else name
    )
    with opened(tiny) as encoder:
        assert len(encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])) == 4
    with pytest.raises(BackendUnavailableError, match="pip install transformers"):
        opened(tiny, implementation="transformers")


def test_the_fast_tower_imports_no_transformers(tiny):
    code = (
        "import sys; from visionaccel import open_encoder; "
        f"open_encoder({str(tiny)!r}, backend='torch_ref').close(); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def glm4v(folder, vision=None, place="vision_config", **document):
    """A tower of GLM-4.6V, or of a model with another vision configuration and document."""
    checkpoint = Checkpoint(random_checkpoint(folder, family="glm4v"))
    vision = {**TINY_TOWERS["glm4v"], "model_type": "glm4v_vision", **(vision or {})}
    checkpoint.config = {"architectures": ["Glm46VForConditionalGeneration"], **document, place: vision}
    return Tower(replace(family_named("glm4v"), config=(place,)), checkpoint)


def test_the_reference_finds_a_tower_that_the_model_names_by_its_type_only(tmp_path):
    """GLM-4.6V states no class for its vision configuration: the configuration's `model_type` does."""
    patches = random_patches([(1, 4, 4)], TINY_TOWERS["glm4v"])
    with opened(glm4v(tmp_path), implementation="transformers") as encoder:
        ours = encoder.encode(patches, [(1, 4, 4)])
    random_checkpoint(tmp_path / "same", family="glm4v")
    exact = reference(tmp_path / "same", patches, [(1, 4, 4)])
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


def test_the_reference_finds_a_model_that_is_known_by_its_type_only(tmp_path):
    """Released checkpoints of Qwen2.5-Omni name an architecture that transformers does not have."""
    folder = random_checkpoint(tmp_path, family="qwen2_5_omni")
    checkpoint, patches = Checkpoint(folder), random_patches(EVERY_TRAIT)
    exact = reference(folder, patches, EVERY_TRAIT)
    checkpoint.config = {**checkpoint.config, "architectures": ["Qwen2_5OmniModel"]}
    with opened(Tower(family_named("qwen2_5_omni"), checkpoint), implementation="transformers") as encoder:
        assert relative_error(encoder.encode(patches, EVERY_TRAIT), exact) < 3e-6


@pytest.mark.parametrize(
    ("vision", "place"),
    [({"model_type": None}, "vision_config"), ({"model_type": "new"}, "vision_config"), ({}, "v")],
)
def test_a_tower_that_transformers_does_not_find_has_no_reference(tmp_path, vision, place):
    with pytest.raises(UnsupportedArchitectureError, match="no vision tower for Glm46VForConditionalGeneration"):
        opened(glm4v(tmp_path, vision, place), implementation="transformers")


def test_a_bundle_holds_the_weights_under_a_prefix_of_its_family(tiny, tmp_path, monkeypatch):
    family = replace(FAMILY, prefixes=(*FAMILY.prefixes, "eye."))
    for module in ("bundle", "export"):
        monkeypatch.setattr(f"visionaccel.bundle.{module}.tower_of", partial(Tower, family))
    requests = [ProgramRequest(FixedGrid(Grid(1, 4, 4)))]
    tower = Tower(family, Checkpoint(tiny))
    export_bundle(tower, tmp_path / "bundle", requests, self_contained=True)
    held = open_bundle(tmp_path / "bundle").tower
    assert all(tensor.name.startswith("eye.") for tensor in held.weights.values())
    assert held.weights.keys() == tower.weights.keys()


@pytest.mark.parametrize(
    ("place", "said"),
    [("", "uses other names for the weights of the tower"), ("merger.", "two whose names end with it")],
)
def test_weights_that_are_stored_under_names_that_transformers_does_not_know_have_no_reference(tmp_path, place, said):
    folder = random_checkpoint(tmp_path, family="qwen3_vl")
    stored = load_file(folder / "model.safetensors")
    renamed = {name.replace("deepstack_merger_list.0.", f"levels.0.{place}"): array for name, array in stored.items()}
    save_file(renamed, folder / "model.safetensors")
    family = family_named("qwen3_vl")
    others = {f"levels.{{n}}.{place}{own.rpartition('{n}.')[2]}": own for own in family.names.values()}
    tower = Tower(replace(family, names={**family.names, **others}), Checkpoint(folder))
    with pytest.raises(UnsupportedArchitectureError, match=said):
        opened(tower, implementation="transformers")


def test_a_fault_of_a_familys_description_shows_against_the_reference(tiny):
    """The reference shares neither the description nor the tables with what it judges."""
    tower = open_tower(tiny)
    patches, exact = random_patches(EVERY_TRAIT), reference(tiny, random_patches(EVERY_TRAIT), EVERY_TRAIT)
    for fault in (
        {"rotary_base": 500.0},
        {"window": None, "full_blocks": ()},
        {"norm1": Norm("norm1", "rms", 32, 1e-1)},
        {"mlp": (replace(tower.spec.mlp[0], activation="gelu"),)},
    ):
        tower.spec = replace(open_tower(tiny).spec, **fault)
        with opened(tower, implementation="transformers") as judge, opened(tower) as judged:
            np.testing.assert_allclose(judge.encode(patches, EVERY_TRAIT), exact, rtol=0, atol=1e-5)
            assert relative_error(judged.encode(patches, EVERY_TRAIT), exact) > 1e-3


def test_a_tower_that_transformers_does_not_have_has_no_reference(tiny):
    checkpoint = Checkpoint(tiny)
    checkpoint.config = {**checkpoint.config, "architectures": ["ThirdPartyModel"], "model_type": "third_party"}
    with pytest.raises(UnsupportedArchitectureError, match="no vision tower for ThirdPartyModel"):
        opened(Tower(FAMILY, checkpoint), implementation="transformers")


def test_the_reference_is_used_where_it_is_asked_for(tiny):
    with opened(tiny, implementation="transformers") as encoder:
        assert isinstance(encoder.programs[0].session._tower, TransformersTower)
