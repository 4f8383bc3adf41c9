"""Ten requests through vLLM's scheduler with the EC connector, a modelled device and a modelled worker: the self-test.

Run in its own process, `python -m visionaccel.integrations.vllm.pipelined.modelled_run FILE LIMIT SCHEDULER TIMING`.
It loads no weights and opens no device.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from visionaccel.backends import Finding
from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.grid import Grid
from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import DeviceError
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import ECConnectorRole, architectures, engine_config
from visionaccel.integrations.vllm.compat.modelled_engine import (
    GOOD,
    Image,
    ModelledEngine,
    ModelledWorker,
    make_scheduler,
    small_config,
)
from visionaccel.integrations.vllm.pipelined.connector import VisionAccelConnector
from visionaccel.integrations.vllm.pipelined.pending_images import PendingImages
from visionaccel.integrations.vllm.pipelined.self_test import NAME
from visionaccel.integrations.vllm.scheduler import ContainedAsyncScheduler, ContainedScheduler
from visionaccel.isolation import answer_with, give_up_after
from visionaccel.service import Embedding, EncodeService

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler

GRID, TOKENS, WIDTH, BROKEN = Grid(1, 6, 6), 9, 4, 7
"""Grid of each image, its embeddings and their width, and the number of the image that no device encodes."""

_STEPS = 400
_BYTES = TOKENS * WIDTH * 4
_ARCHITECTURE = "Qwen2ForCausalLM"
_MODEL = {
    "architectures": [_ARCHITECTURE],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "torch_dtype": "float32",
}
"""A language model's configuration: the scheduler looks at a request's images, and not at the model's."""


class ModelledService:
    """The encode service without threads: images are encoded by `work`, the first come first."""

    def __init__(self) -> None:
        self._queue: deque[tuple[float, Future[Embedding]]] = deque()

    def submit(self, patches: Array, _: Grid, **__: Any) -> Future[Embedding]:
        future: Future[Embedding] = Future()
        self._queue.append((float(as_numpy(patches)[0, 0]), future))
        return future

    def bytes_of(self, _: Grid) -> int:
        return _BYTES

    def work(self) -> None:
        """Encode the image that has waited longest."""
        while self._queue:
            number, future = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            if number == BROKEN:
                future.set_exception(DeviceError("the modelled device cannot encode it."))
            else:
                future.set_result(rows_of(number))
            return


def rows_of(number: float) -> Embedding:
    """The embedding of an image."""
    return np.full((TOKENS, WIDTH), number, np.float32)


class ModelledConnector(VisionAccelConnector):
    """The connector with a modelled service."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)  # opens nothing: the configuration is of a language model
        self.modelled = ModelledService()
        self._service = cast("EncodeService", self.modelled)
        self._pending_images = PendingImages(self._service, 100 * _BYTES)


class _Worker(ModelledWorker):
    def is_right(self, identifier: str, rows: Any) -> bool:
        return bool(np.array_equal(rows, rows_of(float(identifier.removeprefix("image")))))


def run_modelled(kind: type[Scheduler], *, asynchronous: bool) -> Finding:
    """Play the requests with a scheduler of that class, vLLM's asynchronous one or derived from it if it says so.

    Returns:
        The verdict; with a fix if there is none, because something was raised before the requests had ended.
    """
    try:
        problem = _problem(kind, asynchronous)
    except Exception as error:  # Of vLLM's, because it is not what we know; or the machine's, such as a full disk.
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return Finding(NAME, "failure", said, "Mend what the message names; the self-test runs again at each start.")
    if problem is None:
        return Finding(NAME, "pass", "every request ended as it should")
    return Finding(NAME, "failure", problem)


def _problem(kind: type[Scheduler], asynchronous: bool) -> str | None:
    """What went wrong; None if nothing did."""
    architectures.use_model_in_process(_ARCHITECTURE)
    with temporary_folder("visionaccel-self-test-") as folder:
        (folder / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        config = small_config(str(folder), asynchronous=asynchronous, skip_tokenizer_init=True)
        engine_config.use_ec_connector(config, ModelledConnector.__name__, __name__)
        return _play(ModelledEngine(make_scheduler(config, kind, 4 * TOKENS), _Worker()))


def _play(engine: ModelledEngine) -> str | None:
    connector: Any = engine.scheduler.ec_connector
    if not isinstance(connector, ModelledConnector):
        return f"the scheduler has the connector {type(connector).__name__}"
    images = [_image(number) for number in range(4)]
    broken = _image(BROKEN)
    text = engine.add([], 6)
    wanted = {
        text: "length",
        engine.add([images[0]], 3): "length",
        engine.add([images[1]], 20): "length",
        engine.add([images[0], images[1]], 5): "length",
        engine.add([broken], 3): "error",
        engine.add([images[2], broken], 3): "error",
    }
    if not _until(engine, lambda: text in engine.endings):
        return "a request of text does not end while others wait for their images"
    early = [name for name in wanted if name != text and engine.answers[name]]
    if early:
        return f"{early[0]} was answered before its image was encoded"
    aborted = engine.add([images[3]], 3)
    wanted |= {aborted: "abort", engine.add([images[2]], 60): "length"}
    engine.step()
    engine.abort(aborted)
    wanted |= {
        engine.add([images[3], images[2]], 3): "length",
        engine.add([images[0], images[1], images[2]], 10): "length",
        engine.add([], 50): "length",
    }
    if not _until(engine, lambda: not engine.busy(), connector.modelled.work):
        lost = [name for name in wanted if name not in engine.endings]
        return f"{lost[0] if lost else 'the last step'} does not end"
    return _judged(engine, wanted, connector)


def _judged(engine: ModelledEngine, wanted: dict[str, str], connector: ModelledConnector) -> str | None:
    """What is wrong with how the requests ended."""
    for name, ending in wanted.items():
        found = engine.endings.get(name)
        if found != ending:
            return f"{name} ended with {found!r} and not with {ending!r}"
        tokens = [GOOD] * 3 if ending == "length" else []
        if engine.answers[name] != tokens:
            return f"{name} was answered from other embeddings than its images', or is not whole"
    if engine.worker.encoded:
        return f"{engine.worker.encoded} images that the connector had were encoded in the step"
    held = connector._pending_images.held
    return f"{held} bytes of embeddings are held for requests that have ended" if held else None


def _until(engine: ModelledEngine, done: Callable[[], bool], work: Callable[[], None] = lambda: None) -> bool:
    """Play steps until something is the case, with some work of the device every third; whether it came to that."""
    for step in range(_STEPS):
        if done():
            return True
        engine.step()
        if step % 3 == 2:
            work()
    return done()


def _image(number: int) -> Image:
    pixels = torch.full((GRID.patches, WIDTH), float(number))
    return Image(f"image{number}", pixels, (GRID.t, GRID.h, GRID.w), TOKENS)


def main(file: str, limit: str, scheduler: str, timing: str) -> None:
    """Play the requests, and write the verdict as a finding into a file.

    Args:
        file: Where it goes.
        limit: Seconds after which the self-test is not waited for.
        scheduler: `own` for this package's schedulers, or `stock` for vLLM's.
        timing: `async` or `sync`.
    """
    give_up_after(float(limit))
    kinds = {
        ("own", "sync"): ContainedScheduler,
        ("own", "async"): ContainedAsyncScheduler,
        ("stock", "sync"): compat.Scheduler,
        ("stock", "async"): compat.AsyncScheduler,
    }
    answer_with(file, [run_modelled(kinds[scheduler, timing], asynchronous=timing == "async")])


if __name__ == "__main__":
    main(*sys.argv[1:])
