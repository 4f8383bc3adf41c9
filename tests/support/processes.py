"""Whether a process is still there."""

from pathlib import Path


def has_ended(pid):
    """Whether a process has ended; an orphan that is not reaped stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
