"""What is sent to each server, in which order; and the servers that are started for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.errors import DeviceError
from visionaccel.observe import timed_encodes
from visionaccel_bench.serve.device import Accelerator, Mode
from visionaccel_bench.serve.load import Load, Run, first_model, picture, send
from visionaccel_bench.server import log_end, serve
from visionaccel_testing.simulated import OVERRUN

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[str], None]

_ENCODER = re.compile(r"the vision encoder runs on (backend .*)")
_WARM_UP_TOKENS = 16
_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
_LEAST_SEQUENCES = 16


class _Purpose(IntEnum):
    """Each has different images, so that no load finds those of a different one in a cache."""

    WARM_UP = 0
    MIXED = 1
    ONE_BY_ONE = 2
    TOGETHER = 3
    DEVICE = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """The loads that each server gets; see `Load`.

    Attributes:
        size: Width and height of the images in pixels.
        repeats: How often each load is sent, with different images each time.
        sequential: Whether image requests are also sent one by one, and all at once without text.
        seed: Plans with the same seed have the same images.
    """

    images: int
    image_tokens: int
    gap: float
    streams: int
    stream_tokens: int
    size: tuple[int, int]
    repeats: int = 1
    sequential: bool = False
    seed: int = 0

    @property
    def device_images(self) -> tuple[Image, ...]:
        """Images of the load's size to measure the device with, one more than the load has."""
        return self._pictures(_Purpose.DEVICE, 0, self.images + 1)

    def warm_up(self) -> Load:
        """Return a load of one short text stream and one image."""
        pictures = self._pictures(_Purpose.WARM_UP, 0, 1)
        return Load(pictures, self.image_tokens, streams=1, stream_tokens=_WARM_UP_TOKENS)

    def mixed(self, repetition: int) -> Load:
        """Return the text streams and image requests."""
        pictures = self._pictures(_Purpose.MIXED, repetition, self.images)
        return Load(pictures, self.image_tokens, self.gap, self.streams, self.stream_tokens)

    def text_only(self) -> Load:
        """Return the text streams of the mixed load alone."""
        return Load((), self.image_tokens, streams=self.streams, stream_tokens=self.stream_tokens)

    def images_only(self, repetition: int, *, one_by_one: bool = False) -> Load:
        """Image requests without text, to be sent all at once or one by one."""
        purpose = _Purpose.ONE_BY_ONE if one_by_one else _Purpose.TOGETHER
        return Load(self._pictures(purpose, repetition, self.images), self.image_tokens)

    def _pictures(self, purpose: _Purpose, repetition: int, count: int) -> tuple[Image, ...]:
        return tuple(picture((self.seed, purpose, repetition, i), self.size) for i in range(count))


@dataclass(frozen=True, slots=True)
class Subject:
    """A server under measurement: one that was started, with its mode as name and with a log, or a running one."""

    name: str
    url: str
    model: str
    log: Path | None = None

    def encodes(self) -> int | None:
        """Count the images that it has encoded so far on a backend; None if that is unknown."""
        if self.log is None or self.name == Mode.STOCK:
            return None
        return sum(len(encode["grids"]) for encode in timed_encodes(self._logged()))

    def encoder(self) -> str | None:
        """Return what encodes, from its log; None for stock vLLM and without a log."""
        found = _ENCODER.findall(self._logged())
        return found[-1] if found else None

    def overran(self) -> bool:
        """Return whether its simulated device computed for longer than its latency."""
        return OVERRUN in self._logged()

    def _logged(self) -> str:
        return "" if self.log is None else self.log.read_text(errors="replace")


@dataclass(slots=True)
class Taken:
    """The runs of every load of a `Plan` that a server got: one for each repetition, or none.

    In the `free` runs, images cost the device nothing: it takes no time, or gets the same images again, which are then
    in every cache. `encoder` and `overran` are those of the `Subject`.
    """

    mixed: list[Run] = field(default_factory=list)
    text_only: list[Run] = field(default_factory=list)
    mixed_free: list[Run] = field(default_factory=list)
    one_by_one: list[Run] = field(default_factory=list)
    together: list[Run] = field(default_factory=list)
    together_free: list[Run] = field(default_factory=list)
    encoder: str | None = None
    overran: bool = False


