"""Commands that distributions add."""

import json
import os

import pytest
import typer
from typer.main import get_command

from command_line import run_command
from fake_plugins import install
from visionaccel.cli import plugin_commands
from visionaccel.cli.app import app

PLUGIN = """
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
    return run_command(*arguments, environment={**os.environ, "PYTHONPATH": str(site)})


def plugin(site, source, distribution="acme-tools"):
    return install(site, distribution, distribution, source, "visionaccel.commands")


def test_a_distribution_adds_a_command_whose_stdout_is_for_results(tmp_path):
    plugin(tmp_path, PLUGIN.format(name="greet", then="pass"))
    done = run(tmp_path, "greet")
    assert (done.returncode, done.stdout) == (0, '{\n "hello": "world"\n}\n')
    assert done.stderr == "noise\n"
    assert "Greets." in run(tmp_path, "--help").stdout


GROUP = """
import typer
from visionaccel.backends import hookimpl

outer, inner = typer.Typer(name="outer"), typer.Typer(name="inner")
outer.add_typer(inner)

@outer.callback()
def prepare():
    print("noise of the group")

@inner.callback()
def _group(): ...

@inner.command()
def leaf():
    print("noise of the command")
    from visionaccel.cli.output import print_json
    print_json([])

@hookimpl
def visionaccel_commands(app):
    app.add_typer(outer)
"""


def test_a_command_in_a_nested_group_prints_results_only(tmp_path):
    plugin(tmp_path, GROUP)
    done = run(tmp_path, "outer", "inner", "leaf")
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert done.stderr == "noise of the group\nnoise of the command\n"
    done = run(tmp_path, "outer", "inner", "leaf", "--help")
    assert done.returncode == 0
    assert "outer inner leaf" in done.stdout
    assert "noise" not in done.stdout


BROKEN = [
    ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("class Halt(BaseException): ...\nraise Halt('no driver')", "Halt: no driver"),
    ("x = 1", "PluginError: module acme_tools does not implement the hook visionaccel_commands"),
    (PLUGIN.format(name="greet", then="raise ValueError('half done')"), "ValueError: half done"),
    (
        PLUGIN.format(name="greet", then="def bad(x: int | str): ...\n    app.command()(bad)"),
        "AssertionError: Typer currently doesn't support Union types",
    ),
    (
        PLUGIN.format(name="explain", then="pass"),
        "PluginError: it adds the command 'explain', which visionaccel itself already provides. Uninstall it, or ask",
    ),
    (
        PLUGIN.format(name="bench", then="pass"),
        "PluginError: it adds the command 'bench', which visionaccel-bench already provides. Uninstall one of the two",
    ),
    (
        PLUGIN.format(name="greet", then="app.command('greet')(lambda: None)"),
        "PluginError: it adds two commands named 'greet'. Rename one: app.command('other-name')",
    ),
    (
        PLUGIN.format(name="greet", then="app.callback()(lambda: None)"),
        "PluginError: it sets a callback on visionaccel's own command line. Set it on a group of commands",
    ),
]


@pytest.mark.parametrize(("source", "reason"), BROKEN)
def test_a_broken_plug_in_costs_its_own_commands_only(tmp_path, source, reason):
    plugin(tmp_path, source)
    plugin(tmp_path, PLUGIN.format(name="wave", then="pass"), "other-tools")
    done = run(tmp_path, "wave")
    assert (done.returncode, done.stdout) == (0, '{\n "hello": "world"\n}\n')
    assert "The commands of acme-tools 1.0 (acme_tools) are not available: " in done.stderr
    assert reason in done.stderr
    assert run(tmp_path, "greet").returncode == 2
    assert "Measure encodes, and servers under load" in run(tmp_path, "bench", "--help").stdout


@pytest.mark.parametrize("source", [BROKEN[0][0], BROKEN[2][0], "import os\nos._exit(9)"])
def test_a_plug_in_is_not_imported_for_a_command_of_the_core(tmp_path, source):
    plugin(tmp_path, source)
    done = run(tmp_path, "backends", "--json")
    assert done.returncode == 0
    assert "onnxrt" in {row["name"] for row in json.loads(done.stdout)}
    assert "acme" not in done.stderr


def test_what_a_plug_in_prints_while_it_is_imported_is_not_on_stdout(tmp_path):
    noise = "import os\nprint('noise')\nos.write(1, b'noise of C\\n')\n"
    plugin(tmp_path, noise + PLUGIN.format(name="greet", then="print('noise of the hook')"))
    for arguments in (("greet",), ("--help",)):
        done = run(tmp_path, *arguments)
        assert done.returncode == 0
        assert "noise" not in done.stdout
        assert {"noise", "noise of C", "noise of the hook"} <= set(done.stderr.splitlines())


def test_of_two_plug_ins_with_one_command_the_first_by_name_has_it_and_the_other_is_told_of_it(tmp_path):
    plugin(tmp_path, PLUGIN.format(name="greet", then="pass"))
    plugin(tmp_path, PLUGIN.format(name="greet", then="pass"), "other-tools")
    done = run(tmp_path, "greet")
    assert '"hello"' in done.stdout
    assert "The commands of other-tools 1.0 (other_tools) are not available" in done.stderr
    assert "the command 'greet', which acme-tools 1.0 (acme_tools) already provides" in done.stderr


def test_help_lists_the_cores_commands_first(tmp_path):
    plugin(tmp_path, PLUGIN.format(name="aardvark", then="pass"))
    shown = run(tmp_path, "--help").stdout
    assert 0 < shown.index("doctor") < shown.index("aardvark")


def test_every_command_of_our_distributions_is_known_with_its_extra():
    group = get_command(app)
    context = typer.Context(group)
    added = set(group.list_commands(context)[len(app.registered_commands) :])
    assert added == set(plugin_commands._EXTRAS)
    assert not any(group.get_command(context, name).hidden for name in added)
