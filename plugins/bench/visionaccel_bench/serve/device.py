"""The device under measurement: the settings of servers that use it, and its time for an image."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionaccel.bundle import Bundle, is_bundle, open_bundle
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.encoder import Encoder, open_encoder, open_source
from visionaccel.errors import ConfigurationError
from visionaccel.families import Tower
from visionaccel.images import fitter_for, image_processor
from visionaccel_testing.simulated.backend import NAME as SIMULATED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from visionaccel.core.grid import Grid

TIMES = ("latency", "per_patch", "recorded")
"""Options of the simulated backend that set how long it takes."""


class Mode(StrEnum):
    """How a server that the command starts encodes."""

    STOCK = "stock"
    INLINE = "inline"
    PIPELINED = "pipelined"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What encodes in every mode except stock. Without a bundle, programs are made from the served checkpoint."""

    backend: str
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    bundle: Path | None = None

    @property
    def simulated(self) -> bool:
        """Whether it is the simulated device."""
        return self.backend == SIMULATED

    def settings(self, mode: Mode) -> dict[str, str]:
        """Return the environment variables of a server; none for stock vLLM."""
        if mode is Mode.STOCK:
            return {}
        settings = {
            "VISIONACCEL_BACKEND": self.backend,
            "VISIONACCEL_MODE": mode.value,
            "VISIONACCEL_TIMING": "1",
            "VISIONACCEL_DEVICE": self.device,
            "VISIONACCEL_OPTIONS": json.dumps(dict(self.options)) if self.options else None,
            "VISIONACCEL_BUNDLE": None if self.bundle is None else str(self.bundle),
        }
        return {name: value for name, value in settings.items() if value is not None}

    def without_latency(self) -> Accelerator:
        """Return the simulated device without latency: it takes only the time of the wrapped backend."""
        return replace(self, options={name: value for name, value in self.options.items() if name not in TIMES})


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Seconds of one image of the load while the device is busy, None if unknown; and where they come from."""

    seconds_each: float | None
    how: str


def with_latency(
    checkpoint: Path, accelerator: Accelerator, image: Image, latency: float
) -> tuple[Accelerator, DeviceTime]:
    """Make a simulated device take `latency` seconds for every image of this size, also for several in one call.

    The backend's option `latency` would charge a call of several images once, and in-line vLLM passes those that arrive
    together in one call. So the time becomes `per_patch`.

    Raises:
        ConfigurationError: The device is not simulated, or its options already set how long it takes.
        VisionAccelError: The checkpoint's image processor or the bundle cannot be opened.
    """
    given = [name for name in TIMES if name in accelerator.options]
    if not accelerator.simulated or given:
        reason = f"--options sets {given[0]!r}" if given else f"backend {accelerator.backend!r} is not simulated"
        raise ConfigurationError(f"--latency cannot be used: {reason}.", hint="Leave --latency out.")
    if accelerator.bundle is None:
        _, grid = image_processor(checkpoint)(image)
    else:
        with _opened(checkpoint, accelerator) as (prepare, _):
            _, grid = prepare(image)
    timed = replace(accelerator, options={**accelerator.options, "per_patch": latency / grid.patches})
    at_a_time = accelerator.options.get("max_in_flight", 1)
    return timed, DeviceTime(latency / at_a_time, "the simulated device's, as configured")


def measured(checkpoint: Path, accelerator: Accelerator, images: Sequence[Image]) -> DeviceTime:
    """Measure the device time of an image by encoding a few in this process, one at a time; the first does not count.

    For a device that runs several calls at a time, the time is divided by their number.
    """
    with _opened(checkpoint, accelerator) as (prepare, encoder):
        seconds = []
        for image in images:
            patches, grid = prepare(image)
            started = time.perf_counter()
            encoder.encode(patches, [grid])
            seconds.append(time.perf_counter() - started)
        mean = sum(seconds[1:]) / len(seconds[1:])
        how = f"{len(seconds[1:])} images encoded one at a time beforehand"
        return DeviceTime(mean / encoder.capabilities.max_in_flight, how)


@contextmanager
def _opened(
    checkpoint: Path, accelerator: Accelerator
) -> Iterator[tuple[Callable[[Image], tuple[NDArray[np.float32], Grid]], Encoder]]:
    """Open the encoder as a server would; yields a function that makes patches of an image, and the encoder."""
    located, folder, options = locate_checkpoint(checkpoint), accelerator.bundle, accelerator.options
    source: Tower | Bundle
    if folder is not None and is_bundle(folder):
        source = open_bundle(folder, checkpoint=located)
    else:
        source = open_source(folder or checkpoint)
    process = image_processor(located.folder)
    with open_encoder(source, backend=accelerator.backend, device=accelerator.device, options=options) as encoder:
        fitter = fitter_for(source.tower, encoder.coverages, "letterbox", process)
        assert fitter is not None
        yield lambda image: process(fitter.fit(image)), encoder