def measure(subject: Subject, plan: Plan, tell: Progress, *, again: bool) -> Taken:
    """Warm a server up and send it every load; `tell` receives a description of each.

    With `again`, loads with images are sent a second time: for a server without a twin whose device takes no time.

    Raises:
        DeviceError: A request failed, or the backend did not encode the images. The message names the server and the
            request, and ends with the end of the server's log.
    """
    taken = Taken()
    _sent(subject, plan.warm_up(), tell, "warming up")
    for i in range(plan.repeats):
        part = f", {i + 1} of {plan.repeats}" if plan.repeats > 1 else ""
        taken.text_only.append(_sent(subject, plan.text_only(), tell, f"text alone{part}"))
        mixed = plan.mixed(i)
        taken.mixed.append(_sent(subject, mixed, tell, f"text and images{part}"))
        if again:
            taken.mixed_free.append(_sent(subject, mixed, tell, f"the same images again{part}", new=False))
        if plan.sequential and subject.name == Mode.INLINE:
            load = plan.images_only(i, one_by_one=True)
            taken.one_by_one.append(_sent(subject, load, tell, f"images one by one{part}", one_by_one=True))
        if plan.sequential and subject.name != Mode.STOCK:
            load = plan.images_only(i)
            taken.together.append(_sent(subject, load, tell, f"images at once{part}"))
            if again:
                what = f"images at once, again{part}"
                taken.together_free.append(_sent(subject, load, tell, what, new=False))
    taken.encoder, taken.overran = subject.encoder(), subject.overran()
    return taken


def measure_without_latency(subject: Subject, plan: Plan, tell: Progress, taken: Taken) -> None:
    """Warm up a server's twin whose simulated device takes no time, and send it the loads with images."""
    _sent(subject, plan.warm_up(), tell, "warming up, without device time")
    for i in range(plan.repeats):
        taken.mixed_free.append(_sent(subject, plan.mixed(i), tell, "text and images, without device time"))
        if plan.sequential:
            load = plan.images_only(i)
            taken.together_free.append(_sent(subject, load, tell, "images at once, without device time"))


def running(name: str, url: str) -> Subject:
    """Return a running server; ConfigurationError if it does not tell its model."""
    return Subject(name, url, first_model(url))


@contextmanager
def started(
    mode: Mode, checkpoint: Path, accelerator: Accelerator, plan: Plan, arguments: Sequence[str], tell: Progress
) -> Iterator[Subject]:
    """Start a server of a mode that can take a plan. Raises the errors of `visionaccel_bench.server.serve`.

    vLLM uses the last of an argument that is given twice, so `arguments` override those set here.
    """
    sequences = max(_LEAST_SEQUENCES, plan.streams + plan.images)
    fixed = ("--max-num-seqs", str(sequences), "--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0}))

    def waiting(seconds: float) -> None:
        tell(f"{mode}: starting vLLM, {seconds:.0f} s (usually under a minute)")

    settings = accelerator.settings(mode)
    with serve(checkpoint, settings, (*_ARGUMENTS, *fixed, *arguments), waiting=waiting) as server:
        yield Subject(mode, server.url, server.model, server.log)


def _sent(
    subject: Subject, load: Load, tell: Progress, what: str, *, new: bool = True, one_by_one: bool = False
) -> Run:
    """Send a load; see `measure`. `new` is whether its images are new to the server."""
    tell(f"{subject.name}: {what}")
    before = subject.encodes()
    try:
        run = send(subject.url, subject.model, load, one_by_one=one_by_one)
        after = subject.encodes()
        if new and before is not None and after is not None and after - before < len(load.images):
            raise DeviceError(f"the backend encoded only {after - before} of {len(load.images)} new images.")
    except DeviceError as error:
        log = "" if subject.log is None else f" The end of the server's log:\n{log_end(subject.log)}"
        raise DeviceError(f"{subject.name}, {what}: {error.message}{log}", hint=error.hint) from error
    return run
