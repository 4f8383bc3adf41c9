"""The serving benchmark, with real servers."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from forked import WORKER_IN_ENGINE, servers
from visionaccel.cli.app import app

LATENCY = 0.4


def test_pipelined_and_in_line_are_measured_and_held_against_the_bound(tmp_path):
    timeline = tmp_path / "timeline.png"
    command = ["bench", "serve", "--mode", "inline", "--mode", "pipelined"]
    load = ["--images", "4", "--gap", "0.6", "--image-tokens", "4", "--stream-tokens", "500", "--device", "onnxrt"]
    ours = ["--latency", str(LATENCY), "--timeline", str(timeline), "--json"]
    with servers():
        done = CliRunner().invoke(app, [*command, *load, *ours], env=WORKER_IN_ENGINE)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["simulated"] is True
    assert "SIMULATED" in report["notes"][0]
    inline, pipelined = report["modes"]["inline"], report["modes"]["pipelined"]
    assert "in-line, and takes" in inline["encoder"]
    assert "pipelined, and takes" in pipelined["encoder"]
    for mode in (inline, pipelined):
        mixed = mode["mixed"]
        assert "simulated:onnxrt/cpu (simulated)" in mode["encoder"]
        assert mixed["wall_seconds_each"] == [mixed["wall_seconds"]]
        assert mixed["tokens_per_second"] == pytest.approx((500 + 4 * 4) / mixed["wall_seconds"])
        assert 0 < mixed["text"]["itl_seconds"]["p50"] < mixed["text"]["itl_seconds"]["max"]
        assert mode["text_only"]["images"] is None
        assert mixed["images"]["ttft_seconds"]["p50"] >= LATENCY
        assert mode["bound"]["device_seconds"] >= 0.5 + 4 * LATENCY
        assert mode["times_bound"] == pytest.approx(mixed["wall_seconds"] / mode["bound"]["seconds"])
        assert mode["decode_seconds"] > 0
    # In-line, the step that encodes an image gives the text stream no token. How much shorter stalls are when pipelined
    # is not asserted: on a machine with other work that decides.
    assert inline["mixed"]["stalls"]["longest_seconds"] >= LATENCY
    with Image.open(timeline) as picture:
        picture.load()
