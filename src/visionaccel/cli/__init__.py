"""The command `visionaccel`."""

__all__ = ["main"]


def main() -> None:
    """The command's entry point."""
    from visionaccel.cli.app import main as run  # modules below this one run in child processes that need no command

    run()
