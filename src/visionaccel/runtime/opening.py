"""Opens what the settings ask for: an encoder for each device, with a fallback, and a service in front of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack

from visionaccel.backends import AUTO
from visionaccel.bundle import Bundle
from visionaccel.encoder import Encoder, open_encoder
from visionaccel.errors import BackendUnavailableError, DeviceError, PluginError
from visionaccel.families import Tower
from visionaccel.runtime.guarded import GuardedEncoder
from visionaccel.runtime.service import EncodeService
from visionaccel.runtime.timing import TimingLog
from visionaccel.settings import Settings

__all__ = ["open_guarded", "open_service"]

logger = logging.getLogger(__name__)


def open_guarded(source: Tower | Bundle, settings: Settings, devices: tuple[str | None, ...]) -> list[GuardedEncoder]:
    """An encoder on each device, or the fallback alone if they cannot all run here and one is set.

    The fallback runs on the weights, so that it takes every grid whatever programs a bundle has; all devices share it.

    Raises:
        VisionAccelError: If neither can start, or a setting is wrong; the message says why and what to do.
    """
    name = settings.fallback
    tower = source.tower if isinstance(source, Bundle) else source

    def open_fallback() -> Encoder:
        return open_encoder(
            tower,
            backend=name or AUTO,
            isolation=settings.isolation,
            deadline=settings.deadline,
            open_deadline=settings.open_deadline,
        )

    try:
        with ExitStack() as stack:
            opened = []
            for device in devices:
                encoder = open_encoder(
                    source,
                    backend=settings.backend or AUTO,
                    device=device,
                    options=settings.options,
                    isolation=settings.isolation,
                    deadline=settings.deadline,
                    open_deadline=settings.open_deadline,
                )
                opened.append(stack.enter_context(encoder))
            stack.pop_all()
    except (BackendUnavailableError, PluginError, DeviceError) as error:
        if name is None:
            raise
        logger.error("Starting with the fallback %r, because %s", name, error)
        guarded = [GuardedEncoder(open_fallback())]
    else:
        shared = _Once(open_fallback) if name is not None else None
        guarded = [GuardedEncoder(encoder, shared) for encoder in opened]
    if settings.timing:
        TimingLog.install()
    return guarded


def open_service(source: Tower | Bundle, settings: Settings, dtype: str = "float32") -> EncodeService:
    """An encode service on the devices that the settings name.

    Args:
        source: The encoder.
        settings: The settings.
        dtype: Dtype of the embeddings.

    Raises:
        VisionAccelError: As `open_guarded`.
    """
    encoders = open_guarded(source, settings, settings.wanted_devices)
    try:
        return EncodeService(
            encoders,
            queue_size=settings.queue_size,
            cache=settings.cache_size,
            deadline=settings.deadline,
            dtype=dtype,
        )
    except BaseException:
        for encoder in encoders:
            encoder.close()
        raise


class _Once:
    """Opens an encoder when it is first asked for; later askers get the same one, or the same error."""

    def __init__(self, make: Callable[[], Encoder]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._outcome: Encoder | Exception | None = None

    def __call__(self) -> Encoder:
        with self._lock:
            if self._outcome is None:
                try:
                    self._outcome = self._make()
                except Exception as error:
                    self._outcome = error
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome
