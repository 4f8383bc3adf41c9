"""In vLLM: a device that misreads golden images is not started, and a timeline shows what ran beside what."""

import json

import pytest
from typer.testing import CliRunner

from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.cli.app import app
from visionaccel.core.program import AnyGrid
from visionaccel.encoder import open_tower

LATENCY = 0.3


def tokens(answers):
    return [answer["tokens"] for answer in answers]


@pytest.fixture(scope="module")
def bundle(digits, tmp_path_factory):
    """A validated bundle of the digits model."""
    folder = tmp_path_factory.mktemp("trust") / "bundle"
    export_bundle(open_tower(digits), folder, [ProgramRequest(AnyGrid())])
    done = CliRunner().invoke(app, ["validate", str(folder), "--reference", str(digits)])
    assert done.exit_code == 0, done.output
    return folder


def drifting(bundle, **more):
    return {
        "VISIONACCEL_BACKEND": "simulated",
        "VISIONACCEL_DEVICE": "onnxrt",
        "VISIONACCEL_OPTIONS": json.dumps({"faults": [{"all": True, "do": "drift"}]}),
        "VISIONACCEL_BUNDLE": str(bundle),
        "VISIONACCEL_FALLBACK": "torch_ref",
        **more,
    }


@pytest.mark.parametrize("mode", ["pipelined", "inline"])
def test_a_device_that_misreads_golden_images_leaves_everything_to_the_fallback(ask, stock, bundle, mode):
    answers = ask(drifting(bundle, VISIONACCEL_MODE=mode), "few")
    assert answers["status"] == 0, answers["log"][-4000:]
    assert "Starting with the fallback 'torch_ref', because backend 'simulated' failed its canary" in answers["log"]
    assert "is under 0.9999, at token" in answers["log"]
    for part in ("first", "video"):
        assert tokens(answers["parts"][part]) == tokens(stock["parts"][part])


def test_strictly_the_engine_does_not_start_with_it(ask, bundle):
    answers = ask(drifting(bundle, VISIONACCEL_CANARY="strict"), "few")
    assert answers["status"] != 0
    assert "failed its canary and cannot be trusted: golden image" in answers["log"]


def spans(step, start, end):
    return step["ts"] <= start and end <= step["ts"] + step["dur"]


@pytest.mark.parametrize("mode", ["pipelined", "inline"])
def test_a_timeline_shows_steps_beside_encodes_only_where_there_are_some(ask, stock, tmp_path, mode):
    path = tmp_path / "trace.json"
    settings = {
        "VISIONACCEL_BACKEND": "simulated",
        "VISIONACCEL_DEVICE": "onnxrt",
        "VISIONACCEL_OPTIONS": json.dumps({"latency": LATENCY}),
        "VISIONACCEL_MODE": mode,
        "VISIONACCEL_TRACE": str(path),
        "VISIONACCEL_TIMING": "1",
    }
    answers = ask(settings, "few")
    assert answers["status"] == 0, answers["log"][-4000:]
    assert tokens(answers["parts"]["first"]) == tokens(stock["parts"]["first"])
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    slices = [event for event in events if event["ph"] == "X"]
    encodes = [event for event in slices if event["cat"] == "device" and event["name"].startswith("request")]
    steps = [event for event in slices if event["cat"] == "decode"]
    assert sum(encode["dur"] for encode in encodes) >= 1e6 * LATENCY
    assert steps
    times = [(encode["ts"], encode["ts"] + encode["dur"]) for encode in encodes]
    inside = [any(spans(step, start, end) for step in steps) for start, end in times]
    beside = [any(step["ts"] < end and start < step["ts"] + step["dur"] for step in steps) for start, end in times]
    if mode == "inline":
        assert all(inside), "the engine's step is what encodes"
    else:
        assert not all(inside), "a request waits for its image in no step"
        assert any(beside), "another one's steps go on meanwhile"
    assert {event["cat"] for event in slices} >= {"device", "decode", "processor"}
    assert ("queue" in {event["cat"] for event in slices}) == (mode == "pipelined")
    assert "visionaccel encode {" in answers["log"]
    assert "visionaccel processor {" in answers["log"]
