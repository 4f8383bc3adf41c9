"""Where to encode: the advice, from reports made by hand; and the command, with what is there."""

import json

import pytest
from typer.testing import CliRunner

from fake_contenders import FakeProcess
from visionaccel.cli.app import app
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel.errors import SettingsError
from visionaccel_bench.encode.contenders import STOCK, Contender
from visionaccel_bench.encode.encode_report import make_encode_report
from visionaccel_bench.encode.encoding import Accuracy, EncodePlan, OnGrid, Peak, Taken
from visionaccel_bench.encode.placement import advise

GRID = Grid(1, 8, 8)
OPENED = {"device": "cpu", "precision": "float32", "about": "", "simulated": False}


def placed(tiny, ours, stock, *, processors=4.0, cosine=1.0, error=None, stock_error=None):
    """The advice on a machine of four cores for a backend that takes some seconds, next to stock's."""
    mine = OnGrid([[ours]], processors * ours, Accuracy(cosine, cosine, 0.0, 0), error)
    theirs = Taken(STOCK, OPENED, grids={} if stock_error else {GRID: OnGrid([[stock]], 4 * stock)}, error=stock_error)
    backend = Taken(Contender("backend", "onnxrt"), OPENED, grids={GRID: mine})
    plan = EncodePlan((GRID,), rounds=1, threads=4)
    report = make_encode_report("it", open_tower(tiny), plan, [backend, theirs], Peak())
    return advise(report, *report.contenders)


@pytest.mark.parametrize(
    ("accuracy", "opened", "said"),
    [
        (None, {}, "were not compared with transformers' in float32 (it is not there)"),
        (Accuracy(1.0, 1.0, 0.0, 0), {"simulated": True}, "SIMULATED"),
    ],
)
def test_times_alone_are_no_reason_to_offload(tiny, accuracy, opened, said):
    mine = OnGrid([[1.0]], 1.0, accuracy)
    backend = Taken(Contender("backend", "onnxrt"), OPENED | opened, grids={GRID: mine})
    theirs = Taken(STOCK, OPENED, grids={GRID: OnGrid([[10.0]], 40.0)})
    plan = EncodePlan((GRID,), rounds=1, threads=4)
    report = make_encode_report("it", open_tower(tiny), plan, [backend, theirs], Peak(), "it is not there")
    found = advise(report, *report.contenders)
    assert found.inline == found.pipelined
    assert found.inline.offload is None
    assert said in found.inline.reason


def test_a_faster_backend_on_the_same_cores_is_offloaded_to(tiny):
    found = placed(tiny, 5.0, 10.0)
    assert found.takes_language_models_cores
    assert found.inline.offload
    assert "5.00 s instead of vLLM's 10.00 s (0.50 times)" in found.inline.reason
    assert found.pipelined.offload
    assert "takes the language model's cores (4.0 of 4)" in found.pipelined.reason
    assert found.grids[0].pipelined_gain_seconds == pytest.approx(5.0)


def test_a_slower_backend_on_the_same_cores_is_not(tiny):
    found = placed(tiny, 12.0, 10.0)
    assert not found.inline.offload
    assert not found.pipelined.offload
    assert found.inline.reason.startswith("do not: an encode takes 12.00 s instead of vLLM's 10.00 s")
    assert found.pipelined.reason.startswith("do not: the encoder takes the language model's cores")


def test_a_gain_within_the_spread_is_none(tiny):
    found = placed(tiny, 9.5, 10.0)
    assert not found.inline.offload
    assert "within the spread" in found.inline.reason
    assert not found.pipelined.offload


def test_a_slower_device_that_leaves_the_cores_alone_pays_only_pipelined(tiny):
    found = placed(tiny, 12.0, 10.0, processors=0.2)
    assert not found.takes_language_models_cores
    assert not found.inline.offload
    assert found.pipelined.offload
    assert "leaves the language model its cores" in found.pipelined.reason
    assert "comes later" in found.pipelined.reason
    assert found.grids[0].host_seconds == pytest.approx(0.6)


def test_wrong_embeddings_are_not_offloaded_however_fast(tiny):
    found = placed(tiny, 1.0, 10.0, cosine=0.54)
    assert found.inline == found.pipelined
    assert found.inline.offload is False
    assert "0.5400" in found.inline.reason


def test_a_backend_that_fails_on_a_grid_is_not(tiny):
    found = placed(tiny, 1.0, 10.0, error="it fell over.")
    assert found.inline.offload is False
    assert "it fell over" in found.inline.reason


def test_without_stock_nothing_can_be_said(tiny):
    found = placed(tiny, 1.0, 10.0, stock_error="absent: vllm not installed.")
    assert found.inline.offload is None
    assert found.pipelined.offload is None
    assert "vllm not installed" in found.inline.reason


def test_the_command_says_what_it_cannot_say(tiny, monkeypatch):
    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", FakeProcess)
    monkeypatch.setattr("visionaccel_bench.encode.contenders._importable", lambda module: module != "vllm")
    arguments = ["bench", "placement", str(tiny), "--backend", "onnxrt", "--grid", "8x8", "--rounds", "1", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    (found,) = document["placements"]
    assert found["label"] == "onnxrt"
    assert found["inline"]["offload"] is None
    assert document["measured"]["contenders"][0]["grids"][0]["median_seconds"] > 0


def test_the_terminal_shows_the_advice_and_its_reason(tiny, monkeypatch):
    monkeypatch.setattr("visionaccel_bench.encode.encoding.ContenderProcess", FakeProcess)
    monkeypatch.setattr("visionaccel_bench.encode.encoding.absence", lambda contender: None)
    arguments = ["bench", "placement", str(tiny), "--backend", "onnxrt", "--grid", "8x8", "--rounds", "1"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert "Whether to offload" in done.stdout
    assert "do not: an encode takes 1.00 s instead of vLLM's 1.00 s (1.00 times)" in done.stdout
    assert "gain in-line, s" in done.stdout


def test_no_backend_is_nothing_to_offload_to(tiny):
    done = CliRunner().invoke(app, ["bench", "placement", str(tiny), "--backend", "none"])
    assert isinstance(done.exception, SettingsError)
