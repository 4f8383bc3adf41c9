"""Opens what the settings ask for: an encoder for each device, with a fallback, and a service in front of them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from visionaccel.backends import AUTO
from visionaccel.bundle import Bundle
from visionaccel.cores import Host, choose_cores, shown_cores
from visionaccel.encoder import Encoder
from visionaccel.errors import BackendUnavailableError, DeviceError, PluginError
from visionaccel.families import Tower
from visionaccel.opening import WantedIsolation, open_encoder, open_source
from visionaccel.runtime.guarded import GuardedEncoder
from visionaccel.runtime.service import EncodeService
from visionaccel.runtime.timing import TimingLog
from visionaccel.settings import Settings, make_settings

__all__ = ["open_guarded", "open_service", "open_wanted_service"]

logger = logging.getLogger(__name__)


def open_guarded(
    source: Tower | Bundle, settings: Settings, devices: tuple[str | None, ...], host: Host | None = None
) -> list[GuardedEncoder]:
    """An encoder on each device, or the fallback alone if they cannot all run here and one is set.

    The fallback runs on the weights, so that it takes every grid whatever programs a bundle has; all devices share it.

    Args:
        source: The encoder.
        settings: The settings.
        devices: The devices; None among them for the backend's default.
        host: What else computes on the machine's cores, which the encoders' threads then leave to it if they can.

    Raises:
        VisionAccelError: If neither can start, or a setting is wrong; the message says why and what to do.
    """
    name = settings.fallback
    tower = source.tower if isinstance(source, Bundle) else source
    choice = choose_cores(settings.cpu_cores, host)
    if choice.cores is not None:
        logger.info("The encoder's threads run on cores %s of the CPU: %s.", shown_cores(choice.cores), choice.why)

    def open_fallback() -> Encoder:
        return open_encoder(
            tower,
            backend=name or AUTO,
            isolation=settings.isolation,
            deadline=settings.deadline,
            open_deadline=settings.open_deadline,
            cores=choice.cores,
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
                    cores=choice.cores,
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


def open_service(
    source: str | os.PathLike[str] | Tower | Bundle,
    *,
    backend: str = AUTO,
    devices: Sequence[str] = (),
    fallback: str | None = None,
    options: Mapping[str, Any] | None = None,
    isolation: WantedIsolation = "auto",
    deadline: float = 120.0,
    open_deadline: float = 600.0,
    queue_size: int = 64,
    cache_size: int = 512 * 2**20,
    dtype: str = "float32",
    cores: Iterable[int] | None = None,
) -> EncodeService:
    """An encode service, to be used by itself from Python.

    Args:
        source: As for `open_encoder`.
        backend: Name of an installed backend, or `auto`.
        devices: The backend's devices, each of which gets an encoder; its default if none is named.
        fallback: Backend that takes over what the devices fail on, or their place if they cannot start.
        options: The backend's options by name.
        isolation: Whether each device lives in a child process; `auto` for what the backend declares.
        deadline: Seconds that a device may take for one call.
        open_deadline: Seconds that opening a device in a child process may take.
        queue_size: Most items that wait for a device.
        cache_size: Bytes of embeddings that are kept.
        dtype: Dtype of the embeddings.
        cores: Cores of the CPU that the devices' threads run on; None for where the runtimes like.

    Raises:
        ConfigurationError: If a value is invalid, or the backend cannot run.
        ArtifactError: If the bundle or checkpoint is broken.
        DeviceError: If a device fails to open.
    """
    settings = make_settings(
        backend=backend,
        device=None,
        devices=tuple(devices),
        fallback=fallback,
        options=dict(options or {}),
        isolation=isolation,
        deadline=deadline,
        open_deadline=open_deadline,
        queue_size=queue_size,
        cache_size=cache_size,
        cpu_cores=None if cores is None else frozenset(cores),
    )
    return open_wanted_service(open_source(source), settings, dtype)


def open_wanted_service(
    source: Tower | Bundle, settings: Settings, dtype: str = "float32", host: Host | None = None
) -> EncodeService:
    """An encode service as the settings want it.

    Args:
        source: The encoder.
        settings: The settings.
        dtype: Dtype of the embeddings.
        host: As for `open_guarded`.

    Raises:
        VisionAccelError: As `open_guarded`.
    """
    encoders = open_guarded(source, settings, settings.wanted_devices, host)
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
