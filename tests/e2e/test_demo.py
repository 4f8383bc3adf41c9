"""The demo, as `make demo` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import visionaccel.cli.demo as module
from visionaccel.cli.app import app


def test_the_demo_compares_two_real_servers():
    command = [Path(sys.executable).with_name("visionaccel"), "demo", "--images", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["agreement"] == 1.0
    assert len(result["images"]) == 4
    for row in result["images"]:
        assert row["stock"] == row["onnxrt"]
        assert row["encode_ms"] > 0


@pytest.mark.parametrize(("ours", "status"), [("42", 0), ("43", 1)])
def test_any_different_answer_fails_the_demo(monkeypatch, ours, status):
    def ask(title, checkpoint, settings, pictures):
        return [module._Answer(ours if settings else "42", 1.0 if settings else None) for _ in pictures]

    monkeypatch.setattr(module, "_ask", ask)
    result = CliRunner().invoke(app, ["demo", "--images", "3"])
    assert result.exit_code == status
    assert f"agreement: {0 if status else 3} of 3" in result.stdout
