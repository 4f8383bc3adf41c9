"""The self-test's child process: ten requests through vLLM's scheduler with the EC connector and a modelled device.

`python -m visionaccel.integrations.vllm.pipelined.modelled_run FILE LIMIT own|stock async|sync` loads no weights, opens
no device, and writes its verdict to FILE.
"""

from __future__ import annotations

import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import Finding
from visionaccel.core.grid import Grid
from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import DeviceError
from visionaccel.integrations.vllm.compat import engine_config
from visionaccel.integrations.vllm.compat.modelled_engine import (
    ANSWER,
    GRID,
    IMAGE_TOKENS,
    ModelledEngine,
    config_without_model,
    images_read,
    make_scheduler,
)
from visionaccel.integrations.vllm.connector import VisionAccelConnector
from visionaccel.integrations.vllm.pipelined.pending_images import PendingImages
from visionaccel.integrations.vllm.pipelined.self_test import NAME
from visionaccel.isolation import give_up_after, write_findings
from visionaccel.service import Embedding, EncodeService

_WIDTH, _STEPS, _TOKEN = 4, 400, 7
_BROKEN = 7
"""The number of the image that cannot be encoded."""


class ModelledConnector(VisionAccelConnector):
    """The connector, which is also its own encode service: `work` encodes the images in order, without threads."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role)  # opens no service, because the model takes no images
        self._queue: deque[tuple[str, Future[Embedding]]] = deque()
        self._pending_images = PendingImages(cast("EncodeService", self), 100 * self.bytes_of(GRID))

    def submit(self, *_: Any, key: str, **__: Any) -> Future[Embedding]:
        future: Future[Embedding] = Future()
        self._queue.append((key, future))
        return future

    def bytes_of(self, _: Grid) -> int:
        return IMAGE_TOKENS * _WIDTH * 4

    def work(self) -> None:
        """Encode the image that has waited longest and was not cancelled."""
        while self._queue:
            key, future = self._queue.popleft()
            if future.set_running_or_notify_cancel():
                if key == f"image{_BROKEN}":
                    future.set_exception(DeviceError("the modelled device cannot encode it."))
                else:
                    future.set_result(_rows_of(key))
                return


class _Engine(ModelledEngine):
    """An engine that records which requests have read an embedding that is not their image's."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._rows: dict[str, NDArray[Any]] = {}
        self.misled: set[str] = set()
        self.encoded = 0  # images that the worker had to encode itself

    def compute(self, step: Any) -> Mapping[str, int]:
        for identifier in step.free_encoder_mm_hashes:
            self._rows.pop(identifier, None)
        self._rows |= step.ec_connector_metadata.rows
        self.encoded += sum(map(len, step.scheduled_encoder_inputs.values()))
        for name, count in step.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            end = request.num_computed_tokens
            for image in images_read(request, end - count, end):
                if not np.array_equal(self._rows.get(image, ()), _rows_of(image)):
                    self.misled.add(name)
        return dict.fromkeys(step.num_scheduled_tokens, _TOKEN)


def _rows_of(identifier: str) -> NDArray[np.float32]:
    return np.full((IMAGE_TOKENS, _WIDTH), float(identifier.removeprefix("image")), np.float32)


def run_modelled(*, contained: bool, asynchronous: bool) -> Finding:
    """Run the requests with one of this package's schedulers or, if not `contained`, of vLLM's own.

    A finding with a fix is not a verdict: an exception was raised before the requests had ended.
    """
    try:
        with temporary_folder("visionaccel-self-test-") as folder:
            config = config_without_model(folder, ModelledConnector, asynchronous=asynchronous)
            if contained:
                engine_config.use_contained_scheduler(config)
            problem = _play(_Engine(make_scheduler(config)))
    except Exception as error:  # vLLM behaves differently, or the machine has a problem, such as a full disk
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return Finding(NAME, "failure", said, "Fix what the message names; the self-test runs again at each start.")
    return Finding(NAME, "failure" if problem else "pass", problem or "every request ended as expected")


def _play(engine: _Engine) -> str | None:
    """Run the requests; return what went wrong, or None."""
    connector: Any = engine.scheduler.ec_connector
    if not isinstance(connector, ModelledConnector):
        return f"the scheduler has the connector {type(connector).__name__}"
    text = engine.add([], 6)
    wanted = {
        text: "length",
        engine.add([0], 3): "length",
        engine.add([1], 20): "length",
        engine.add([0, 1], 5): "length",
        engine.add([_BROKEN], 3): "error",
        engine.add([2, _BROKEN], 3): "error",
    }
    if not _until(engine, lambda: text in engine.endings):
        return "a text request does not end while others wait for their images"
    early = [name for name in wanted if name != text and engine.answers[name]]
    if early:
        return f"{early[0]} was answered before its image was encoded"
    aborted = engine.add([3], 3)
    wanted |= {aborted: "abort", engine.add([2], 60): "length"}
    engine.step()
    engine.abort(aborted)
    wanted |= {engine.add([3, 2], 3): "length", engine.add([0, 1, 2], 10): "length", engine.add([], 50): "length"}
    if not _until(engine, lambda: not engine.busy(), connector.work):
        lost = [name for name in wanted if name not in engine.endings]
        return f"{lost[0] if lost else 'the last step'} does not end"
    if engine.encoded:
        return f"{engine.encoded} images that the connector had were encoded in the step"
    for name, ending in wanted.items():
        if engine.endings.get(name) != ending:
            return f"{name} ended with {engine.endings.get(name)!r} and not with {ending!r}"
        if name in engine.misled or len(engine.answers[name]) != (ANSWER if ending == "length" else 0):
            return f"{name} was answered with embeddings of other images, or not completely"
    held = connector._pending_images.held
    return f"{held} bytes of embeddings are held for requests that have ended" if held else None


def _until(engine: ModelledEngine, done: Callable[[], bool], work: Callable[[], None] = lambda: None) -> bool:
    """Run steps until a condition holds, with some work of the device at every third; return whether it holds."""
    for step in range(_STEPS):
        if done():
            return True
        engine.step()
        if step % 3 == 2:
            work()
    return done()


def main(file: str, limit: str, scheduler: str, timing: str) -> None:
    """Run the requests, and write the verdict to a file as a finding; give up after `limit` seconds."""
    give_up_after(float(limit))
    write_findings(file, [run_modelled(contained=scheduler == "own", asynchronous=timing == "async")])


if __name__ == "__main__":
    main(*sys.argv[1:])
