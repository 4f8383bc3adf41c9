"""Sessions in a process of their own: what kills or hangs vendor code costs the calls in progress, and nothing else."""

from visionaccel.isolation.limits import Limits
from visionaccel.isolation.parent import end_with_parent
from visionaccel.isolation.session import IsolatedSession

__all__ = ["IsolatedSession", "Limits", "end_with_parent"]
