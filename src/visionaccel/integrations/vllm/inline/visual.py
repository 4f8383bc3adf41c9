"""The module that replaces vLLM's vision tower, its time limit, and a guard that publishes none of its zeros."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionaccel.bundle import Bundle
from visionaccel.core.arrays import as_host_tensor, dtype_name, is_tensor, split_rows
from visionaccel.core.containment import device_errors
from visionaccel.core.grid import as_grids
from visionaccel.encoder import source_digest
from visionaccel.errors import ConfigurationError, DeadlineError, InputError, VisionAccelError
from visionaccel.families import Tower, family_for
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import engine_config, worker
from visionaccel.integrations.vllm.encoder_source import (
    Comparison,
    Replacement,
    StoredWeights,
    announce,
    open_served_source,
    stripped_source,
)
from visionaccel.integrations.vllm.published_metrics import publish
from visionaccel.integrations.vllm.shared_memory import ALL_ITEMS, REPLACED, Fault, report_fault, shared_memory
from visionaccel.service import item_key, open_guarded
from visionaccel.settings import Settings, load_settings
from visionaccel.trust import Embedded, GuardedEncoder

_SHARE = 0.8
"""The encoder's share of the time after which vLLM ends the engine; the language model gets the rest of a step."""

_PAUSE = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class StepBudget:
    """Gives all encodes of a step the same end, `seconds` after the first begins.

    A step ends when the model embeds the prompt's tokens (`end_step`). A server that only encodes embeds none: there,
    the EC connector's metadata differ for each step. The encodes of a step follow each other without a pause, so an
    encode after one, such as the first after vLLM's dummy run, belongs to another step.
    """

    def __init__(self) -> None:
        self.timeout = worker.step_timeout()
        self.seconds = _SHARE * self.timeout
        self._until: float | None = None
        self._ended = 0.0
        self._metadata: object = None

    @contextmanager
    def encode(self) -> Iterator[float]:
        """Enter for each encode; yields the step's end on the monotonic clock."""
        now, metadata = time.monotonic(), worker.step_metadata()
        if self._until is None or metadata is not self._metadata or now - self._ended > _PAUSE:
            self._until, self._metadata = now + self.seconds, metadata
        try:
            yield self._until
        finally:
            self._ended = time.monotonic()

    def end_step(self) -> None:
        """Begin a new step with the next encode."""
        self._until = self._metadata = None

    def warning(self, settings: Settings) -> str | None:
        """Return what is wrong with the deadline; None if every encoder of a chain can use all of it within a step."""
        encoders = 1 + len(settings.fallback)
        if settings.deadline * encoders <= self.seconds:
            return None
        return (
            f"In-line, the encodes of a step may take {self.seconds:g} s (of VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS="
            f"{self.timeout:g}), but an encoder that hangs takes VISIONACCEL_DEADLINE={settings.deadline:g} s, so "
            f"images fail before all {encoders} encoders of the chain were tried. Set VISIONACCEL_DEADLINE to at most "
            f"{self.seconds / encoders:g}, or raise VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."
        )


class LateOpening:
    """An encoder that is opened by the first step that needs it, on its own thread, or before by `open_now`.

    If the time of that step is too short, later steps wait on. After a failure it tries again after a pause, which
    doubles each time up to a minute, because memory may be free by then.
    """

    def __init__(self, make: Callable[[], GuardedEncoder]) -> None:
        self._make = make
        self._opening: Future[GuardedEncoder] | None = None
        self._pause, self._again = _FIRST_PAUSE, 0.0

    def open_now(self) -> None:
        """Open the encoder on this thread."""
        opened = self._make()
        self._opening = Future()
        self._opening.set_result(opened)

    def result(self, until: float) -> GuardedEncoder:
        """Return the encoder; DeadlineError if it is not open by `until` (monotonic clock). The opening goes on."""
        opening = self._opening
        failed = opening is not None and opening.done() and opening.exception() is not None
        if opening is None or (failed and time.monotonic() >= self._again):
            opening = Future()
            thread = threading.Thread(target=self._open, args=(opening,), name="visionaccel-opening", daemon=True)
            with device_errors("opening the encoder"):  # no thread can be started, for example
                thread.start()
            self._opening = opening
        if not wait([opening], max(0.0, until - time.monotonic())).done:
            raise DeadlineError("the encoder is still being opened.", hint="Try again later.")
        error = opening.exception()
        if error is not None:
            raise error.with_traceback(None)  # or it would keep the images of all steps that raised it
        return opening.result()

    def close(self) -> None:
        """Close the encoder; one that is still being opened is closed once it is open."""
        if self._opening is not None:
            self._opening.add_done_callback(lambda done: None if done.exception() else done.result().close())

    def _open(self, opening: Future[GuardedEncoder]) -> None:
        try:
            with device_errors("opening the encoder"):
                opened = self._make()
        except BaseException as error:
            self._again = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            opening.set_exception(error)
        else:
            opening.set_result(opened)


