"""The pipelined mode: an EC connector that owns the encode service, so that vLLM decodes while images are encoded.

`--ec-transfer-config '{"ec_connector": "VisionAccelConnector", "ec_role": "ec_consumer", "ec_connector_module_path":
"visionaccel.integrations.vllm.connector"}'` names it. Without that option, visionaccel names it where it can be used.

vLLM makes one in the engine's process, next to the scheduler, and one in each worker. The scheduler asks the first
whether a request's images are there and leaves the request in its queue, without memory for keys, until they are. Then
the embeddings travel with the step's metadata to the workers, which put them where vLLM's own encoder would have put
them. Nothing of this waits for the encoder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
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
from visionaccel.errors import ConfigurationError, VisionAccelError
from visionaccel.families import Tower
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import engine_config, scheduling, worker
from visionaccel.integrations.vllm.compat.scheduling import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from visionaccel.integrations.vllm.encoder_source import announce, open_served_source
from visionaccel.integrations.vllm.pipelined.pending_images import PendingImages, WantedItem
from visionaccel.integrations.vllm.published_metrics import publish
from visionaccel.integrations.vllm.reloading import Replacement, source_digest
from visionaccel.service import EncodeService, open_wanted_service
from visionaccel.settings import load_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_CLOSING_SECONDS = 5.0


@dataclass
class EmbeddingsForStep(ECConnectorMetadata):  # type: ignore[misc]
    """What the workers put into their encoder caches before a step: [tokens, width] by identifier.

    numpy, because its bytes are sent next to the pickled step and not inside it; bfloat16 as uint16, since ml_dtypes'
    types do not.
    """

    rows: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Item:
    """An image or video of a request, by vLLM's key of its encoder output."""

    identifier: str
    end: int  # where its tokens end in the prompt
    wanted: WantedItem | None  # what to encode, if that is known here
    given: bool  # its embeddings come with the request


