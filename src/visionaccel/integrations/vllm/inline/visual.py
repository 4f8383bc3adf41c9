"""The module in the place of vLLM's vision tower, the time it has, and what keeps its zeros from other instances."""

from __future__ import annotations

import functools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionaccel.bundle import Bundle
from visionaccel.core.arrays import as_host_tensor, dtype_name, is_tensor, split_rows
from visionaccel.core.containment import device_errors
from visionaccel.core.grid import as_grids
from visionaccel.errors import ConfigurationError, DeadlineError, InputError, VisionAccelError
from visionaccel.families import Tower, weight_prefixes
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import engine_config, worker
from visionaccel.integrations.vllm.encoder_source import announce, open_served_source, stated_source
from visionaccel.integrations.vllm.inline.fault_channel import ALL_ITEMS, REPLACED, Fault, report_fault
from visionaccel.integrations.vllm.published_metrics import publish
from visionaccel.integrations.vllm.reloading import Comparison, Replacement, StoredWeights, source_digest
from visionaccel.integrations.vllm.shared_memory import shared_memory
from visionaccel.service import item_key, open_guarded
from visionaccel.settings import Settings, load_settings
from visionaccel.trust import Embedded, GuardedEncoder, LateError, WatchedCalls

_SHARE = 0.8
"""Of the time that vLLM gives a step before it ends the engine; the language model gets the rest."""

_PAUSE = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class StepBudget:
    """Gives every encode of a step the same end, `seconds` after the first, however many images and calls it has.

    A step ends where the model embeds the prompt's tokens (`end_step`). A server that only encodes embeds none: there
    the EC connector's metadata, new for each step, tell steps apart. The encodes of a step follow each other at once,
    so an encode after a pause, such as the one after vLLM's dummy run, belongs to another step.
    """

    def __init__(self) -> None:
        self.timeout = worker.step_timeout()
        self.seconds = _SHARE * self.timeout
        self._until: float | None = None
        self._ended = 0.0
        self._metadata: object = None

    @contextmanager
    def encode(self) -> Iterator[float]:
        """An encode of a step; yields the step's end on the monotonic clock."""
        now, metadata = time.monotonic(), worker.step_metadata()
        if self._until is None or metadata is not self._metadata or now - self._ended > _PAUSE:
            self._until, self._metadata = now + self.seconds, metadata
        try:
            yield self._until
        finally:
            self._ended = time.monotonic()

    def end_step(self) -> None:
        """The next encode belongs to another step."""
        self._until = self._metadata = None

    def warning(self, settings: Settings) -> str | None:
        encoders = 1 + len(settings.fallback)
        if settings.deadline * encoders <= self.seconds:
            return None
        return (
            f"In-line, the encodes of a step may take {self.seconds:g} s "
            f"(of VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS={self.timeout:g}), but one encoder of the chain that hangs takes "
            f"VISIONACCEL_DEADLINE={settings.deadline:g} s: images fail before all {encoders} were tried. "
            f"Set VISIONACCEL_DEADLINE to at most {self.seconds / encoders:g}, or raise the other."
        )


class LateOpening:
    """Opens an encoder in the time that a step has; if that is too short, the next steps wait on.

    After a failure it tries again after a pause, which doubles each time up to a minute, as memory may be free then.
    """

    def __init__(self, make: Callable[[], GuardedEncoder]) -> None:
        self._make, self._calls = make, WatchedCalls()
        self._lock, self._closed = threading.Lock(), False
        self._made: GuardedEncoder | None = None
        self._error: VisionAccelError | None = None
        self._pause, self._again = _FIRST_PAUSE, 0.0

    def result(self, until: float) -> GuardedEncoder:
        """The encoder; after `until`, on the monotonic clock, the opening goes on and this raises why there is none."""
        if self._made is not None:
            return self._made
        if self._error is not None and time.monotonic() < self._again:
            raise self._error
        try:
            return self._calls.call(self._open, until - time.monotonic())
        except LateError:
            if self._made is not None:
                return self._made
            raise DeadlineError("the encoder is still being opened.", hint="Try again later.") from None

    def close(self) -> None:
        """Close the encoder, also one that is still being opened once it is open."""
        with self._lock:
            self._closed, made = True, self._made
        self._calls.close()
        if made is not None:
            made.close()

    def _open(self) -> GuardedEncoder:
        try:
            with device_errors("opening the encoder"):
                made = self._make()
        except VisionAccelError as error:
            self._error, self._again = error, time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            raise
        with self._lock:
            self._made, closed = made, self._closed
        if closed:
            made.close()
        return made


