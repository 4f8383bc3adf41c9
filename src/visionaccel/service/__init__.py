"""The encode service: a bounded queue in front of encoders, with futures for answers."""

from visionaccel.service.assembly import open_guarded, open_service, open_wanted_service
from visionaccel.service.cache import EmbeddingCache, item_key, numerics
from visionaccel.service.service import EncodeService
from visionaccel.service.state import Embedding, ServiceCounters

__all__ = [
    "Embedding", "EmbeddingCache", "EncodeService", "ServiceCounters", "item_key", "numerics", "open_guarded",
    "open_service", "open_wanted_service",
]  # fmt: skip
