"""The images that requests in vLLM's scheduler wait for, and their embeddings until they are used.

No vLLM in here: requests and images are known by their identifiers. Every method is called from the engine's step, so
none waits, and each takes microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.errors import DeviceError, GridError, QueueFullError, VisionAccelError
from visionaccel.service import Embedding


@dataclass(frozen=True, slots=True)
class WantedItem:
    """An image or video of a request: vLLM's key of its content, and what errors call it, such as `image 2`."""

    identifier: str
    label: str
    patches: Array  # [P, patch_width]
    grid: Grid


@dataclass(frozen=True, slots=True)
class Failure:
    """The item of a request that could not be encoded, by its label, and why."""

    label: str
    error: VisionAccelError

    @property
    def message(self) -> str:
        """For the client: what failed, without advice for the operator."""
        return f"{self.label} of the prompt could not be encoded: {self.error.message}"


class Service(Protocol):
    """What is asked to encode."""

    def submit(
        self, patches: Array, grid: Grid, *, key: str, arrival: float, urgent: bool, timeout: float | None
    ) -> Future[Embedding]:
        """As `EncodeService.submit`."""

    def bytes_of(self, grid: Grid) -> int:
        """As `EncodeService.bytes_of`."""


@dataclass(eq=False)
class _PendingImage:
    """One item that some requests want, and the embedding once it is there."""

    future: Future[Embedding]
    grid: Grid
    size: int
    requests: set[str] = field(default_factory=set)


class PendingImages:
    """Submits items for requests, holds their embeddings until they are used, and knows whose item failed.

    A requested embedding is held here even if the service's cache evicts it; otherwise two requests with several images
    each could keep evicting one another's. What is held or being encoded is bounded: beyond the bound, only the request
    that has waited longest submits more, and requests that already hold KV blocks.

    Args:
        service: Encodes.
        size: The bound, in bytes of embeddings; `held` counts them, those being encoded included.
    """

    def __init__(self, service: Service, size: int) -> None:
        self._service, self._size = service, size
        self._pending: dict[str, _PendingImage] = {}
        self._requests: dict[str, set[str]] = {}
        self._waiting: dict[str, None] = {}  # requests that miss something, the one that has waited longest first
        self._failures: dict[str, Failure] = {}
        self.held = 0

    def __len__(self) -> int:
        return len(self._pending)

    def ready(self, request: str, items: Sequence[WantedItem], arrival: float, *, urgent: bool = False) -> bool:
        """Whether the embeddings of all these items are here for a request; those that are not are submitted.

        A request whose item failed is never ready; see `failures`.

        Args:
            request: Its identifier.
            items: What it needs next.
            arrival: When it arrived; earlier ones are served first.
            urgent: Submit even beyond the bound, and have it encoded first, because other requests may wait for the
                memory that this one holds.
        """
        self._waiting.setdefault(request)
        ready = True
        for item in items:
            pending = self._pending.get(item.identifier)
            if pending is None:
                pending = self._submit(request, item, arrival, urgent)
                if pending is None:
                    ready = False
                    continue
            if request not in pending.requests:
                pending.requests.add(request)
                self._requests.setdefault(request, set()).add(item.identifier)
            error = _error(pending, item)
            if error is not None:
                self._failures.setdefault(request, Failure(item.label, error))
            ready = ready and error is None and pending.future.done()
        if ready:
            del self._waiting[request]
        return ready

    def get(self, identifier: str) -> Embedding | None:
        """An item's embedding, if it is here."""
        pending = self._pending.get(identifier)
        if pending is None or not pending.future.done() or pending.future.exception() is not None:
            return None
        return pending.future.result()

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

    def failures(self) -> dict[str, Failure]:
        """Requests whose item failed since the last call, and why."""
        failures, self._failures = self._failures, {}
        return failures

    def forget_done(self) -> None:
        """Drop the embeddings that are here: they may be wrong. A request that needs one submits it again."""
        for identifier, pending in list(self._pending.items()):
            if pending.future.done():
                for request in pending.requests:
                    self._requests[request].discard(identifier)
                del self._pending[identifier]
                self.held -= pending.size

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