class AcceleratedTower(nn.Module):
    """Encodes in the engine's step. Has no parameters; nothing of a checkpoint is loaded into it.

    What vLLM reads of a tower has vLLM's names: `spatial_merge_size`, `out_hidden_size`, and `dtype` and `device`
    of the embeddings, which are the language model's.

    If it `receives` embeddings through an EC connector, the encoder is opened when a step first needs it, for what the
    connector did not have, and vLLM's profiling run gets zeros.
    """

    def __init__(self, served: engine_config.ServedModel, *, receives: bool = False) -> None:
        super().__init__()
        self._settings, self._receives = load_settings(), receives
        self._engine, self._place = served.engine, (served.source, served.revision)
        self._prefixes = weight_prefixes([served.replaces or ""])
        shared_memory()  # which faults are reported through: an error now does not end a running engine
        self._source = open_served_source(served, self._settings)
        self._used: StoredWeights | None = StoredWeights(self._source, self._prefixes)
        tower = self._source.tower
        self.spatial_merge_size = tower.merge_size
        self.out_hidden_size = tower.out_width
        self.dtype = served.dtype
        self.device = torch.device(served.device)
        self.budget = StepBudget()
        if warning := self.budget.warning(self._settings):
            compat.logger().warning("%s", warning)
        self._refusal: VisionAccelError | None = None
        self._encoder: GuardedEncoder | None = None
        self._start("in-line")

    def _start(self, how: str) -> None:
        self._opener = LateOpening(functools.partial(self._open, "in-line, for what comes through no EC connector"))
        self._encoder = None if self._receives else self._open(how)

    def forward(self, x: torch.Tensor, grid_thw: Any, **_: Any) -> torch.Tensor:
        """Embeddings [N, out_hidden_size] of the items of one step, in the model's dtype and on its device.

        An item that could not be encoded is zeros, and the scheduler ends its requests before their first token. If no
        scheduler of this package listens, as at start-up, this raises why it could not be encoded.

        Args:
            x: [P, patch_width] in the model's dtype, the processor's pixel values.
            grid_thw: (t, h, w) of each item.
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
        """A comparison of weights that vLLM is given after the start with those in use."""
        return Comparison(self._used, self._prefixes, lambda: open_served_source(served(), self._settings))

    def settle(self, comparison: Comparison, served: engine_config.ServedModel) -> None:
        """End an update of weights: go on, open the encoder again from vLLM's files, or encode no more and raise."""
        try:
            with device_errors("opening the encoder from the new weights"):
                source = self._stated(comparison, served) if comparison.nothing_new else comparison.replacement()
                if source is not None:
                    self._adopt(source, served)
                self._place = served.source, served.revision
        except VisionAccelError as error:
            self._refuse(error, served)
            raise

    def _stated(self, comparison: Comparison, served: engine_config.ServedModel) -> Tower | Bundle | None:
        """The encoder that a stripped checkpoint belongs to; None to go on with this one."""
        same_repository = (served.source, served.revision) == self._place and not Path(served.source).is_dir()
        if comparison.any_given or same_repository:
            return None
        known = self._used is not None and self._used.unchanged()
        return stated_source(served, self._settings, self._source if known else None)

    def _adopt(self, source: Tower | Bundle, served: engine_config.ServedModel) -> None:
        """Encode with other weights from now on, here and in the engine's process, which drops its caches."""
        used = StoredWeights(source, self._prefixes)
        self._close()
        self._source = source
        self._start("in-line, with the weights that were loaded now")
        self._used, self._refusal = used, None
        order = Replacement(served.source, served.revision, source_digest(source))
        if self._report(Fault(REPLACED, order.dumps())):
            return
        if type(worker.worker_connector()).__name__ == engine_config.CONNECTOR:
            raise ConfigurationError(
                "the engine's process cannot learn that the vision encoder has new weights.",
                hint="Restart the server with the new weights.",
            )
        compat.logger().warning(
            "visionaccel: the vision encoder has new weights. Call reset_encoder_cache and reset_prefix_cache: this "
            "engine's scheduler does not do it by itself."
        )

    def _refuse(self, error: VisionAccelError, served: engine_config.ServedModel) -> None:
        """Encode nothing more, as no encoder has the weights that are served."""
        self._close()
        self._used, self._refusal = None, error
        reported = self._report(Fault(REPLACED, Replacement(served.source, served.revision, "", error.message).dumps()))
        connector = worker.worker_connector()
        if not reported and type(connector).__name__ == engine_config.CONNECTOR:
            connector.refuse_loads(error)  # the engine's process still encodes with the previous weights

    def _close(self) -> None:
        self._opener.close()
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def _encode(self, x: torch.Tensor, grid_thw: Sequence[Any]) -> Sequence[Embedded | VisionAccelError]:
        try:
            with self.budget.encode() as until:
                if self._refusal is not None:
                    raise self._refusal
                if self._encoder is None:
                    self._encoder = self._opener.result(until)
                return self._encoder.encode_items(x, grid_thw, until=until)
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
            guard_saving(connector)
        if not self._report(Fault(item_key(patches, grid), error.message)):
            raise error
        compat.logger().error("An image of grid %s could not be encoded: %s", grid, error)
        return torch.zeros(grid.tokens(self.spatial_merge_size), self.out_hidden_size)

    def _open(self, how: str) -> GuardedEncoder:
        if len(self._settings.devices) > 1:
            compat.logger().warning("In-line, only device %s is used.", self._settings.devices[0])
        # vLLM builds models under a default device, which does not concern the backend.
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
            compat.logger().error("vLLM may cache wrong embeddings that cannot be dropped: restart the server.")

    def _report(self, fault: Fault) -> bool:
        return report_fault(fault, self._engine)


