"""What keeps encoders right and answering: the chain, its links, and their breakers, canaries and shadow."""

from visionaccel.trust.breaker import Breaker, BreakerState
from visionaccel.trust.canary import Canary, FirstAnswer, drift_of
from visionaccel.trust.chain import Embedded, GuardedEncoder
from visionaccel.trust.link import Stage
from visionaccel.trust.shadow import Shadow
from visionaccel.trust.watched import LateError, WatchedCalls

__all__ = [
    "Breaker",
    "BreakerState",
    "Canary",
    "Embedded",
    "FirstAnswer",
    "GuardedEncoder",
    "LateError",
    "Shadow",
    "Stage",
    "WatchedCalls",
    "drift_of",
]
