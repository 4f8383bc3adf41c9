"""The command as users run it: in a process."""

import sys

COMMAND = [sys.executable, "-c", "from visionaccel.cli import main; main()"]
"""`visionaccel`, by this interpreter and from this checkout; its arguments follow."""
