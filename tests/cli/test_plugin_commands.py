"""Commands that distributions add."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import typer

from fake_plugins import install
from visionaccel.cli import plugin_commands

COMMAND = """
import typer
from visionaccel.backends import hookimpl

def {name}() -> None:
    "Greets."
    print("noise")
    from visionaccel.cli.output import print_json
    print_json({{"hello": "world"}})

@hookimpl
def visionaccel_commands(app):
    app.command()({name})
    {then}
"""


def run(site, *arguments):
    command = [sys.executable, "-c", "from visionaccel.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def plugin(site, source, distribution="acme-tools"):
    return install(site, distribution, distribution, source, "visionaccel.commands")


def test_a_distribution_adds_a_command_whose_stdout_is_for_results(tmp_path):
    plugin(tmp_path, COMMAND.format(name="greet", then="pass"))
    done = run(tmp_path, "greet")
    assert (done.returncode, done.stdout) == (0, '{\n "hello": "world"\n}\n')
    assert done.stderr == "noise\n"
    assert "Greets." in run(tmp_path, "--help").stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "PluginError: module acme_tools does not implement the hook visionaccel_commands"),
        (COMMAND.format(name="greet", then="raise ValueError('half done')"), "ValueError: half done"),
        (
            COMMAND.format(name="greet", then="def bad(x: int | str): ...\n    app.command()(bad)"),
            "AssertionError: Typer currently doesn't support Union types",
        ),
        (COMMAND.format(name="explain", then="pass"), "PluginError: it adds explain, which already exists"),
    ],
)
def test_a_broken_plug_in_costs_its_own_commands_only(tmp_path, source, reason):
    plugin(tmp_path, source)
    plugin(tmp_path, COMMAND.format(name="wave", then="pass"), "other-tools")
    done = run(tmp_path, "backends", "--json")
    assert done.returncode == 0
    assert '"onnxrt"' in done.stdout
    assert "The commands of acme-tools 1.0 (acme_tools) are not available: " in done.stderr
    assert reason in done.stderr
    assert run(tmp_path, "greet").returncode == 2
    assert '"hello"' in run(tmp_path, "wave").stdout


def test_every_command_of_our_distributions_is_known_with_its_extra():
    added = typer.Typer()
    for point in entry_points(group=plugin_commands.GROUP):
        point.load().visionaccel_commands(added)
    names = {command.name or command.callback.__name__.replace("_", "-") for command in added.registered_commands}
    names |= {group.name or group.typer_instance.info.name for group in added.registered_groups}
    assert names == set(plugin_commands._EXTRAS)
