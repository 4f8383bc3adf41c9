"""Commands that other distributions add, by entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

import pluggy
import typer
from typer.main import get_command_name, get_group

from visionaccel.backends.hooks import PROJECT, HookSpecs
from visionaccel.cli.output import messages, prints_results
from visionaccel.errors import ConfigurationError, PluginError

__all__ = ["GROUP", "add_plugin_commands"]

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
"""Commands of the distributions that the core offers as extras, and the extra."""


def add_plugin_commands(app: typer.Typer) -> None:
    """Add the commands of each installed plug-in, in the order of the plug-ins' names.

    A plug-in that fails, or whose commands have names that are taken, is left out, and stderr says so. A command of an
    extra that is not there says what to install.

    Args:
        app: Where to add them. Has the core's own commands already.
    """
    taken = {info.name or get_command_name(info.callback.__name__) for info in app.registered_commands if info.callback}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            added, names = _commands(point)
            if clashes := sorted(names & taken):
                raise PluginError(
                    f"it adds {', '.join(clashes)}, which already exists.", hint="Uninstall one of the two."
                )
        except (Exception, SystemExit) as error:  # a plug-in does not decide whether the core's commands run
            origin = point.value if point.dist is None else f"{point.dist.name} {point.dist.version} ({point.value})"
            messages.print(
                f"The commands of {origin} are not available: {type(error).__name__}: {error}", soft_wrap=True
            )
            continue
        taken |= names
        app.registered_commands += added.registered_commands
        app.registered_groups += added.registered_groups
    for name, extra in _EXTRAS.items():
        if name not in taken:
            app.command(name, hidden=True, context_settings=_ANYTHING)(_missing(name, extra))


def _commands(point: EntryPoint) -> tuple[typer.Typer, set[str]]:
    """What a plug-in adds, and its names. Typer checks the commands' signatures here, so that a bad one fails here."""
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
    for info in added.registered_commands:
        if info.callback is not None:
            info.callback = prints_results(info.callback)
    return added, set(get_group(added).commands)


_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def _missing(name: str, extra: str) -> Callable[[], None]:
    def missing() -> None:
        raise ConfigurationError(
            f"`visionaccel {name}` is in another distribution, which is not installed or does not work here.",
            hint=f"Install it: pip install 'visionaccel[{extra}]'.",
        )

    return missing
