"""The command `visionaccel`."""

from visionaccel.cli.app import main

__all__ = ["main"]
