"""Which embeddings the requests that wait in vLLM's scheduler have booked from the encode service.

No vLLM in here: requests and images are known by their identifiers. Every method is called from the engine's step, so
none waits, and each takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from visionaccel.arrays import Array
from visionaccel.errors import DeviceError, QueueFullError, VisionAccelError
from visionaccel.grid import Grid
from visionaccel.runtime.queue import Embedding
from visionaccel.runtime.service import EncodeService

__all__ = ["Bookings", "Failure", "Wanted"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image or video of a request.

    Attributes:
        identifier: vLLM's key of its content.
        label: What to call it in an error, such as `image 2`.
        patches: Pixel values [P, patch_width].
        grid: Its grid.
    """

    identifier: str
    label: str
    patches: Array
    grid: Grid


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request cannot be served.

    Attributes:
        label: The item that could not be encoded, such as `image 2`.
        error: Why not.
    """

    label: str
    error: VisionAccelError

    @property
    def message(self) -> str:
        """For the client: what failed, without advice for whoever runs the server."""
        return f"{self.label} of the prompt could not be encoded: {self.error.message}"


@dataclass(eq=False)
class _Booking:
    """One item that some requests wait for, and the embedding once it is there."""

    future: Future[Embedding]
    size: int
    requests: set[str] = field(default_factory=set)


class Bookings:
    """Books items for requests, holds their embeddings until they are taken, and knows whose item failed.

    An embedding that was booked is held whatever the service's cache does, or two requests with several images each
    could take one another's away for ever. What is held, being encoded included, is bounded: beyond the bound, only the
    request that has waited longest books more.

    Args:
        service: The service.
        size: The bound, in bytes of embeddings.

    Attributes:
        held: Bytes of embeddings that are booked.
    """

    def __init__(self, service: EncodeService, size: int) -> None:
        self._service, self._size = service, size
        self._bookings: dict[str, _Booking] = {}
        self._requests: dict[str, set[str]] = {}  # in the order of their first booking
        self._failures: dict[str, Failure] = {}
        self.held = 0

    def __len__(self) -> int:
        return len(self._bookings)

    def ready(self, request: str, items: Sequence[Wanted], arrival: float) -> bool:
        """Whether the embeddings of all these items are here for a request; those that are not, are booked.

        A request whose item failed is never ready; see `failures`.

        Args:
            request: Its identifier.
            items: What it needs next.
            arrival: When it arrived; earlier ones are served first.
        """
        ready = True
        for item in items:
            booking = self._bookings.get(item.identifier)
            if booking is None:
                booking = self._book(request, item, arrival)
                if booking is None:
                    ready = False
                    continue
            if request not in booking.requests:
                booking.requests.add(request)
                self._requests.setdefault(request, set()).add(item.identifier)
            if not booking.future.done():
                ready = False
            elif (error := booking.future.exception()) is not None:
                if not isinstance(error, VisionAccelError):
                    error = DeviceError(f"{type(error).__name__}: {error}")
                self._failures.setdefault(request, Failure(item.label, error))
                ready = False
        return ready

    def has(self, identifier: str) -> bool:
        """Whether an item's embedding is here."""
        return self._outcome(identifier) is not None

    def take(self, identifier: str) -> Embedding | None:
        """An item's embedding, for a step that needs it; the requests that booked it find it in vLLM's cache now."""
        embedding = self._outcome(identifier)
        if embedding is not None:
            booking = self._bookings[identifier]
            for request in booking.requests:
                self._forget(request, identifier)
            self._drop(identifier, booking)
        return embedding

    def failures(self) -> dict[str, Failure]:
        """Requests whose item failed since the last call, and why."""
        failures, self._failures = self._failures, {}
        return failures

    def release(self, request: str) -> None:
        """A request has ended, or was aborted: what nobody else booked is not encoded, or not held any more."""
        self._failures.pop(request, None)
        for identifier in self._requests.pop(request, ()):
            booking = self._bookings[identifier]
            booking.requests.discard(request)
            if not booking.requests:
                booking.future.cancel()
                self._drop(identifier, booking)

    def _book(self, request: str, item: Wanted, arrival: float) -> _Booking | None:
        if self.held > self._size and next(iter(self._requests), request) != request:
            return None
        size = 0
        try:
            future = self._service.submit(item.patches, item.grid, arrival=arrival, timeout=0)
            size = self._service.bytes_of(item.grid)
        except QueueFullError:
            return None
        except VisionAccelError as error:
            future = Future()
            future.set_exception(error)
        booking = _Booking(future, size)
        self._bookings[item.identifier] = booking
        self.held += booking.size
        return booking

    def _outcome(self, identifier: str) -> Embedding | None:
        booking = self._bookings.get(identifier)
        if booking is None or not booking.future.done() or booking.future.exception() is not None:
            return None
        return booking.future.result()

    def _forget(self, request: str, identifier: str) -> None:
        booked = self._requests[request]
        booked.discard(identifier)
        if not booked:
            del self._requests[request]

    def _drop(self, identifier: str, booking: _Booking) -> None:
        del self._bookings[identifier]
        self.held -= booking.size
