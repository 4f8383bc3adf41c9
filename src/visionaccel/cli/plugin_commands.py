"""Adds the commands of other distributions, which declare them by entry point."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group
from typer.models import CommandInfo, TyperInfo

from visionaccel.backends import contained
from visionaccel.backends.hooks import PROJECT, HookSpecs
from visionaccel.cli.output import messages, results_only
from visionaccel.errors import ConfigurationError, PluginError

GROUP = "visionaccel.commands"
"""Entry-point group of modules that implement the hook `visionaccel_commands`."""

_EXTRAS = {
    "bench": "bench",
    "demo": "bench",
    "faults": "bench",
    "report": "bench",
    "import-vitisai": "flexmlrt,onnx",
    "init": "testing",
}
"""Commands of the distributions that the core offers as extras, and the extra. No other distribution may add them."""

_CORE = "visionaccel itself"
_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True}


class CommandsWithPlugins(TyperGroup):
    """The core's commands and those of plug-ins. Plug-ins are only imported for a command that the core does not have.

    If a plug-in fails, or adds a command whose name is taken, its commands are left out and stderr says so. A command
    of an extra that is not installed says what to install.
    """

    _loaded = False

    def list_commands(self, ctx: Any) -> list[str]:
        self._load_plugins()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self._load_plugins()
        return super().get_command(ctx, cmd_name)

    def _load_plugins(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        added: dict[str, Any] = _plugin_commands(self.commands)
        for name in _EXTRAS.keys() - added.keys():
            added[name] = TyperCommand(
                name, callback=partial(_missing, name), hidden=True, context_settings=_ANYTHING, add_help_option=False
            )
        self.commands.update(added)


def _plugin_commands(own: Collection[str]) -> dict[str, Any]:
    """Return the commands of all plug-ins, sorted by the names of the entry points. `own` are the core's commands."""
    found: dict[str, Any] = {}
    owners = {name: "visionaccel-" + extra.partition(",")[0] for name, extra in _EXTRAS.items()}
    owners |= dict.fromkeys(own, _CORE)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        distribution = None if point.dist is None else point.dist.name
        origin = point.value if point.dist is None else f"{distribution} {point.dist.version} ({point.value})"
        try:
            with contained(), results_only():
                added = _commands_of(point)
            for name in added:
                if (owner := owners.get(name, distribution)) != distribution:
                    which = "it" if owner == _CORE else "one of the two"
                    raise PluginError(
                        f"it adds the command {name!r}, which {owner} already provides.",
                        hint=f"Uninstall {which}, or ask its author to rename the command.",
                    )
        except Exception as error:  # the core's commands must work without the plug-in
            messages.print(
                f"The commands of {origin} are not available: {type(error).__name__}: {error}", soft_wrap=True
            )
            continue
        found |= added
        owners |= dict.fromkeys(added, origin)
    return found


def _commands_of(point: EntryPoint) -> dict[str, Any]:
    """Return the commands that a plug-in adds. Typer checks their signatures here, so a bad one raises here."""
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(HookSpecs)
    plugins.register(point.load())
    plugins.check_pending()
    if not plugins.hook.visionaccel_commands.get_hookimpls():
        raise PluginError(
            f"module {point.module} does not implement the hook visionaccel_commands.",
            hint="Define it, and mark it with visionaccel.backends.hookimpl.",
        )
    added = typer.Typer()
    plugins.hook.visionaccel_commands(app=added)
    if added.registered_callback is not None:
        raise PluginError(
            "it sets a callback on visionaccel's own command line.",
            hint="Set it on a group of commands, and add the group with app.add_typer(group, name=...).",
        )
    found: dict[str, Any] = {}
    infos: list[CommandInfo | TyperInfo] = [*added.registered_commands, *added.registered_groups]
    for info in infos:
        alone = typer.Typer()  # a group of all would keep the last of two with the same name
        if isinstance(info, CommandInfo):
            alone.registered_commands.append(info)
        else:
            alone.registered_groups.append(info)
        for name, command in get_group(alone).commands.items():
            if name in found:
                raise PluginError(
                    f"it adds two commands named {name!r}.", hint="Rename one: app.command('other-name')."
                )
            _keep_stdout(command)
            found[name] = command
    return found


def _keep_stdout(command: Any) -> None:
    """Keep stdout for results in a command, and in the commands of a group."""
    if command.callback is not None:
        command.callback = results_only()(command.callback)
    for nested in getattr(command, "commands", {}).values():
        _keep_stdout(nested)


def _missing(name: str) -> None:
    raise ConfigurationError(
        f"`visionaccel {name}` is in another distribution, which is not installed or does not work here.",
        hint=f"Install it: pip install 'visionaccel[{_EXTRAS[name]}]'.",
    )
