"""The command `visionaccel`."""

import sys

from visionaccel.errors import ConfigurationError

__all__ = ["main"]


def main() -> None:
    """The command's entry point."""
    try:
        from visionaccel.cli.app import main as run  # not above: child processes run modules below this one
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("rich", "typer"):
            raise
        sys.exit(str(ConfigurationError.missing_extra("the command line", missing, "visionaccel[cli]")))
    run()
