"""A description that no tower can have is refused with the field's name, and equal towers have equal descriptions."""

import json
from dataclasses import replace

import pytest

from visionaccel.encoder import open_tower
from visionaccel.towers import Activation, Linear, Merge, Norm, Positions


@pytest.fixture(scope="module")
def spec(tiny):
    return open_tower(tiny).spec


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"patch": 0}, "patch must be positive"),
        ({"depth": 2**21}, "depth is 2097152; no size may be over"),
        ({"window": 2**12}, "window: windows may have no more than 16384 patches"),
        ({"heads": 5}, "hidden must be divisible by heads"),
        ({"heads": 16}, "the width of a head must be divisible by 4"),
        ({"rotary_base": 0.0}, "rotary_base must be positive"),
        ({"full_blocks": (3,)}, "full_blocks must be blocks of the tower"),
        ({"deepstack": (1,)}, "deepstack_merger must be there with deepstack alone"),
        ({"positions": Positions("table", 0, "bilinear", align_corners=True)}, r"positions\.side must be positive"),
        ({"embed": (Activation("gelu"),)}, "embed"),
        ({"norm1": Norm("norm1", "rms", 33)}, "norm1, qkv: .* is given rows of 32"),
        ({"proj": Linear("attn.proj", 32, 31)}, "proj gives rows of 31"),
        ({"mlp": (Activation("silu"),)}, "mlp must end with a linear layer"),
        ({"merger": (Linear("merger", 32, 24),)}, "merger gives rows of 24 and merges 0 times"),
        ({"merger": (Merge(), Merge(), Linear("merger", 512, 24))}, "merger gives rows of 24 and merges 2 times"),
        ({"out": 25}, "merger gives rows of 24"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_tower_can_be_is_refused_by_its_field(spec, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(spec, **change)


def test_the_document_is_json_and_tells_towers_apart(spec):
    assert json.loads(json.dumps(spec.document())) == spec.document() == replace(spec).document()
    other = replace(spec, full_blocks=(0, 2))
    assert other.document() != spec.document()
    assert spec.differing(other) == "full_blocks [1] and not [0, 2]"
    assert spec.differing(replace(spec)) == ""


def test_a_deepstack_tower_hands_over_all_levels_side_by_side(spec):
    levels = replace(spec, deepstack=(2, 0), deepstack_merger=spec.merger)
    assert (levels.out, levels.out_width) == (24, 72)
    assert [levels.levels_after(block) for block in range(3)] == [(1,), (), (0,)]
    assert "deepstack.1.merger.mlp.2.bias" in levels.shapes()
