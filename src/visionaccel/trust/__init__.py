"""Keeps encoders correct and available: the chain, its links, and their breakers, canaries and shadow."""

from visionaccel.trust.breaker import Breaker, BreakerState
from visionaccel.trust.canary import Canary, FirstAnswer, drift_of, precision_limit
from visionaccel.trust.chain import Embedded, GuardedEncoder, Shadow
from visionaccel.trust.link import ChainLink
from visionaccel.trust.threads import background

__all__ = [
    "Breaker", "BreakerState", "Canary", "ChainLink", "Embedded", "FirstAnswer", "GuardedEncoder", "Shadow",
    "background", "drift_of", "precision_limit",
]  # fmt: skip
