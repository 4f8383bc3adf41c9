"""Code of vendors in child processes: what kills or hangs it costs the calls in progress, and nothing else."""

from visionaccel.isolation.check_process import CheckProcess, as_finding, give_up_after, write_findings
from visionaccel.isolation.session import IsolatedSession
from visionaccel.isolation.supervisor import Limits

__all__ = [
    "CheckProcess",
    "IsolatedSession",
    "Limits",
    "write_findings",
    "as_finding",
    "give_up_after",
]
