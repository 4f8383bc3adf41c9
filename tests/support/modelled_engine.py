"""The modelled engine of the self-test, with images that fail and images that are encoded wrongly."""

import time
from dataclasses import dataclass, field

import torch

from visionaccel.core.grid import Grid
from visionaccel.integrations.vllm.compat import engine_config
from visionaccel.integrations.vllm.compat.modelled_engine import (
    GOOD,
    TAINTED,
    Image,
    ModelledEngine,
    ModelledWorker,
    make_scheduler,
    small_config,
)
from visionaccel.integrations.vllm.inline.fault_channel import Fault, report_fault
from visionaccel.service import item_key

__all__ = ["GOOD", "GRID", "IMAGES", "IMAGE_TOKENS", "TAINTED", "Engine", "Worker", "forget", "make", "pixels"]

IMAGE_TOKENS = 9
IMAGES = 4
PATCH_WIDTH = 3 * 2 * 14 * 14
GRID = Grid(1, 6, 6)


def pixels(image):
    return torch.full((IMAGE_TOKENS * 4, PATCH_WIDTH), image / 8)


@dataclass
class Worker(ModelledWorker):
    """A worker whose encoder fails for some images, and reports it."""

    broken: set = field(default_factory=set)
    lying: set = field(default_factory=set)  # encoded wrongly, and nobody is told
    engine: str = ""

    def encode(self, identifier):
        image = int(identifier.removeprefix("image"))
        if image in self.broken:
            assert report_fault(Fault(item_key(pixels(image), GRID), f"image {image} is broken"), self.engine)
        return image not in self.broken | self.lying


class Engine(ModelledEngine):
    """A modelled engine that takes images by their number."""

    def __init__(self, scheduler, worker=None):
        super().__init__(scheduler, worker or Worker())
        self.worker.engine = engine_config.engine_id(scheduler.vllm_config)

    def add(self, images, text):
        grid = (GRID.t, GRID.h, GRID.w)
        return super().add([Image(f"image{image}", pixels(image), grid, IMAGE_TOKENS) for image in images], text)

    def drain(self, seconds=30):
        end = time.monotonic() + seconds
        while self.busy():
            assert time.monotonic() < end, "the engine does not come to an end"
            self.step()
            if not self.scheduler.running:
                time.sleep(0.0005)  # for an encoder's thread


def make(checkpoint, kind, *, pipelined):
    """A contained scheduler of vLLM's, with caches small enough to be evicted and preempted all the time."""
    from visionaccel.integrations.vllm.scheduler import ContainedAsyncScheduler, ContainedScheduler

    config = small_config(str(checkpoint), asynchronous=kind == "async")
    if pipelined:
        engine_config.use_connector(config, client_embeds=False)
    return make_scheduler(config, ContainedAsyncScheduler if kind == "async" else ContainedScheduler, 3 * IMAGE_TOKENS)


def forget(scheduler):
    """Empty the scheduler's caches, as a fresh worker's are."""
    scheduler.encoder_cache_manager.reset()
    assert scheduler.reset_prefix_cache()
    scheduler._forgotten.clear()
