"""The options of `visionaccel faults`, which are checked before a server starts."""

import pytest
from typer.testing import CliRunner

from visionaccel.cli.app import app
from visionaccel.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.setattr("visionaccel_bench.faultsuite.suite.serve", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fault", "melt"), "unknown --fault 'melt'"),
        (("--moment", "later"), "unknown --moment 'later'"),
        (("--isolation", "none", "--fault", "exit"), "no cell matches"),
        (("--output", "/nowhere/faults.json"), "not a file in an existing folder"),
    ],
)
def test_what_cannot_work_is_refused(arguments, said):
    done = CliRunner().invoke(app, ["faults", *arguments])
    assert isinstance(done.exception, ConfigurationError), done.output
    assert said in str(done.exception)


@pytest.mark.parametrize("option", ["--mode", "--isolation"])
def test_an_unknown_mode_or_isolation_is_a_usage_error(option):
    done = CliRunner().invoke(app, ["faults", option, "sideways"])
    assert done.exit_code == 2
    assert "sideways" in done.output
