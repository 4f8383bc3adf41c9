"""What the demo makes of answers. It asks two real servers in the test of an author's first ten minutes."""

import json

import pytest
from typer.testing import CliRunner

import visionaccel_bench.commands.demo as module
from visionaccel.cli.app import app


@pytest.mark.parametrize(("ours", "status"), [("42", 0), ("43", 1)])
def test_any_different_answer_fails_the_demo(monkeypatch, ours, status):
    def ask(title, checkpoint, settings, pictures):
        return [module._Answer(ours if settings else "42", 1.0 if settings else None) for _ in pictures]

    monkeypatch.setattr(module, "_ask", ask)
    result = CliRunner().invoke(app, ["demo", "--images", "3"])
    assert result.exit_code == status
    assert f"agreement: {0 if status else 3} of 3" in result.stdout
    printed = CliRunner().invoke(app, ["demo", "--images", "3", "--json"])
    assert printed.exit_code == status
    found = json.loads(printed.stdout)
    assert found["agreement"] == 1 - status
    assert [row["onnxrt"] for row in found["images"]] == [ours] * 3
    assert all(row["encode_ms"] > 0 for row in found["images"])
