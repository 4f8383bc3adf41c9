"""Sessions in a process of their own: what kills or hangs vendor code costs the calls in progress, and nothing else."""

from visionaccel.isolation.finding_process import FindingProcess, answer_with, as_finding, give_up_after
from visionaccel.isolation.limits import Limits
from visionaccel.isolation.session import IsolatedSession

__all__ = [
    "FindingProcess",
    "IsolatedSession",
    "Limits",
    "answer_with",
    "as_finding",
    "give_up_after",
]
