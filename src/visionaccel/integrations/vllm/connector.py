"""The pipelined mode: an EC connector that owns the encode service, so that vLLM decodes while images are encoded.

Where pipelined mode is available, visionaccel configures the connector itself. The option that does the same is
`--ec-transfer-config '{"ec_connector": "VisionAccelConnector", "ec_role": "ec_consumer", "ec_connector_module_path":
"visionaccel.integrations.vllm.connector"}'`.

vLLM makes one connector in the engine's process, for the scheduler, and one in each worker. The scheduler asks its
connector whether a request's embeddings are ready; until then the request stays in the queue and holds no KV cache.
The embeddings then travel with the step's metadata to the workers, which put them into their encoder caches. No method
waits for the encoder.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from visionaccel.bundle import Bundle
from visionaccel.core.arrays import as_numpy
from visionaccel.core.containment import device_errors
from visionaccel.core.grid import as_grids
from visionaccel.encoder import source_digest
from visionaccel.errors import ConfigurationError, VisionAccelError
from visionaccel.families import Tower
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import engine_config, scheduling, worker
from visionaccel.integrations.vllm.compat.scheduling import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from visionaccel.integrations.vllm.encoder_source import Replacement, announce, open_served_source
from visionaccel.integrations.vllm.pipelined.pending_images import PendingImages, WantedItem
from visionaccel.integrations.vllm.published_metrics import publish
from visionaccel.service import EncodeService, open_wanted_service
from visionaccel.settings import load_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_CLOSING_SECONDS = 5.0


@dataclass
class EmbeddingsForStep(ECConnectorMetadata):  # type: ignore[misc]
    """The embeddings that workers put into their encoder caches before a step: [tokens, width] by identifier.

    They are numpy arrays, whose bytes are sent next to the pickled step rather than inside it. bfloat16 is sent as
    uint16, because arrays of ml_dtypes' types are pickled with their bytes.
    """

    rows: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Item:
    """An image, video or sound of a request."""

    identifier: str  # vLLM's key for its encoder output
    end: int  # where its tokens end in the prompt
    wanted: WantedItem | None  # what to encode; None if the scheduler's process does not have the pixels
    encoded: bool  # whether the vision encoder encodes it: it is not audio, and its embeddings were not sent


class VisionAccelConnector(ECConnectorBase):  # type: ignore[misc]
    """Gives requests their embeddings from an encode service in the engine's process."""

    refusal: VisionAccelError | None = None  # in a worker: why embeddings must not be used any more

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        served = engine_config.served_model(vllm_config)
        self._device, self._dtype = served.device, served.dtype
        self._service: EncodeService | None = None  # none in workers, and if prompts may contain no images and videos
        self._pending_images = PendingImages(None, 0)
        self._items: dict[str, tuple[Request, tuple[_Item, ...]]] = {}  # by request
        self._loads: dict[str, NDArray[Any]] = {}
        self._cached: set[str] = set()
        # Returns the requests that hold an encoder output in the scheduler's cache; None if it is not there. This
        # package's schedulers replace it, because the list kept here is one step behind.
        self.holders: Callable[[str], Collection[str] | None] = self._guessed_holders
        self._inline = 0
        self.scheduler_forgets = False  # whether the scheduler calls `take_distrust`, and drops wrong embeddings
        self._distrust = threading.Event()
        if role == ECConnectorRole.SCHEDULER and served.takes_media:
            settings = load_settings()
            if served.replaces is None:
                # The pixels may be raw: vLLM's own model classes can normalise them on the device.
                raise ConfigurationError(
                    f"{engine_config.CONNECTOR} is configured, but visionaccel's plug-in is not active in this engine.",
                    hint="Set VISIONACCEL_BACKEND, and list visionaccel in VLLM_PLUGINS if that is set.",
                )
            self._served, self._settings = served, settings
            self._metrics = publish() if settings.metrics else None  # before the canary, which counts too
            self._open(open_served_source(served, settings))

    def _open(self, source: Tower | Bundle) -> None:
        served, settings = self._served, self._settings
        dtype, host = str(served.dtype).removeprefix("torch."), worker.encoder_host(served.device, in_step=False)
        self._service = open_wanted_service(source, settings, dtype, host)
        announce(self._service.encoders, "pipelined", self._distrust.set)
        self._pending_images = PendingImages(self._service, settings.cache_size)
        if self._metrics is not None:
            self._metrics.watch_service(self._service)
        self._digest = source_digest(source)

    def replace_encoder(self, order: Replacement) -> None:
        """Encode with the weights that the workers were given; if that fails, fail every request with an image.

        Called between two steps, once for each worker. It waits until the encoder is open, because no step may encode
        with the previous weights.
        """
        if self._service is None or (order.refusal is None and order.digest == self._digest):
            return
        self._digest = ""
        try:
            with device_errors("opening the encoder from the new weights"):
                self._service.close(wait=_CLOSING_SECONDS)  # a device may have room for one encoder only
                if order.refusal is not None:
                    raise ConfigurationError(order.refusal, hint="Load weights of the vision encoder from files.")
                served = replace(self._served, source=order.source, revision=order.revision)
                source = open_served_source(served, self._settings)
                if source_digest(source) != order.digest:
                    raise ConfigurationError(
                        f"the weights in {order.source} changed while they were loaded.", hint="Load them again."
                    )
                self._open(source)
        except VisionAccelError as error:
            compat.logger().error("Requests with images end with an error from now on: %s", error)
            self._pending_images = PendingImages(self._service, self._settings.cache_size, error)
        self._loads.clear()
        self._cached.clear()

    # In the engine's process:

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Return whether a request may be scheduled; submits the images whose embeddings are missing."""
        name = request.request_id
        needed = [item for item in self._items_of(request) if item.end > num_computed_tokens]
        if all(self.holders(item.identifier) is not None for item in needed):
            return True
        # Making room for missing embeddings may evict cached ones that no request holds.
        wanted = [item.wanted for item in needed if item.wanted is not None and not self.holders(item.identifier)]
        running = request.num_computed_tokens > 0
        return self._pending_images.ready(name, wanted, request.arrival_time, urgent=running)

    def has_cache_item(self, identifier: str) -> bool:
        """Return whether this connector has an embedding. If not, the workers encode in the step."""
        return self._pending_images.get(identifier) is not None

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Send an embedding with the next step, as it now has a place in the workers' caches."""
        identifier = request.mm_features[index].identifier
        self._cached.add(identifier)
        rows = self._pending_images.get(identifier)
        if rows is None:
            item = self._items_of(request)[index]
            self._inline += item.encoded
            if self._inline == 1 and item.encoded:
                why = "its pixels do not pass the scheduler" if item.wanted is None else "it was evicted just now"
                compat.logger().warning("An image is encoded in the engine's step, because %s: %s.", why, identifier)
        else:
            self._loads[identifier] = rows.view(np.uint16) if rows.dtype == ml_dtypes.bfloat16 else rows

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> EmbeddingsForStep:
        """Return the embeddings that a step's workers are sent."""
        self._cached.difference_update(scheduler_output.free_encoder_mm_hashes)
        for name in self._pending_images.requests():
            tokens = scheduler_output.num_scheduled_tokens.get(name)
            if tokens is not None:
                self._pending_images.settle(name, self._used(name, tokens))
        loads, self._loads = self._loads, {}
        return EmbeddingsForStep(loads)

    def take_distrust(self) -> bool:
        """Return whether a device was distrusted since the last call; if so, pending embeddings are encoded again."""
        if not self._distrust.is_set():
            return False
        self._distrust.clear()
        self._pending_images.forget_done()
        return True

    def take_failures(self) -> dict[str, str]:
        """Log and return the requests whose image failed since the last call, each with the reason for its client."""
        reasons = {}
        for name, (label, error) in self._pending_images.failures().items():
            compat.logger().error("Request %s ends with an error: %s: %s", name, label, error)
            reasons[name] = f"{label} of the prompt could not be encoded: {error.message}"
        return reasons

    def take_unavailable_requests(self) -> set[str]:
        """Called by vLLM's own scheduler, whose caches cannot be emptied from here, instead of `take_failures`."""
        if not self.scheduler_forgets and self.take_distrust():
            compat.logger().error(
                "The vision encoder returned wrong results. vLLM may still cache wrong embeddings, which cannot be "
                "dropped with this scheduler: restart the server."
            )
        return set(self.take_failures())

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Release the images of a request that has ended or was aborted."""
        self._items.pop(request.request_id, None)
        self._pending_images.release(request.request_id)
        return False, None

    def shutdown(self) -> None:
        """Log what the service did, and close it."""
        if self._service is not None:
            done, cache = self._service.counters, self._service.cache
            compat.logger().info(
                f"visionaccel: {done.encoded} images and videos were encoded ({done.fallback} by the fallback), "
                f"{done.cached} came from the cache and {done.merged} from an identical one in flight, "
                f"{done.failed} failed, {done.cancelled} were cancelled, {self._inline} were encoded in-line; "
                f"{cache.evicted} embeddings were evicted from the cache."
            )
            self._service.close(wait=_CLOSING_SECONDS)

    def _items_of(self, request: Request) -> tuple[_Item, ...]:
        _, items = self._items.get(request.request_id, (request, ()))
        features = request.mm_features or ()
        if len(items) != len(features):  # new, or a streaming session that received more
            items = tuple(map(self._item, features, _labels(features)))
            self._items[request.request_id] = request, items
        return items

    def _used(self, name: str, tokens: int) -> list[str]:
        """Return a request's images that are in the encoder cache, or are read once scheduled tokens are computed."""
        request, items = self._items[name]
        computed = request.num_computed_tokens + tokens
        return [
            item.identifier for item in items if item.end <= computed or name in (self.holders(item.identifier) or ())
        ]

    def _item(self, feature: Any, label: str) -> _Item:
        item, place = scheduling.scheduled_item(feature), feature.mm_position
        sent = any(name.endswith("embeds") or name == "embedding" for name in feature.data or ())
        encoded = feature.modality in ("image", "video") and not sent
        wanted = None
        if item.pixels is not None and isinstance(item.pixels, torch.Tensor):
            wanted = WantedItem(item.identifier, label, item.pixels, as_grids(item.grid)[0])
        return _Item(item.identifier, place.offset + place.length, wanted, encoded)

    def _guessed_holders(self, identifier: str) -> Collection[str] | None:
        return () if identifier in self._cached else None

    # In a worker:

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Copy the step's embeddings into the worker's encoder cache.

        Raises:
            VisionAccelError: If they come from weights that are no longer served. This ends the engine, because every
                answer would be wrong. The engine also ends when a request needs an embedding that was cached before.
        """
        rows_of = self._get_connector_metadata().rows
        if self.refusal is not None:
            encoder_cache.clear()
            if rows_of:
                raise self.refusal
        for identifier, rows in rows_of.items():
            if identifier not in encoder_cache:
                # A copy, because the array belongs to the message or, in one process, to the service.
                tensor = torch.empty(rows.shape, dtype=self._dtype, device="cpu")
                np.copyto(as_numpy(tensor).view(rows.dtype), rows)
                encoder_cache[identifier] = tensor.to(self._device)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Do nothing: no embeddings are sent to other engines."""


def _labels(features: Iterable[Any]) -> Iterator[str]:
    """Yield what errors call a prompt's items: `image 1`, `image 2`, `video 1`."""
    seen = Counter[str]()
    for feature in features:
        seen[feature.modality] += 1
        yield f"{feature.modality} {seen[feature.modality]}"
