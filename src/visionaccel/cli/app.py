"""The command line: its subcommands, and how errors are printed."""

from __future__ import annotations

import sys

import typer

from visionaccel import __version__
from visionaccel.cli.backends import backends, explain
from visionaccel.cli.bundles import inspect, pull, push, validate
from visionaccel.cli.chat import chat
from visionaccel.cli.diagnosis import doctor
from visionaccel.cli.encode import encode
from visionaccel.cli.export import export, quantize, strip
from visionaccel.cli.output import messages, own_stdout, print_json, results_only
from visionaccel.cli.plugin_commands import CommandsWithPlugins
from visionaccel.errors import ConfigurationError, VisionAccelError

app = typer.Typer(
    name="visionaccel",
    cls=CommandsWithPlugins,
    help="Vision encoders on pluggable accelerator backends.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for command in (backends, explain, export, quantize, inspect, validate, push, pull, strip, encode, chat, doctor):
    app.command()(results_only()(command))


def main() -> None:
    """Run the command. Errors of this package become one message on stderr and exit status 2."""
    with own_stdout():
        try:
            _run()
        except VisionAccelError as error:
            if "--json" in sys.argv:
                print_json({"error": type(error).__name__, "message": error.message, "hint": error.hint})
            messages.print(type(error).__name__, style="bold red", end=" ")
            messages.print(str(error), highlight=False, soft_wrap=True)
            raise SystemExit(2) from None


def _run() -> None:
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "onnx":
            raise
        raise ConfigurationError.missing_extra("this command", error.name, "visionaccel[onnx]") from error
