"""Code of vendors in child processes: what kills or hangs it costs the calls in progress, and nothing else."""

from visionaccel.isolation.finding_process import FindingProcess, answer_with, as_finding, give_up_after
from visionaccel.isolation.session import IsolatedSession
from visionaccel.isolation.supervisor import Limits

__all__ = [
    "FindingProcess",
    "IsolatedSession",
    "Limits",
    "answer_with",
    "as_finding",
    "give_up_after",
]