class AcceleratedTower(nn.Module):
    """Encodes in the engine's step. It has no parameters, and loads no tensors of a checkpoint.

    vLLM reads `spatial_merge_size`, `out_hidden_size`, `deepstack_visual_indexes`, and the `dtype` and `device` of the
    embeddings, which are those of the language model.

    If it `receives` embeddings through an EC connector, vLLM's profiling run gets zeros, and the encoder is opened when
    the connector first lacks an embedding.
    """

    def __init__(self, served: engine_config.ServedModel, *, receives: bool = False) -> None:
        super().__init__()
        self._settings, self._receives = load_settings(), receives
        self._engine, self._place = served.engine, (served.source, served.revision)
        self._prefixes = family_for(served.replaces or "").prefixes
        shared_memory()  # for reports of faults: if it cannot be opened, raise before the engine runs
        self._source = open_served_source(served, self._settings)
        self._used: StoredWeights | None = StoredWeights(self._source, self._prefixes)
        tower = self._source.tower
        self.spatial_merge_size = tower.merge_size
        self.out_hidden_size = tower.out_width  # with the deepstack levels, as in vLLM
        self.deepstack_visual_indexes = tower.spec.deepstack
        self.dtype = served.dtype
        self.device = torch.device(served.device)
        self.budget = StepBudget()
        if warning := self.budget.warning(self._settings):
            compat.logger().warning("%s", warning)
        self._refusal: VisionAccelError | None = None
        self._start("in-line")

    def _start(self, how: str) -> None:
        if self._receives:
            how = "in-line, for images that the EC connector lacks"
        self._encoder = LateOpening(functools.partial(self._open, how))
        if not self._receives:
            self._encoder.open_now()

    def forward(self, x: torch.Tensor, grid_thw: Any, **_: Any) -> torch.Tensor:
        """Return the embeddings [N, out_hidden_size] of the items of one step, in the model's dtype and on its device.

        An item that could not be encoded is all zeros, and the scheduler ends its requests before their first token.

        Args:
            x: [P, patch_width] in the model's dtype, the processor's pixel values.
            grid_thw: (t, h, w) of each item.

        Raises:
            VisionAccelError: Why an item could not be encoded, if no scheduler of this package listens, as at start-up.
        """
        if self._receives and worker.profiling():
            tokens = len(x) // self.spatial_merge_size**2
            return torch.zeros(tokens, self.out_hidden_size, dtype=self.dtype, device=self.device)
        rows = []
        for item, answer in enumerate(self._encode(x, grid_thw)):
            if isinstance(answer, VisionAccelError):
                embeddings = self._contain(x, grid_thw, item, answer)
            else:
                embeddings = answer.rows if is_tensor(answer.rows) else as_host_tensor(answer.rows, dtype_name(self))
            rows.append(embeddings.to(self.device, self.dtype))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def compare(self, served: Callable[[], engine_config.ServedModel]) -> Comparison:
        """Begin a comparison of weights that vLLM is given after the start with those in use."""
        return Comparison(self._used, self._prefixes, lambda: open_served_source(served(), self._settings))

    def settle(self, comparison: Comparison, served: engine_config.ServedModel) -> None:
        """End an update of weights: continue, reopen the encoder from vLLM's files, or stop encoding and raise."""
        try:
            with device_errors("opening the encoder from the new weights"):
                source = comparison.replacement() if comparison.differing else self._stripped(comparison, served)
                if source is not None:
                    self._adopt(source, served)
                self._place = served.source, served.revision
        except VisionAccelError as error:
            self._refuse(error, served)
            raise

    def _stripped(self, comparison: Comparison, served: engine_config.ServedModel) -> Tower | Bundle | None:
        """Return the encoder that a stripped checkpoint belongs to; None to keep this one."""
        same_repository = (served.source, served.revision) == self._place and not Path(served.source).is_dir()
        if comparison.any_given or same_repository:
            return None
        known = self._used is not None and self._used.unchanged()
        return stripped_source(served, self._settings, self._source if known else None)

    def _adopt(self, source: Tower | Bundle, served: engine_config.ServedModel) -> None:
        """Encode with other weights from now on, here and in the engine's process, which drops its caches."""
        used = StoredWeights(source, self._prefixes)
        self._encoder.close()
        self._source = source
        self._start("in-line, with the weights that were loaded now")
        self._used, self._refusal = used, None
        order = Replacement(served.source, served.revision, source_digest(source))
        if self._report(Fault(REPLACED, order.dumps())):
            return
        if type(worker.worker_connector()).__name__ == engine_config.CONNECTOR:
            raise ConfigurationError(
                "the engine's process cannot be notified that the vision encoder has new weights.",
                hint="Restart the server with the new weights.",
            )
        compat.logger().warning(
            "visionaccel: the vision encoder has new weights. Call reset_encoder_cache and reset_prefix_cache: this "
            "engine's scheduler does not do so itself."
        )

    def _refuse(self, error: VisionAccelError, served: engine_config.ServedModel) -> None:
        """Encode nothing more, because no encoder has the weights that are served."""
        self._encoder.close()
        self._used, self._refusal = None, error
        order, connector = Replacement(served.source, served.revision, "", error.message), worker.worker_connector()
        if not self._report(Fault(REPLACED, order.dumps())) and type(connector).__name__ == engine_config.CONNECTOR:
            connector.refusal = error  # the engine's process still encodes with the previous weights

    def _encode(self, x: torch.Tensor, grid_thw: Sequence[Any]) -> Sequence[Embedded | VisionAccelError]:
        if self._refusal is not None:
            return [self._refusal] * len(grid_thw)
        try:
            with self.budget.encode() as until:
                return self._encoder.result(until).encode_items(x, grid_thw, until=until)
        except VisionAccelError as error:  # a step must survive an encoder that cannot be opened
            return [error] * len(grid_thw)

    def _contain(self, x: torch.Tensor, grid_thw: Sequence[Any], item: int, error: VisionAccelError) -> torch.Tensor:
        try:
            grids = as_grids(grid_thw, self.spatial_merge_size)
        except InputError:
            raise error from None
        grid, patches = grids[item], split_rows(x, [each.patches for each in grids])[item]
        connector = worker.worker_connector()
        if connector is not None and connector.is_producer:
            guard_saving(connector, self._source.tower.spec.out)
        if not self._report(Fault(item_key(patches, grid), error.message)):
            raise error
        compat.logger().error("An image of grid %s could not be encoded: %s", grid, error)
        return torch.zeros(grid.tokens(self.spatial_merge_size), self.out_hidden_size)

    def _open(self, how: str) -> GuardedEncoder:
        if len(self._settings.devices) > 1:
            compat.logger().warning("In-line, only device %s is used.", self._settings.devices[0])
        # vLLM builds models under a default device, which must not apply to the backend.
        with torch.device("cpu"):
            host = worker.encoder_host(str(self.device), in_step=True)
            metrics = publish() if self._settings.metrics else None  # before the canary, which counts too
            if metrics is not None:
                metrics.counts_work = worker.first_of_its_group()
            devices = self._settings.wanted_devices[:1]
            (encoder,) = open_guarded(self._source, self._settings, devices, host)
        announce([encoder], how, self._distrust)
        if metrics is not None:
            metrics.watch_encoder(encoder)
        return encoder

    def _distrust(self) -> None:
        if not self._report(Fault(ALL_ITEMS, "the vision encoder returned wrong results.")):
            compat.logger().error("vLLM may cache wrong embeddings, which cannot be dropped: restart the server.")

    def _report(self, fault: Fault) -> bool:
        return report_fault(fault, self._engine)


