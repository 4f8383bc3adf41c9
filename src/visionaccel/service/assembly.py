"""Opens what the settings ask for: an encoder for each device, its fallbacks, and the service in front of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from visionaccel.backends import AUTO, check_names, default_registry
from visionaccel.bundle import Bundle, read_golden
from visionaccel.core.cores import Host, choose_cores, shown_cores
from visionaccel.core.defaults import CACHE_SIZE, DEADLINE, LONGEST_SECONDS, OPEN_DEADLINE, QUEUE_SIZE
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import WantedIsolation, WantedWeights, hold_source, open_encoder, open_source
from visionaccel.errors import BackendUnavailableError, DeviceError, PluginError, VisionAccelError
from visionaccel.families import Tower
from visionaccel.observe import TimingLog, TraceLog
from visionaccel.service.service import EncodeService
from visionaccel.settings import Settings, make_settings
from visionaccel.trust import Canary, ChainLink, FirstAnswer, GuardedEncoder, Shadow, precision_limit

logger = safe_logger(__name__)

_REFERENCE = "torch_ref"
"""The backend that the shadow compares answers with."""


def open_guarded(
    source: Tower | Bundle,
    settings: Settings,
    devices: tuple[str | None, ...],
    host: Host | None = None,
) -> list[GuardedEncoder]:
    """Open a chain of encoders for each device, or one of the fallbacks alone if not all devices can run here.

    A device's chain is its own encoder, those of the other devices, and then the fallbacks, which all chains share.
    Fallbacks run on the weights, so they take every grid, unlike a bundle's programs. Every device encodes the
    bundle's golden images first; a device that gets them wrong counts as one that cannot run here.

    Args:
        source: The checkpoint's tower, or a bundle.
        settings: All settings but the devices.
        devices: The devices; None stands for the backend's default.
        host: The other work on the machine's cores; the encoders' threads avoid those cores if they can.

    Raises:
        VisionAccelError: If neither the devices nor a fallback can start, or a setting is wrong.
    """
    check_names(settings.backend, settings.fallback)
    if settings.timing:
        TimingLog.install()
    if settings.trace is not None:
        TraceLog.install(settings.trace)
    if settings.fallback or settings.shadow:  # these may open later, when the files have changed
        source = hold_source(source, settings.weights)
    opening = _Opening(source, settings, host)
    fallbacks = {name: opening.link(source.tower, name) for name in settings.fallback}
    reference = None
    if settings.shadow:
        default_registry().entry(_REFERENCE)  # fail now rather than at the first comparison
        reference = fallbacks.get(_REFERENCE) or opening.link(source.tower, _REFERENCE)
    backend = settings.backend or AUTO
    links = [opening.link(source, backend, device, settings.options, same=True) for device in devices]
    try:
        opening.start(links)
    except (BackendUnavailableError, PluginError, DeviceError) as error:
        if not fallbacks or (settings.canary == "strict" and isinstance(error, _CanaryError)):
            raise
        return [opening.without_devices(list(fallbacks.values()), error)]
    chains = []
    for link in links:
        others = [*(other for other in links if other is not link), *fallbacks.values()]
        chains.append(GuardedEncoder(link, others, opening.shadow(link, reference)))
    return chains


class _Opening:
    """Makes and starts links over one source, which share its golden images, its first answer and its cores."""

    def __init__(self, source: Tower | Bundle, settings: Settings, host: Host | None) -> None:
        self._settings = settings
        choice = choose_cores(settings.cpu_cores, host)
        self._cores = choice.cores
        if choice.cores is not None:
            logger.info("The encoder's threads run on cores %s of the CPU: %s.", shown_cores(choice.cores), choice.why)
        self._first_answer = FirstAnswer()
        self._golden = read_golden(source) if isinstance(source, Bundle) and settings.canary != "off" else ()

    def link(
        self,
        source: Tower | Bundle,
        backend: str,
        device: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        same: bool = False,
    ) -> ChainLink:
        """Make a link that opens its encoder when it is first needed."""
        settings = self._settings
        opener = partial(
            open_encoder,
            source,
            backend=backend,
            device=device,
            options=options,
            isolation=settings.isolation,
            deadline=LONGEST_SECONDS,  # the link enforces the deadline and ends the device's process
            open_deadline=settings.open_deadline,
            cores=self._cores,
            weights=settings.weights,
        )
        return ChainLink(
            backend,
            opener,
            canary=Canary(self._golden, self._first_answer, fallback=not same),
            canary_on=settings.canary != "off",
            interval=settings.canary_interval,
            deadline=settings.deadline,
            open_deadline=settings.open_deadline,
            failures=settings.breaker_failures,
            cool_down=settings.breaker_seconds,
            same=same,
        )

    def start(self, links: Sequence[ChainLink]) -> None:
        """Open encoders, each of which must encode the golden images correctly; if one fails, close all and raise."""
        with ExitStack() as opened:
            for link in links:
                opened.callback(link.close)
                link.name = link.open().backend  # the name may have been `auto`
                failure = link.check().failure if self._settings.canary != "off" else None
                if failure is not None:
                    raise _CanaryError(
                        f"backend {link.name!r} failed its canary and cannot be trusted: {failure}",
                        hint="Run `visionaccel validate` and `visionaccel doctor`, or set VISIONACCEL_CANARY=off.",
                    )
            opened.pop_all()

    def without_devices(self, fallbacks: Sequence[ChainLink], error: VisionAccelError) -> GuardedEncoder:
        """Return a chain of the fallbacks, from the first that can start."""
        for number, link in enumerate(fallbacks):
            logger.error("Starting with the fallback %r, because %s", link.name, error)
            try:
                self.start([link])
                return GuardedEncoder(link, fallbacks[number + 1 :])
            except VisionAccelError as another:
                error = another
        raise error

    def shadow(self, link: ChainLink, reference: ChainLink | None) -> Shadow | None:
        """Make the shadow of an open link; None without a reference."""
        if reference is None:
            return None
        encoder = link.encoder_if_open
        assert encoder is not None
        limits = [image.threshold for image in self._golden] or [precision_limit(encoder)]
        return Shadow(self._settings.shadow, self._settings.shadow_limit or min(limits), reference)


class _CanaryError(DeviceError):
    """A device encoded golden images incorrectly."""


def open_service(
    source: str | os.PathLike[str] | Tower | Bundle,
    *,
    backend: str = AUTO,
    devices: Sequence[str] = (),
    fallback: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    isolation: WantedIsolation = "auto",
    deadline: float = DEADLINE,
    open_deadline: float = OPEN_DEADLINE,
    queue_size: int = QUEUE_SIZE,
    cache_size: int = CACHE_SIZE,
    dtype: str = "float32",
    cores: Iterable[int] | None = None,
    weights: WantedWeights = "private",
) -> EncodeService:
    """Open an encode service from Python. The caller closes it.

    Args:
        source: See `open_encoder`.
        backend: Name of an installed backend, or `auto`.
        devices: The backend's devices, each of which gets an encoder; the backend's default device if empty.
        fallback: One or more backends that encode what the devices fail on, and replace devices that cannot start.
        options: The backend's options by name.
        isolation: Whether each device runs in a child process; `auto` for what the backend declares.
        deadline: Seconds that a device may take for each image of a call.
        open_deadline: Seconds that opening a device may take.
        queue_size: The maximum number of items that wait for a device.
        cache_size: The maximum size of the embedding cache, in bytes.
        dtype: The embeddings' dtype: `float32`, `bfloat16` or `float16`.
        cores: CPU cores that the devices' threads run on; None to leave that to the runtimes.
        weights: Where the weights are read from; see `open_encoder`.

    Raises:
        ConfigurationError: If a value is invalid, or the backend cannot run.
        ArtifactError: If the bundle or checkpoint is broken.
        DeviceError: If a device fails to open.
    """
    settings = make_settings(
        backend=backend,
        device=None,
        devices=devices,
        fallback=fallback,
        options=dict(options or {}),
        isolation=isolation,
        deadline=deadline,
        open_deadline=open_deadline,
        queue_size=queue_size,
        cache_size=cache_size,
        cpu_cores=None if cores is None else frozenset(cores),
        weights=weights,
    )
    return open_wanted_service(open_source(source), settings, dtype)


def open_wanted_service(
    source: Tower | Bundle, settings: Settings, dtype: str = "float32", host: Host | None = None
) -> EncodeService:
    """Open an encode service as the settings describe it.

    Raises:
        VisionAccelError: The errors of `open_guarded` and `EncodeService`.
    """
    encoders = open_guarded(source, settings, settings.wanted_devices, host)
    try:
        return EncodeService(encoders, queue_size=settings.queue_size, cache=settings.cache_size, dtype=dtype)
    except BaseException:
        for encoder in encoders:
            encoder.close()
        raise
