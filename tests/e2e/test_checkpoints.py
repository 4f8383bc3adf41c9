"""Each way to store a checkpoint is served as stock vLLM serves it, or refused with a reason."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

OURS = {"VISIONACCEL_BACKEND": "torch_ref", "VISIONACCEL_MODE": "inline"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A way to store the digits checkpoint.

    Attributes:
        files: Makes the tensors of each file out of those of the checkpoint.
        indexed: Write an index of these files' tensors, with a language-model tensor that none of them holds.
        stale: Leave a `model.safetensors` there whose weights are others.
        vision: Changes of the vision configuration.
        refusal: What our refusal says; None for a checkpoint that is served.
    """

    files: Callable[[Tensors], Mapping[str, Tensors]]
    indexed: bool = False
    stale: bool = False
    vision: Mapping[str, Any] | None = None
    refusal: str | None = None


def in_two(tensors: Tensors) -> Mapping[str, Tensors]:
    names = sorted(tensors)
    return {f"part-{n}.safetensors": {name: tensors[name] for name in names[n::2]} for n in range(2)}


def with_queries_apart(tensors: Tensors) -> Mapping[str, Tensors]:
    for name in [name for name in tensors if name.startswith("visual.") and ".attn.qkv." in name]:
        for part, values in zip("qkv", np.split(tensors.pop(name), 3), strict=True):
            tensors[name.replace(".qkv.", f".{part}.")] = values
    return in_two({**tensors, "visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32)})


def with_gate_and_up_joined(tensors: Tensors) -> Mapping[str, Tensors]:
    for name in [name for name in tensors if name.startswith("visual.") and ".gate_proj." in name]:
        both = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
        tensors[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(both)
    return in_two(tensors)


def with_fp8(tensors: Tensors) -> Mapping[str, Tensors]:
    name = "visual.blocks.0.attn.proj.weight"
    scales = {f"{name}_scale": np.ones(1, np.float32)}
    return {SINGLE: {**tensors, **scales, name: tensors[name].astype(ml_dtypes.float8_e4m3fn)}}


def with_adapter(tensors: Tensors) -> Mapping[str, Tensors]:
    return {SINGLE: {**tensors, "visual.blocks.0.attn.proj.lora_A.weight": np.ones((2, 2), np.float32)}}


KINDS = {
    "an index, a stale single file, queries apart, and a buffer": Kind(with_queries_apart, indexed=True, stale=True),
    "shards without an index, gate and up joined, full attention beyond the last block": Kind(
        with_gate_and_up_joined, vision={"fullatt_block_indexes": [1, 31]}
    ),
    "a quantised tower": Kind(with_fp8, refusal="the vision tower is quantised: 'visual.blocks.0.attn.proj.weight'"),
    "an adapter that is not merged": Kind(with_adapter, refusal="lora_A.weight' is part of an adapter"),
}


def stored(digits: Path, kind: Kind, folder: Path) -> Path:
    """The digits checkpoint, stored in that way."""
    shutil.copytree(digits, folder)
    tensors = load_file(folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= kind.vision or {}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / SINGLE).unlink()
    if kind.stale:
        save_file({name: values * np.float32(0.5) for name, values in tensors.items()}, folder / SINGLE)
    files = kind.files(dict(tensors))
    for name, part in files.items():
        save_file(part, folder / name)
    if kind.indexed:
        weight_map = {name: file for file, part in files.items() for name in part}
        weight_map["model.layers.99.mlp.up_proj.weight"] = next(iter(files))
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_served_as_by_stock_vllm_or_refused(ask, digits, tmp_path, name):
    kind = KINDS[name]
    folder = stored(digits, kind, tmp_path / "checkpoint")
    ours = ask(OURS, "few", folder)
    if kind.refusal is not None:
        assert ours["status"] != 0
        assert kind.refusal in ours["log"]
        return
    assert ours["status"] == 0, ours["log"][-4000:]
    assert "the vision encoder runs on backend 'torch_ref'" in ours["log"]
    theirs = ask({}, "few", folder)
    assert theirs["status"] == 0, theirs["log"][-4000:]
    for part, expected in theirs["parts"].items():
        assert [answer["tokens"] for answer in ours["parts"][part]] == [answer["tokens"] for answer in expected]
        for answer, stock in zip(ours["parts"][part], expected, strict=True):
            assert answer["logprobs"] == pytest.approx(stock["logprobs"], rel=0, abs=1e-4)


@pytest.fixture(scope="module")
def retrained(digits, tmp_path_factory):
    """The digits checkpoint with other vision weights."""
    folder = Path(shutil.copytree(digits, tmp_path_factory.mktemp("retrained") / "checkpoint"))
    tensors = load_file(folder / SINGLE)
    for name in tensors:
        if name.startswith("visual.") and name.endswith("down_proj.weight"):
            tensors[name] = tensors[name] * np.float32(1.3)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def test_what_is_served_decides_an_overridden_configuration_and_weights_that_were_reloaded(ask, retrained):
    settings = {"RELOAD_FROM": str(retrained)}
    theirs = ask(settings, "replaced")
    assert theirs["status"] == 0, theirs["log"][-4000:]
    ours = ask({**settings, "VISIONACCEL_BACKEND": "onnxrt"}, "replaced")
    assert ours["status"] == 0, ours["log"][-4000:]
    for part, expected in theirs["parts"].items():
        assert [answer["tokens"] for answer in ours["parts"][part]] == [answer["tokens"] for answer in expected]
        for answer, stock in zip(ours["parts"][part], expected, strict=True):
            assert answer["logprobs"] == pytest.approx(stock["logprobs"], rel=0, abs=1e-4)
    assert theirs["refusal"] is None
    assert "was given new weights for the vision encoder, such as 'merger.ln_q.weight'" in ours["refusal"]
    finish_reason, reason = ours["after"]
    assert finish_reason == "error"
    assert "was given new weights for the vision encoder" in reason
