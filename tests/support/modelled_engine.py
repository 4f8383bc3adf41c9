"""The modelled engine of the self-test, with images that fail and images that are encoded wrongly."""

import time
import warnings

import torch

from visionaccel.integrations.vllm.shared_memory import Fault, report_fault
from visionaccel.service import item_key

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    from visionaccel.integrations.vllm.compat import engine_config
    from visionaccel.integrations.vllm.compat.modelled_engine import (
        BLOCK,
        GRID,
        IMAGE_TOKENS,
        ModelledEngine,
        images_read,
        make_scheduler,
        small_config,
    )

__all__ = ["GOOD", "GRID", "IMAGES", "IMAGE_TOKENS", "TAINTED", "Engine", "Worker", "forget", "make", "pixels"]

IMAGES = 4
GOOD, TAINTED = 7, 13  # the token of an answer computed from right encoder outputs only, and of another
PATCH_WIDTH = 3 * 2 * 14 * 14


def pixels(image):
    return torch.full((IMAGE_TOKENS * 4, PATCH_WIDTH), image / 8)


class Worker:
    """What a worker computes from what. Its encoder fails for some images, and reports it.

    Like vLLM's newer runner, it does not encode again what it still holds.
    """

    def __init__(self):
        self.outputs = {}  # encoder outputs that it holds, and whether each is right
        self.tainted = set()  # (block, slot) of keys computed from a wrong one
        self.encoded = 0  # how many images it was to encode itself
        self.broken = set()
        self.lying = set()  # encoded wrongly, and nobody is told
        self.engine = ""

    def run(self, scheduler, step):
        for identifier in step.free_encoder_mm_hashes:
            self.outputs.pop(identifier, None)
        for identifier, rows in getattr(step.ec_connector_metadata, "rows", {}).items():
            self.outputs[identifier] = self.is_right(identifier, rows)
        for name, indices in step.scheduled_encoder_inputs.items():
            for index in indices:
                identifier = scheduler.requests[name].mm_features[index].identifier
                self.encoded += 1
                if identifier not in self.outputs:
                    self.outputs[identifier] = self.encode(identifier)
        return {name: self.compute(scheduler, name, count) for name, count in step.num_scheduled_tokens.items()}

    def is_right(self, identifier, rows):
        """Whether an embedding that came through the EC connector is that image's."""
        return True

    def encode(self, identifier):
        image = int(identifier.removeprefix("image"))
        if image in self.broken:
            assert report_fault(Fault(item_key(pixels(image), GRID), f"image {image} is broken"), self.engine)
        return image not in self.broken | self.lying

    def compute(self, scheduler, name, count):
        request = scheduler.requests[name]
        table = scheduler.kv_cache_manager.get_block_ids(name)[0]
        start = request.num_computed_tokens - count
        slots = [(table[position // BLOCK], position % BLOCK) for position in range(start + count)]
        tainted = any(slot in self.tainted for slot in slots[:start])
        for position, slot in enumerate(slots[start:], start):
            tainted |= not all(self.outputs[image] for image in images_read(request, position, position + 1))
            (self.tainted.add if tainted else self.tainted.discard)(slot)
        return TAINTED if tainted else GOOD


class Engine(ModelledEngine):
    """A modelled engine that can be run until it has nothing to do."""

    def __init__(self, scheduler, worker=None):
        super().__init__(scheduler)
        self.worker = worker or Worker()
        self.worker.engine = engine_config.served_model(scheduler.vllm_config).engine

    def pixels(self, image):
        return pixels(image)

    def compute(self, step):
        return self.worker.run(self.scheduler, step)

    def drain(self, seconds=30):
        end = time.monotonic() + seconds
        while self.busy():
            assert time.monotonic() < end, "the engine does not come to an end"
            self.step()
            if not self.scheduler.running:
                time.sleep(0.0005)  # for an encoder's thread


def make(checkpoint, kind, *, pipelined):
    """A contained scheduler of vLLM's, with caches small enough to be evicted and preempted all the time."""
    config = small_config(str(checkpoint), asynchronous=kind == "async")
    if pipelined:
        engine_config.use_connector(config, client_embeds=False)
    engine_config.use_contained_scheduler(config)
    return make_scheduler(config)


def forget(scheduler):
    """Empty the scheduler's caches, as a fresh worker's are."""
    scheduler.encoder_cache_manager.reset()
    assert scheduler.reset_prefix_cache()
    scheduler._forgotten.clear()
