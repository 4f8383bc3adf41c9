"""The images that requests in vLLM's scheduler wait for, and their embeddings until they are used.

Every method is called from the engine's step, so none of them waits.
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
    """An image or video of a request."""

    identifier: str  # vLLM's key for its content
    label: str  # what errors call it, such as `image 2`
    patches: Array  # [P, patch_width]
    grid: Grid


@dataclass(eq=False)
class _PendingImage:
    """One item that some requests need, and its embedding once it is encoded."""

    future: Future[Embedding]
    grid: Grid
    size: int
    requests: set[str] = field(default_factory=set)
    suspect: bool = False  # whether it was being encoded when a device was distrusted

    @property
    def rows(self) -> Embedding | None:
        """The embedding; None if it is not encoded yet, or failed."""
        return self.future.result() if self.future.done() and self.future.exception() is None else None


class PendingImages:
    """Submits items for requests, holds their embeddings until they are used, and records which requests failed.

    An embedding stays here even if the service's cache evicts it; otherwise two requests with several images each could
    evict one another's again and again. At most `size` bytes of embeddings are held or being encoded. Beyond that, only
    the request that has waited longest, and requests that hold KV cache, may submit more items.

    With a `refusal`, every item fails for that reason. Without a service, nothing may be submitted.
    """

    def __init__(self, service: EncodeService | None, size: int, refusal: VisionAccelError | None = None) -> None:
        self._service, self._size, self._refusal = service, size, refusal
        self._pending: dict[str, _PendingImage] = {}
        self._waiting: dict[str, None] = {}  # requests that lack embeddings, in the order in which they began to wait
        self._failures: dict[str, tuple[str, VisionAccelError]] = {}
        self.held = 0  # bytes that are held or being encoded

    def ready(self, request: str, items: Sequence[WantedItem], arrival: float, *, urgent: bool) -> bool:
        """Return whether a request has the embeddings of all these items; submits the missing ones.

        A request whose item failed is never ready; see `failures`. Requests that arrived earlier are served first. An
        `urgent` request, which holds memory that others may wait for, goes before them and may exceed the bound.
        """
        self._waiting.setdefault(request)
        ready = True
        for item in items:
            pending = self._pending.get(item.identifier)
            if pending is not None and pending.suspect and pending.rows is not None:
                self._forget(item.identifier, pending)  # the service still has it, unless it was wrong
                pending = None
            pending = pending or self._submit(request, item, arrival, urgent)
            if pending is None:
                ready = False
                continue
            pending.requests.add(request)
            error = _error(pending, item)
            if error is not None:
                self._failures.setdefault(request, (item.label, error))
            ready = ready and error is None and not pending.suspect and pending.future.done()
        if ready:
            del self._waiting[request]
        return ready

    def get(self, identifier: str) -> Embedding | None:
        """Return an item's embedding, or None if it is not ready."""
        pending = self._pending.get(identifier)
        return None if pending is None or pending.suspect else pending.rows

    def requests(self) -> list[str]:
        """Return the requests that wait for items or hold them."""
        return list({request for pending in self._pending.values() for request in pending.requests})

    def settle(self, request: str, identifiers: Iterable[str]) -> None:
        """Release items that a request no longer needs, because vLLM caches them or it has read them."""
        for identifier in identifiers:
            self._drop(request, identifier)

    def failures(self) -> dict[str, tuple[str, VisionAccelError]]:
        """Return the requests whose item failed since the last call, each with the item's label and why."""
        failures, self._failures = self._failures, {}
        return failures

    def forget_done(self) -> None:
        """Drop all embeddings, and those being encoded once they are done; requests submit their items again."""
        for identifier, pending in list(self._pending.items()):
            pending.suspect = True
            if pending.future.done():
                self._forget(identifier, pending)

    def release(self, request: str) -> None:
        """Drop what only this request needs, because it has ended or was aborted."""
        self._failures.pop(request, None)
        self._waiting.pop(request, None)
        for identifier in list(self._pending):
            self._drop(request, identifier)

    def _submit(self, request: str, item: WantedItem, arrival: float, urgent: bool) -> _PendingImage | None:
        """Submit an item; None if the bound or the service's queue does not allow it now."""
        if self.held > self._size and not urgent and next(iter(self._waiting)) != request:
            return None
        assert self._service is not None
        size = 0
        try:
            if self._refusal is not None:
                raise self._refusal.with_traceback(None)  # or it would keep the images of all requests
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
        del self._pending[identifier]
        self.held -= pending.size

    def _drop(self, request: str, identifier: str) -> None:
        pending = self._pending.get(identifier)
        if pending is not None and request in pending.requests:
            pending.requests.discard(request)
            if not pending.requests:
                pending.future.cancel()
                self._forget(identifier, pending)


def _error(pending: _PendingImage, item: WantedItem) -> VisionAccelError | None:
    """Return why an item cannot use a pending image; None if it can, or if that is unknown yet."""
    if pending.grid != item.grid:  # the embedding would have another number of rows than the prompt has placeholders
        return GridError(
            f"its identifier {item.identifier!r} belongs to an image of grid {pending.grid}, but its own grid is "
            f"{item.grid}.",
            hint="Use a different uuid for each image in requests.",
        )
    error = pending.future.exception() if pending.future.done() else None
    return error if error is None or isinstance(error, VisionAccelError) else DeviceError(f"{error!r}")