def guard_saving(connector: Any) -> None:
    """Have a worker's EC connector publish no embedding that is all zeros or has values that are not finite.

    The tower answers zeros for an item that it could not encode; a real encoder never does. vLLM's runners pass every
    new embedding to `save_caches` before the scheduler knows of a fault. `start_save_caches`, which runs before each
    step, publishes what is cached from earlier steps: it does not see the embeddings that were refused.

    This covers `ECExampleConnector` and `ECMooncakeConnector`. It does not cover:

    - the scheduler of `ECCPUConnector`, which keeps the blocks that it set aside for the refused embedding, and offers
      that image to no other instance until the engine is restarted;
    - a connector that copies embeddings in another method, such as `get_finished`;
    - an embedding with other wrong values, which only the encoder's own checks find.

    Guarding a connector again changes nothing.
    """
    if getattr(connector.save_caches, "guarded", False):
        return
    save = connector.save_caches
    start = getattr(connector, "start_save_caches", lambda **_: None)  # not before vLLM 0.30
    refused: dict[str, weakref.ref[torch.Tensor]] = {}

    @functools.wraps(save)
    def save_caches(encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        embedding = encoder_cache[mm_hash]
        if _sound(embedding):
            save(encoder_cache=encoder_cache, mm_hash=mm_hash, **kwargs)
        else:
            refused[mm_hash] = weakref.ref(embedding)
            compat.logger().error("The embedding of %s is faulty and not given to other instances.", mm_hash)

    @functools.wraps(start)
    def start_save_caches(**kwargs: Any) -> None:
        cache = kwargs.get("encoder_cache")
        withheld = {}
        for name, embedding in list(refused.items()):
            if cache and name in cache and cache[name] is embedding():
                withheld[name] = cache.pop(name)
            else:
                del refused[name]  # freed, or encoded again
        try:
            start(**kwargs)
        finally:
            for name, faulty in withheld.items():
                assert cache is not None
                cache.setdefault(name, faulty)  # requests of this step, which are ended, may still refer to it

    save_caches.guarded = True  # type: ignore[attr-defined]
    connector.save_caches, connector.start_save_caches = save_caches, start_save_caches


def _sound(embedding: torch.Tensor) -> bool:
    """Whether an embedding is finite and not all zeros; NaN spreads to both extremes. One pass, no copy."""
    if not embedding.numel():
        return False
    low, high = (float(extreme) for extreme in torch.aminmax(embedding.detach()))
    return math.isfinite(low) and math.isfinite(high) and (low, high) != (0.0, 0.0)
