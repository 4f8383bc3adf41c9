"""Vendor code in child processes: if it crashes or hangs, only the calls in progress fail."""

from visionaccel.isolation.check_process import CheckProcess, as_finding, give_up_after, write_findings
from visionaccel.isolation.supervisor import IsolatedSession, Limits

__all__ = ["CheckProcess", "IsolatedSession", "Limits", "as_finding", "give_up_after", "write_findings"]
