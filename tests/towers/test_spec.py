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
        ({"patch": 0}, "patch is 0; it must be from 1 to"),
        ({"depth": 2**21}, "depth is 2097152; it must be from 1 to"),
        ({"window": 2**12}, "window: windows may have no more than 16384 patches"),
        ({"heads": 5}, "hidden must be divisible by heads"),
        ({"heads": 16}, "the width of a head must be divisible by 4"),
        ({"rotary_base": 0.0}, "rotary_base must be positive"),
        ({"full_blocks": (3,)}, "full_blocks must name blocks of the tower"),
        ({"deepstack": (1,)}, "deepstack and deepstack_merger must be set together"),
        (
            {"positions": Positions("table", 0, "bilinear", align_corners=True)},
            r"positions\.side is 0; it must be from 1 to",
        ),
        ({"embed": (Activation("gelu"),)}, "embed"),
        ({"norm1": Norm("norm1", "rms", 33)}, "norm1, qkv: .* does not take rows of width 32"),
        ({"proj": Linear("attn.proj", 32, 31)}, "proj returns rows of width 31"),
        ({"mlp": (Activation("silu"),)}, "mlp must end with a linear layer"),
        ({"merger": (Linear("merger", 32, 24),)}, "merger returns rows of width 24 and merges 0 times"),
        (
            {"merger": (Merge(), Merge(), Linear("merger", 512, 24))},
            "merger returns rows of width 24 and merges 2 times",
        ),
        ({"out": 25}, "merger returns rows of width 24"),
        ({"depth": 1025}, "depth: a tower may have no more than 1024 blocks"),
        ({"depth": True}, "depth is True; it must be of type int"),
        ({"patch": 4.0}, r"patch is 4\.0; it must be of type int"),
        ({"window": "2"}, "window is '2'; it must be int or NoneType"),
        ({"rotary_base": float("nan")}, "rotary_base is nan; it must be a finite number"),
        ({"full_blocks": [1]}, r"full_blocks is \[1\]; it must be a tuple"),
        ({"full_blocks": (1.0,)}, r"full_blocks\[0\] is 1\.0; it must be of type int"),
        ({"norm1": Norm("norm1", "batch", 32)}, "norm1.kind is 'batch'; it must be 'layer' or 'rms'"),
        ({"norm1": Norm("norm1", "rms", 32, 0.0)}, "norm1, qkv: epsilon of norm1 is 0.0; it must be positive"),
        ({"norm2": Norm("norm2", "rms", 32, float("inf"))}, "norm2.epsilon is inf; it must be a finite number"),
        ({"proj": Linear("attn.proj", 32, 32, bias=1)}, "proj.bias is 1; it must be of type bool"),
        ({"proj": Linear("attn.proj", 32, 32, kernel=3)}, "kernel of attn.proj is 3; it must be merge"),
        ({"mlp": (Activation("relu"),)}, r"mlp\[0\].kind is 'relu'; it must be 'gelu' or"),
        ({"mlp": ("linear",)}, r"mlp\[0\] is 'linear'; it must be Norm or Linear"),
        (
            {"merger": (Merge(), Linear("m", 128, 128), Linear("m", 128, 24))},
            "merger: two steps have the same name",
        ),
        ({"norm2": Norm("norm1", "rms", 32)}, "norm1, qkv, proj, norm2, mlp: two steps have the same name"),
        ({"proj": Linear("mlp.up_proj", 32, 32)}, "norm1, qkv, proj, norm2, mlp: two steps have the same name"),
        (
            {"positions": Positions("patch_embed.proj", 4, "bilinear", align_corners=True)},
            "embed, positions, merger: two steps have the same name",
        ),
        (
            {"merger": (Merge(), Linear("patch_embed.proj", 128, 24))},
            "embed, positions, merger: two steps have the same name",
        ),
        (
            {"deepstack": (1,), "deepstack_merger": (Merge(), Linear("m", 128, 128), Linear("m", 128, 24))},
            "deepstack_merger: two steps have the same name",
        ),
        (
            {"merger": (Merge(), Linear("blocks.0.attn.proj", 128, 24))},
            "embed, positions, merger: blocks.0.attn.proj is reserved for blocks",
        ),
        ({"positions": Positions("p", 4, "nearest", align_corners=True)}, "positions.mode is 'nearest'"),
        ({"mlp": ()}, "mlp must end with a linear layer"),
        ({"embed": ()}, "embed has no step"),
        ({"merger": ()}, "merger has no step"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_tower_can_be_is_refused_by_its_field(spec, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(spec, **change)


def test_the_document_is_json_and_tells_towers_apart(spec):
    document = spec.document()
    assert json.loads(json.dumps(document)) == document == replace(spec).document()
    assert {"deepstack", "positions", "rotary_base"}.isdisjoint(document), "an older reader may not know the field"
    assert document["norm1"] == {"step": "norm", "name": "norm1", "kind": "rms", "width": 32}
    assert replace(spec, rotary_base=500.0).document() == {**document, "rotary_base": 500.0}
    other = replace(spec, full_blocks=(0, 2))
    assert other.document() != spec.document()
    assert spec.differing(other) == "full_blocks is [1], not [0, 2]"
    assert spec.differing(replace(spec)) == ""


def test_a_deepstack_tower_hands_over_all_levels_side_by_side(spec):
    levels = replace(spec, deepstack=(2, 0), deepstack_merger=spec.merger)
    assert (levels.out, levels.out_width) == (24, 72)
    assert [levels.levels_after(block) for block in range(3)] == [(1,), (), (0,)]
    assert "deepstack.1.merger.mlp.2.bias" in levels.shapes()
