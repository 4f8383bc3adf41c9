"""The reference of the command line, generated from its commands."""

import html
from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

from visionaccel.cli.app import app

__all__ = ["command_reference", "commands_of"]


def commands_of(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the commands of a group and of the groups in it, with their full names, in the order of declaration."""
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands_of(command, f"{before}{name} ")
        else:
            yield before + name, command


def command_reference() -> str:
    """Return a section for each command: what it does, its usage, its arguments and options."""
    return "\n\n".join(_section(name, command) for name, command in commands_of(get_command(app)))


def _section(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=f"visionaccel {name}")
    usage = " ".join([context.info_name or "", *command.collect_usage_pieces(context)])
    parts = [f"## {name}", " ".join((command.help or "").split("\n\n")[0].split())]
    parts += [" ".join(more.split()) for more in (command.help or "").split("\n\n")[1:]]
    parts.append(f"```text\n{usage}\n```")
    records = [record for parameter in command.params if (record := parameter.get_help_record(context)) is not None]
    rows = [f"| `{_cell(what)}` | {_escaped(meaning)} |" for what, meaning in records]
    return "\n\n".join([*parts, "\n".join(["| argument or option | meaning |", "|---|---|", *rows])])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _escaped(text: str) -> str:
    """Escape brackets and angles in a sentence of the help, which are not markup."""
    return html.escape(_cell(text).replace("[", "\\["), quote=False)