class VisionAccelConnector(ECConnectorBase):  # type: ignore[misc]
    """Gives requests their embeddings from an encode service in the engine's process."""

    _refusal: VisionAccelError | None = None

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        served = engine_config.served_model(vllm_config)
        self._device, self._dtype = served.device, served.dtype
        self._service: EncodeService | None = None  # in workers, and where prompts may hold no media
        self._items: dict[str, tuple[Request, tuple[_Item, ...]]] = {}  # by request
        self._loads: dict[str, NDArray[Any]] = {}
        self._cached: set[str] = set()
        self._holders: Callable[[str], Collection[str] | None] = self._guessed_holders
        self._inline = 0
        self.scheduler_forgets = False  # the scheduler asks `take_distrust`, and drops wrong embeddings
        self._distrust = threading.Event()
        if role == ECConnectorRole.SCHEDULER and served.takes_media:
            settings = load_settings()
            if served.replaces is None:
                # vLLM's own model class may leave the normalisation of pixels to its tower.
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
        self._digest = source_digest(source)
        announce(self._service.encoders, "pipelined", self._distrust.set)
        self._pending_images = PendingImages(self._service, settings.cache_size)
        if self._metrics is not None:
            self._metrics.watch_service(self._service)

    def replace_encoder(self, order: Replacement) -> None:
        """Encode with the weights that the workers were given, or fail each request with an image until there are some.

        Called between two steps, and waits until the encoder is open: no step may encode with the previous weights.
        Each of several workers reports the same.
        """
        if self._service is None or (order.refusal is None and order.digest == self._digest):
            return
        self._digest = ""
        try:
            with device_errors("opening the encoder from the new weights"):
                self._service.close(wait=_CLOSING_SECONDS)  # a device may have room for one encoder only
                self._open(self._source_of(order))
        except VisionAccelError as error:
            compat.logger().error("Requests with images end with an error from now on: %s", error)
            self._digest = ""
            self._pending_images = PendingImages(self._service, self._settings.cache_size, error)
        self._loads.clear()
        self._cached.clear()

    def _source_of(self, order: Replacement) -> Tower | Bundle:
        if order.refusal is not None:
            raise ConfigurationError(order.refusal, hint="Load weights of the vision encoder from files.")
        source = open_served_source(replace(self._served, source=order.source, revision=order.revision), self._settings)
        if source_digest(source) != order.digest:
            raise ConfigurationError(
                f"the weights in {order.source} changed while they were loaded.", hint="Load them again."
            )
        return source

    def attach(self, holders: Callable[[str], Collection[str] | None]) -> None:
        """Ask the scheduler what is in its encoder cache, instead of keeping a list that is one step behind.

        `holders` gives the requests that hold an encoder output there; None if it is not there.
        """
        self._holders = holders

    # In the engine's process:

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request may be scheduled; an embedding that is missing is submitted."""
        if self._service is None:
            return True
        name = request.request_id
        needed = [item for item in self._items_of(request) if item.end > num_computed_tokens]
        if all(self._holders(item.identifier) is not None for item in needed):
            return True
        # Making room for what is not cached may evict what no request holds.
        wanted = [item.wanted for item in needed if item.wanted is not None and not self._holders(item.identifier)]
        running = request.num_computed_tokens > 0
        return self._pending_images.ready(name, wanted, request.arrival_time, urgent=running)

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an embedding is here. Otherwise the workers encode in the step."""
        return self._service is not None and self._pending_images.get(identifier) is not None

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """An encoder output got its place in the workers' caches."""
        if self._service is None:
            return
        identifier = request.mm_features[index].identifier
        self._cached.add(identifier)
        rows = self._pending_images.get(identifier)
        if rows is None:
            self._encodes_inline(self._items_of(request)[index])
        else:
            self._loads[identifier] = rows.view(np.uint16) if rows.dtype == ml_dtypes.bfloat16 else rows

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> EmbeddingsForStep:
        """What a step's workers are sent."""
        if self._service is None:
            return EmbeddingsForStep()
        self._cached.difference_update(scheduler_output.free_encoder_mm_hashes)
        for name in self._pending_images.requests():
            tokens = scheduler_output.num_scheduled_tokens.get(name)
            if tokens is not None:
                self._pending_images.settle(name, self._used(name, tokens))
        loads, self._loads = self._loads, {}
        return EmbeddingsForStep(loads)

    def take_distrust(self) -> bool:
        """Whether a device was distrusted since the last call; embeddings that wait here are then encoded again."""
        if not self._distrust.is_set():
            return False
        self._distrust.clear()
        self._pending_images.forget_done()
        return True

    def take_failures(self) -> dict[str, str]:
        """Requests that cannot be served since the last call, each with the reason for its client; this logs both."""
        if self._service is None:
            return {}
        reasons = {}
        for name, (label, error) in self._pending_images.failures().items():
            compat.logger().error("Request %s ends with an error: %s: %s", name, label, error)
            reasons[name] = f"{label} of the prompt could not be encoded: {error.message}"
        return reasons

    def take_unavailable_requests(self) -> set[str]:
        """As `take_failures`, for vLLM's own scheduler, whose caches cannot be emptied from here."""
        if not self.scheduler_forgets and self.take_distrust():
            compat.logger().error(
                "The vision encoder returned wrong results. vLLM may still cache wrong embeddings, and they cannot be "
                "dropped with this scheduler: restart the server."
            )
        return set(self.take_failures())

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Cancel what only this request, which has ended or was aborted, wanted."""
        if self._service is not None:
            self._items.pop(request.request_id, None)
            self._pending_images.release(request.request_id)
        return False, None

    def shutdown(self) -> None:
        """Close the service, and log what it did."""
        if self._service is not None:
            done, cache = self._service.counters, self._service.cache
            compat.logger().info(
                f"visionaccel: {done.encoded} images and videos were encoded ({done.fallback} by the fallback), "
                f"{done.cached} came from the cache and {done.merged} from an equal one in flight, "
                f"{done.failed} failed, {done.cancelled} were cancelled, {self._inline} were encoded in-line; "
                f"{cache.evicted} embeddings left the cache for others."
            )
            self._service.close(wait=_CLOSING_SECONDS)

    def _items_of(self, request: Request) -> tuple[_Item, ...]:
        _, items = self._items.get(request.request_id, (request, ()))
        features = request.mm_features or ()
        if len(items) != len(features):  # not known yet, or a streaming session that got more
            items = tuple(map(self._item, features, _labels(features)))
            self._items[request.request_id] = request, items
        return items

    def _used(self, name: str, tokens: int) -> list[str]:
        """What a request, of which some tokens are scheduled, has in the encoder cache, or has read."""
        request, items = self._items[name]
        computed = request.num_computed_tokens + tokens
        return [
            item.identifier for item in items if item.end <= computed or name in (self._holders(item.identifier) or ())
        ]

    def _item(self, feature: Any, label: str) -> _Item:
        item, place = scheduling.scheduled_item(feature), feature.mm_position
        given = any(name.endswith("embeds") or name == "embedding" for name in feature.data or ())
        wanted = None
        if item.pixels is not None and isinstance(item.pixels, torch.Tensor):
            wanted = WantedItem(item.identifier, label, item.pixels, as_grids(item.grid)[0])
        return _Item(item.identifier, place.offset + place.length, wanted, given)

    def _guessed_holders(self, identifier: str) -> Collection[str] | None:
        return () if identifier in self._cached else None

    def _encodes_inline(self, item: _Item) -> None:
        if item.given:
            return
        self._inline += 1
        if self._inline == 1:
            why = "its pixels do not pass the scheduler" if item.wanted is None else "it left the cache just now"
            compat.logger().warning("An image is encoded in the engine's step, because %s: %s.", why, item.identifier)

    # In a worker:

    def refuse_loads(self, error: VisionAccelError) -> None:
        """Accept no more embeddings, as they come from weights that are no longer served."""
        self._refusal = error

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Put the step's embeddings into the worker's encoder cache.

        Raises:
            VisionAccelError: If there are some, and they come from weights that are no longer served. This ends the
                engine: no other answer would be correct. It ends too if a request reads what was cached before.
        """
        rows_of = self._get_connector_metadata().rows
        if self._refusal is not None:
            encoder_cache.clear()
            if rows_of:
                raise self._refusal
        for identifier, rows in rows_of.items():
            if identifier not in encoder_cache:
                # Copied: the array belongs to the message, or to the service where the worker is in its process.
                tensor = torch.empty(rows.shape, dtype=self._dtype, device="cpu")
                np.copyto(as_numpy(tensor).view(rows.dtype), rows)
                encoder_cache[identifier] = tensor.to(self._device)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Nothing is given to other engines."""


def _labels(features: Any) -> list[str]:
    """`image 1`, `image 2`, `video 1`: what a prompt's items are called in errors."""
    seen: dict[str, int] = {}
    labels = []
    for feature in features:
        seen[feature.modality] = seen.get(feature.modality, 0) + 1
        labels.append(f"{feature.modality} {seen[feature.modality]}")
    return labels
