"""The self-test's child process: ten requests through vLLM's scheduler with the EC connector and a modelled device.

`python -m visionaccel.integrations.vllm.pipelined.modelled_run FILE LIMIT own|stock async|sync` loads no weights, opens
no device, and writes its verdict into FILE.
"""

from __future__ import annotations

import json
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
    ECTransferConfig,
    ModelledEngine,
    ModelRegistry,
    images_read,
    make_scheduler,
    small_config,
)
from visionaccel.integrations.vllm.connector import VisionAccelConnector
from visionaccel.integrations.vllm.pipelined.pending_images import PendingImages
from visionaccel.integrations.vllm.pipelined.self_test import NAME
from visionaccel.isolation import give_up_after, write_findings
from visionaccel.service import Embedding, EncodeService

_WIDTH, _STEPS, _TOKEN = 4, 400, 7
_BROKEN = 7
"""The number of the image that no device encodes."""

_ARCHITECTURE = "Qwen2ForCausalLM"
"""Of a language model: the scheduler looks at a request's images, and not at the model's."""


class ModelledService:
    """The encode service without threads: `work` encodes images, the first come first."""

    def __init__(self) -> None:
        self._queue: deque[tuple[str, Future[Embedding]]] = deque()

    def submit(self, *_: Any, key: str, **__: Any) -> Future[Embedding]:
        future: Future[Embedding] = Future()
        self._queue.append((key, future))
        return future

    def bytes_of(self, _: Grid) -> int:
        return IMAGE_TOKENS * _WIDTH * 4

    def work(self) -> None:
        """Encode the image that has waited longest."""
        while self._queue:
            key, future = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            if key == f"image{_BROKEN}":
                future.set_exception(DeviceError("the modelled device cannot encode it."))
            else:
                future.set_result(_rows_of(key))
            return


class ModelledConnector(VisionAccelConnector):
    """The connector with a modelled service."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role)  # opens nothing: the configuration is of a language model
        self.modelled = ModelledService()
        self._service = cast("EncodeService", self.modelled)
        self._pending_images = PendingImages(self._service, 100 * self.modelled.bytes_of(GRID))


class _Engine(ModelledEngine):
    """An engine that knows which requests have read another embedding than their image's."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._rows: dict[str, NDArray[Any]] = {}
        self.misled: set[str] = set()
        self.encoded = 0  # images that the worker was to encode itself

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
    """Play the requests with one of this package's schedulers or, if not `contained`, of vLLM's own.

    A finding with a fix is not a verdict: something was raised before the requests had ended.
    """
    try:
        with temporary_folder("visionaccel-self-test-") as folder:
            problem = _play(_engine(folder, contained, asynchronous))
    except Exception as error:  # Of vLLM's, because it is not what we know; or the machine's, such as a full disk.
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return Finding(NAME, "failure", said, "Fix what the message names; the self-test runs again at each start.")
    if problem is None:
        return Finding(NAME, "pass", "every request ended as it should")
    return Finding(NAME, "failure", problem)


def _engine(folder: Path, contained: bool, asynchronous: bool) -> _Engine:
    # vLLM looks at the model's class in this process, and not in a child that imports it.
    ModelRegistry.register_model(_ARCHITECTURE, ModelRegistry.models[_ARCHITECTURE].load_model_cls())
    (folder / "config.json").write_text(
        json.dumps({"architectures": [_ARCHITECTURE], "model_type": "qwen2"}), encoding="utf-8"
    )
    config = small_config(str(folder), asynchronous=asynchronous, skip_tokenizer_init=True)
    config.ec_transfer_config = ECTransferConfig(
        ec_connector=ModelledConnector.__name__, ec_role="ec_consumer", ec_connector_module_path=__name__
    )
    if contained:
        engine_config.use_contained_scheduler(config)
    return _Engine(make_scheduler(config, cached_images=4))


def _play(engine: _Engine) -> str | None:
    """Play the requests; what went wrong, or None if nothing did."""
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
        return "a request of text does not end while others wait for their images"
    early = [name for name in wanted if name != text and engine.answers[name]]
    if early:
        return f"{early[0]} was answered before its image was encoded"
    aborted = engine.add([3], 3)
    wanted |= {aborted: "abort", engine.add([2], 60): "length"}
    engine.step()
    engine.abort(aborted)
    wanted |= {engine.add([3, 2], 3): "length", engine.add([0, 1, 2], 10): "length", engine.add([], 50): "length"}
    if not _until(engine, lambda: not engine.busy(), connector.modelled.work):
        lost = [name for name in wanted if name not in engine.endings]
        return f"{lost[0] if lost else 'the last step'} does not end"
    if engine.encoded:
        return f"{engine.encoded} images that the connector had were encoded in the step"
    for name, ending in wanted.items():
        if engine.endings.get(name) != ending:
            return f"{name} ended with {engine.endings.get(name)!r} and not with {ending!r}"
        if name in engine.misled or len(engine.answers[name]) != (ANSWER if ending == "length" else 0):
            return f"{name} was answered from other embeddings than its images', or is not complete"
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


def main(file: str, limit: str, scheduler: str, timing: str) -> None:
    """Play the requests, and write the verdict as a finding into a file; give up after some seconds."""
    give_up_after(float(limit))
    write_findings(file, [run_modelled(contained=scheduler == "own", asynchronous=timing == "async")])


if __name__ == "__main__":
    main(*sys.argv[1:])
