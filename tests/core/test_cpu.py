"""A CPU without bfloat16 instructions: what is asked for by name is said to be emulated, and `auto` avoids it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from visionaccel import open_encoder
from visionaccel.backends import Accepted, default_registry, select
from visionaccel.bundle import ProgramRequest, export_bundle, open_bundle
from visionaccel.core import packed_products
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.packed_products import why_not_packed
from visionaccel.core.program import AnyGrid
from visionaccel.encoder import open_tower
from visionaccel.towers import PatchEmbedding

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh():
    """Trials that are made once for a process are made in this test, and once more after it."""
    why_not_packed.cache_clear()
    yield
    why_not_packed.cache_clear()


@pytest.fixture
def without_bfloat16(monkeypatch, fresh):
    monkeypatch.setattr("visionaccel.core.cpu._cpuinfo", lambda: "flags : avx2 fma avx512f avx512_vnni")


@pytest.mark.parametrize(
    ("flags", "limit", "expected"),
    [
        ("flags : fpu avx2 fma", None, False),
        ("flags : fpu avx512f avx512_vnni avx_ne_convert", None, False),  # Cascade Lake: torch converts
        ("flags : avx2 avx512_bf16", None, True),
        ("flags : amx_bf16", "", True),
        ("Features : asimd bf16", None, True),
        ("Features : asimd asimddp", None, False),
        ("flags : avx512_bf16", "AVX2", False),
        ("flags : avx512_bf16", "avx512_core_vnni", False),
        ("flags : avx512_bf16", "AVX512_CORE_BF16", True),
        ("bugs : avx512_bf16", None, False),
    ],
)
def test_bfloat16_is_there_if_the_cpu_multiplies_in_it(monkeypatch, flags, limit, expected):
    monkeypatch.setattr("visionaccel.core.cpu._cpuinfo", lambda: flags)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert has_bfloat16() is expected


def test_nothing_else_asks_torch_for_private_operators():
    asking = {
        str(file.relative_to(ROOT))
        for folder in ("src", "plugins")
        for file in (ROOT / folder).rglob("*.py")
        if "ops.mkldnn" in file.read_text()
    }
    assert asking == {"src/visionaccel/core/packed_products.py"}


@pytest.mark.usefixtures("fresh")
def test_the_hosts_product_is_plain_where_the_packed_one_is_not_what_is_expected(monkeypatch):
    rng = np.random.default_rng(0)
    weight, patches = rng.standard_normal((32, 96), np.float32), rng.standard_normal((24, 96), np.float32)
    right = torch.ops.mkldnn._linear_pointwise

    def wrong(*arguments):
        return right(*arguments) + 1

    wrong.binary = right.binary
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", wrong)
    assert "differ from plain ones" in why_not_packed(torch.float32)
    embedded = PatchEmbedding(weight, "float32", 4, use_torch=True)(patches, np.arange(6))
    np.testing.assert_allclose(embedded.reshape(24, 32), patches @ weight.T, atol=1e-4)


@pytest.mark.usefixtures("without_bfloat16")
def test_the_host_embeds_without_torch_there():
    weight = np.random.default_rng(0).standard_normal((32, 96), np.float32)
    assert not PatchEmbedding(weight, "bfloat16", 4)._torch
    assert PatchEmbedding(weight, "float32", 4)._torch
    assert packed_products.why_not_packed(torch.bfloat16) == "this CPU has no instructions for bfloat16"


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_by_name_is_said_to_be_emulated(tiny, caplog):
    with open_encoder(tiny, backend="torch_ref", options={"dtype": "bfloat16"}) as encoder:
        assert encoder.capabilities.emulated
    assert "'torch_ref' emulates bfloat16" in caplog.text
    with open_encoder(tiny, backend="torch_ref") as encoder:
        assert not encoder.capabilities.emulated


def test_auto_prefers_what_is_not_emulated(tiny, tmp_path, caplog):
    request = ProgramRequest(AnyGrid(), dialect="standard")
    bundle = open_bundle(export_bundle(open_tower(tiny), tmp_path / "b", [request], precision="bfloat16").folder)
    selection = select(default_registry(), bundle)
    verdicts = {candidate.entry.name: candidate.verdict for candidate in selection.candidates}
    assert selection.chosen.entry.name == "openvino"
    if isinstance(verdicts["onnxrt"], Accepted):
        assert "emulated" in verdicts["onnxrt"].notes


NARROWED = """
import json, sys
import numpy as np
from visionaccel import open_encoder
from visionaccel.core.cpu import has_bfloat16
rng = np.random.default_rng(0)
out = {"has": has_bfloat16()}
for name, backend, options in json.loads(sys.argv[2]):
    with open_encoder(sys.argv[1], backend=backend, options=options) as encoder:
        patches = np.random.default_rng(0).standard_normal((64, encoder.tower.patch_width), np.float32)
        rows = encoder.encode(patches, [(1, 8, 8)])
        out[name] = [encoder.capabilities.precision, encoder.capabilities.emulated, np.asarray(rows).tolist()]
print(json.dumps(out))
"""


def test_with_onednn_kept_to_avx2_every_backend_is_right(tiny):
    """The kernels of a CPU without AVX-512, as far as a variable can ask for them."""
    wanted = [
        ("float32", "torch_ref", {}),
        ("bfloat16", "torch_ref", {"dtype": "bfloat16"}),
        ("openvino", "openvino", {}),
        ("onnxrt", "onnxrt", {}),
    ]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", NARROWED, str(tiny), json.dumps(wanted)],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("has") is False
    exact = np.array(found["float32"][2])
    for name, (precision, emulated, rows) in found.items():
        ours = np.array(rows)
        cosines = (ours * exact).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
        assert cosines.min() > (0.99 if precision == "bfloat16" else 0.99999), name
        assert emulated is (precision == "bfloat16")
