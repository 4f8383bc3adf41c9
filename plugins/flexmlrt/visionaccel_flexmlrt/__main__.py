"""The entry point of the command `visionaccel-flexmlrt`, which needs an extra."""

import sys

from visionaccel.errors import ConfigurationError


def main() -> None:
    """Run the command, or say which extra to install."""
    try:
        from visionaccel_flexmlrt.commands import main as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("onnx", "rich", "typer"):
            raise
        sys.exit(
            str(ConfigurationError.missing_extra("visionaccel-flexmlrt", missing, "visionaccel-flexmlrt[simulator]"))
        )
    run()


if __name__ == "__main__":
    main()