def guard_saving(connector: Any, width: int) -> None:
    """Have a worker's EC connector publish no embedding that is all zeros or has non-finite values; once.

    A deepstack level that is all zeros counts, too; `width` is that of an embedding and of each level next to it.

    The tower returns zeros for an item that it could not encode; a real encoder never does. vLLM's runners pass each
    new embedding to `save_caches` before the scheduler has read the fault. `start_save_caches` publishes what earlier
    steps cached, so refused embeddings are hidden from it.

    This covers `ECExampleConnector` and `ECMooncakeConnector`. It does not cover:

    - the scheduler of `ECCPUConnector`, which keeps the blocks reserved for the refused embedding, and offers that
      image to no other instance until the engine is restarted;
    - a connector that copies embeddings in another method, such as `get_finished`;
    - an embedding with other wrong values, which only the encoder's own checks find.
    """
    if getattr(connector.save_caches, "guarded", False):
        return
    save = connector.save_caches
    start = getattr(connector, "start_save_caches", lambda **_: None)  # not before vLLM 0.30
    refused: dict[str, weakref.ref[torch.Tensor]] = {}

    @functools.wraps(save)
    def save_caches(encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        embedding = encoder_cache[mm_hash]
        if _sound(embedding, width):
            save(encoder_cache=encoder_cache, mm_hash=mm_hash, **kwargs)
        else:
            refused[mm_hash] = weakref.ref(embedding)
            compat.logger().error("The embedding of %s is faulty, so it is not sent to other instances.", mm_hash)

    @functools.wraps(start)
    def start_save_caches(**kwargs: Any) -> None:
        cache = kwargs.get("encoder_cache") or {}
        for name, embedding in list(refused.items()):
            if name not in cache or cache[name] is not embedding():
                del refused[name]  # freed, or encoded again
        if refused:
            kwargs["encoder_cache"] = {name: rows for name, rows in cache.items() if name not in refused}
        start(**kwargs)

    save_caches.guarded = True  # type: ignore[attr-defined]
    connector.save_caches, connector.start_save_caches = save_caches, start_save_caches


def _sound(embedding: torch.Tensor, width: int) -> bool:
    """Return whether an embedding [N, width * blocks] is finite, and none of its blocks of columns is all zeros."""
    if not embedding.numel():
        return False
    if embedding.shape[1] % width:  # not of this tower
        width = embedding.shape[1]
    blocks = embedding.detach().reshape(len(embedding), -1, width)
    low, high = blocks.amin((0, 2)), blocks.amax((0, 2))  # NaN spreads to both
    return bool((low.isfinite() & high.isfinite() & ((low != 0) | (high != 0))).all())
