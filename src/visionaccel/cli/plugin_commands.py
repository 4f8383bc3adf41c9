"""Commands that other distributions add, by entry point."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

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
    """The core's commands and those of plug-ins, whose modules are imported for a name that is not the core's.

    A plug-in that fails, or whose commands have names that are taken, is left out, and stderr says so. A command of an
    extra that is not installed says what to install.
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
    """The commands of each installed plug-in by name, in the order of the entry points' names; `own` are the core's."""
    found: dict[str, Any] = {}
    origins = dict.fromkeys(own, _CORE)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        origin = point.value if point.dist is None else f"{point.dist.name} {point.dist.version} ({point.value})"
        try:
            with contained(), results_only():
                added = _commands_of(point)
            for name in added:
                _check_free(name, origins.get(name) or _reserved_for(name, point))
        except Exception as error:  # a plug-in does not decide whether the core's commands run
            messages.print(
                f"The commands of {origin} are not available: {type(error).__name__}: {error}", soft_wrap=True
            )
            continue
        found |= added
        origins |= dict.fromkeys(added, origin)
    return found


def _check_free(name: str, other: str | None) -> None:
    if other is not None:
        uninstall = "it" if other == _CORE else "one of the two"
        raise PluginError(
            f"it adds the command {name!r}, which {other} has.",
            hint=f"Uninstall {uninstall}, or ask its author for another name.",
        )


def _reserved_for(name: str, point: EntryPoint) -> str | None:
    """The distribution that a command is reserved for, unless it is the one that adds it."""
    if name not in _EXTRAS:
        return None
    owner = "visionaccel-" + _EXTRAS[name].partition(",")[0]
    return None if point.dist is not None and point.dist.name == owner else owner


def _commands_of(point: EntryPoint) -> dict[str, Any]:
    """What a plug-in adds, by name. Typer checks the commands' signatures here, so that a bad one fails here."""
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
    # Each alone: of two with one name, a group of both would keep the last.
    alone: list[tuple[list[Any], list[Any]]] = [([command], []) for command in added.registered_commands]
    alone += [([], [group]) for group in added.registered_groups]
    for commands, groups in alone:
        part = typer.Typer()
        part.registered_commands, part.registered_groups = commands, groups
        for name, command in get_group(part).commands.items():
            if name in found:
                raise PluginError(f"it adds two commands named {name!r}.", hint="Name one: app.command('other-name').")
            _keep_stdout(command)
            found[name] = command
    return found


def _keep_stdout(command: Any) -> None:
    """Have a command, and those of a group at every depth, print results only."""
    if command.callback is not None:
        command.callback = results_only()(command.callback)
    for nested in getattr(command, "commands", {}).values():
        _keep_stdout(nested)


def _missing(name: str) -> None:
    raise ConfigurationError(
        f"`visionaccel {name}` is in another distribution, which is not installed or does not work here.",
        hint=f"Install it: pip install 'visionaccel[{_EXTRAS[name]}]'.",
    )
