"""The images that requests in vLLM's scheduler wait for, and their embeddings until they are used.

Requests and images are known by their identifiers. Every method is called from the engine's step, so none waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.errors import DeviceError, GridError, QueueFullError, VisionAccelError
from visionaccel.service import Embedding, EncodeService


@dataclass(frozen=True, slots=True)
class WantedItem:
    """An image or video of a request: vLLM's key of its content, and what errors call it, such as `image 2`."""

    identifier: str
    label: str
    patches: Array  # [P, patch_width]
    grid: Grid


@dataclass(eq=False)
class _PendingImage:
    """One item that some requests want, and the embedding once it is there."""

    future: Future[Embedding]
    grid: Grid
    size: int
    requests: set[str] = field(default_factory=set)
    suspect: bool = False  # it was being encoded when embeddings were forgotten

    @property
    def rows(self) -> Embedding | None:
        """The embedding; None if it is not there, or encoding failed."""
        return self.future.result() if self.future.done() and self.future.exception() is None else None


class PendingImages:
    """Submits items for requests, holds their embeddings until they are used, and knows whose item failed.

    A requested embedding is held here even if the service's cache evicts it; otherwise two requests with several images
    each could keep evicting one another's. What is held or being encoded is bounded by `size`, in bytes of embeddings:
    beyond it, only the request that has waited longest submits more, and requests that already hold KV blocks.

    With a `refusal`, nothing can encode, and every item fails for that reason.
    """

    def __init__(self, service: EncodeService, size: int, refusal: VisionAccelError | None = None) -> None:
        self._service, self._size, self._refusal = service, size, refusal
        self._pending: dict[str, _PendingImage] = {}
        self._requests: dict[str, set[str]] = {}
        self._waiting: dict[str, None] = {}  # requests that miss something, the one that has waited longest first
        self._failures: dict[str, tuple[str, VisionAccelError]] = {}
        self.held = 0  # bytes, those being encoded included

    def ready(self, request: str, items: Sequence[WantedItem], arrival: float, *, urgent: bool) -> bool:
        """Whether the embeddings of all these items are here for a request; those that are not are submitted.

        A request whose item failed is never ready; see `failures`. Requests that arrived earlier are served first. An
        `urgent` one, for whose memory others may wait, goes before them and may exceed the bound.
        """
        self._waiting.setdefault(request)
        ready = True
        for item in items:
            pending = self._pending.get(item.identifier)
            if pending is not None and pending.suspect and pending.rows is not None:
                self._forget(item.identifier, pending)  # the service has it, unless it was wrong
                pending = None
            pending = pending or self._submit(request, item, arrival, urgent)
            if pending is None:
                ready = False
                continue
            pending.requests.add(request)
            self._requests.setdefault(request, set()).add(item.identifier)
            error = _error(pending, item)
            if error is not None:
                self._failures.setdefault(request, (item.label, error))
            ready = ready and error is None and not pending.suspect and pending.future.done()
        if ready:
            del self._waiting[request]
        return ready

    def get(self, identifier: str) -> Embedding | None:
        """An item's embedding, if it is here."""
        pending = self._pending.get(identifier)
        return None if pending is None or pending.suspect else pending.rows

    def requests(self) -> list[str]:
        """Requests that wait for something or hold it."""
        return list(self._requests)

    def settle(self, request: str, identifiers: Iterable[str]) -> None:
        """A request no longer needs these: it has them in vLLM's cache, or has read them."""
        wanted = self._requests.get(request)
        if wanted is None:
            return
        for identifier in wanted.intersection(identifiers):
            wanted.discard(identifier)
            self._drop(request, identifier)
        if not wanted:
            del self._requests[request]

    def failures(self) -> dict[str, tuple[str, VisionAccelError]]:
        """Requests whose item failed since the last call, each with the item's label and why."""
        failures, self._failures = self._failures, {}
        return failures

    def forget_done(self) -> None:
        """Drop the embeddings that are here or being encoded: they may be wrong. Requests submit them again."""
        for identifier, pending in list(self._pending.items()):
            pending.suspect = True
            if pending.future.done():
                self._forget(identifier, pending)

    def release(self, request: str) -> None:
        """A request has ended or was aborted: drop what no other request wants."""
        self._failures.pop(request, None)
        self._waiting.pop(request, None)
        for identifier in self._requests.pop(request, ()):
            self._drop(request, identifier)

    def _submit(self, request: str, item: WantedItem, arrival: float, urgent: bool) -> _PendingImage | None:
        if self.held > self._size and not urgent and next(iter(self._waiting)) != request:
            return None
        size = 0
        try:
            if self._refusal is not None:
                raise self._refusal
            future = self._service.submit(
                item.patches, item.grid, key=item.identifier, arrival=arrival, urgent=urgent, timeout=0
            )
            size = self._service.bytes_of(item.grid)
        except QueueFullError:
            return None
        except VisionAccelError as error:
            future = Future()
            future.set_exception(error)
        pending = self._pending[item.identifier] = _PendingImage(future, item.grid, size)
        self.held += size
        return pending

    def _forget(self, identifier: str, pending: _PendingImage) -> None:
        for request in pending.requests:
            self._requests[request].discard(identifier)
        del self._pending[identifier]
        self.held -= pending.size

    def _drop(self, request: str, identifier: str) -> None:
        pending = self._pending[identifier]
        pending.requests.discard(request)
        if not pending.requests:
            pending.future.cancel()
            del self._pending[identifier]
            self.held -= pending.size


def _error(pending: _PendingImage, item: WantedItem) -> VisionAccelError | None:
    """Why a pending image is of no use for an item, if that is known."""
    if pending.grid != item.grid:  # its rows would not be as many as vLLM has places for
        return GridError(
            f"its identifier {item.identifier!r} also names one of grid {pending.grid}, and it has grid {item.grid}.",
            hint="A client gave one uuid to different images.",
        )
    error = pending.future.exception() if pending.future.done() else None
    return error if error is None or isinstance(error, VisionAccelError) else DeviceError(f"{error!r}")
