"""A load of text streams and image requests against an OpenAI-compatible server, with the time of every token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from visionaccel.errors import ConfigurationError, DeviceError
from visionaccel_bench.server import image_content

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from PIL.Image import Image

STALL = 0.1
"""A text stream stalls where its next token takes longer than this, in seconds."""

Kind: TypeAlias = Literal["text", "image"]

_LEAD = 0.5
"""Seconds that text streams run before the first image is sent."""

_TIMEOUT = 600.0
_BEAT = 0.01
_STREAM = "Stream {number}: read the digits."
_CELLS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """Requests, each of which is sent when its time comes, whether or not earlier ones were answered.

    All text streams are sent at the start. Image requests, one for each image and `gap` seconds apart, begin half a
    second later, or immediately if there are no streams.
    """

    images: tuple[Image, ...]
    image_tokens: int
    gap: float = 0.0
    streams: int = 0
    stream_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """One request as its client saw it: when it was sent and when tokens arrived, in seconds from the load's start.

    One event of the server is one arrival, even if it brings several tokens; the server counts `tokens`.
    """

    name: str
    kind: Kind
    sent: float
    arrivals: tuple[float, ...]
    tokens: int

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds from each arrival to the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Run:
    """The requests of a load that was sent once: at least one, each with an arrival.

    `client_pauses` are start and length of times over `STALL` in which the client itself did not run, because the
    machine was too busy. Tokens that arrived in that time have a late time stamp, as if the server had stalled.
    """

    traces: tuple[Trace, ...]
    client_pauses: tuple[tuple[float, float], ...] = ()

    def of(self, kind: Kind) -> list[Trace]:
        """Return the requests of one kind."""
        return [trace for trace in self.traces if trace.kind == kind]


def picture(seed: Sequence[int], size: tuple[int, int]) -> Image:
    """Draw coloured clouds, a different picture for each seed; `size` is width and height in pixels."""
    import numpy as np
    from PIL import Image

    cells = np.random.default_rng(seed).integers(0, 256, (_CELLS, _CELLS, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def send(url: str, model: str, load: Load, *, one_by_one: bool = False) -> Run:
    """Send a load and wait for every answer. Each answer has exactly the requested number of tokens.

    With `one_by_one`, only the image requests are sent, each when the previous one was answered.

    Raises:
        DeviceError: A request fails; the message names it. The others are cancelled.
    """
    return asyncio.run(_send(url, model, load, one_by_one))


def first_model(url: str) -> str:
    """Return the first model that a running server serves. Raises ConfigurationError if it serves none."""
    from openai import OpenAI, OpenAIError

    try:
        with OpenAI(base_url=url, api_key="none", timeout=30.0, max_retries=0) as client:
            models = [model.id for model in client.models.list()]
    except (OpenAIError, ValueError) as error:
        raise ConfigurationError(
            f"the server at {url} did not report its model: {_said(error)}.",
            hint="Pass the base URL of a running OpenAI-compatible server, such as http://127.0.0.1:8000/v1.",
        ) from error
    if not models:
        raise ConfigurationError(f"the server at {url} serves no model.", hint="Start it with a model.")
    return models[0]


async def _send(url: str, model: str, load: Load, one_by_one: bool) -> Run:
    from openai import AsyncOpenAI

    contents = [image_content(image) for image in load.images]
    # A retry would be measured as one slow request.
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=_TIMEOUT, max_retries=0) as client:
        sender = _Sender(client, model)
        watching = asyncio.create_task(sender.watch())
        try:
            lead = _LEAD if load.streams else 0.0
            streams = (
                sender.ask(f"text {i}", "text", _STREAM.format(number=i), load.stream_tokens)
                for i in range(load.streams)
            )
            images = (
                sender.ask(
                    f"image {i}", "image", content, load.image_tokens, due=0.0 if one_by_one else lead + i * load.gap
                )
                for i, content in enumerate(contents)
            )
            traces = [await each for each in images] if one_by_one else await _all([*streams, *images])
        finally:
            watching.cancel()
    return Run(tuple(traces), tuple(sender.pauses))


class _Sender:
    """Sends requests. Times count from its creation; `pauses` are start and length of this process's pauses."""

    def __init__(self, client: AsyncOpenAI, model: str) -> None:
        # Imports the client's modules now, before the time of a request counts.
        self._completions, self._model = client.chat.completions, model
        self._start = time.perf_counter()
        self.pauses: list[tuple[float, float]] = []

    async def watch(self) -> None:
        """Record when this process should have run and did not."""
        while True:
            due = self._now() + _BEAT
            await asyncio.sleep(_BEAT)
            late = self._now() - due
            if late > STALL:
                self.pauses.append((due, late))

    async def ask(self, name: str, kind: Kind, content: Any, tokens: int, *, due: float = 0.0) -> Trace:
        """Send a request when its time comes, and record when its tokens arrive."""
        from openai import OpenAIError

        await asyncio.sleep(max(due - self._now(), 0.0))
        sent = self._now()
        arrivals: list[float] = []
        counted = 0
        try:
            answer = await self._completions.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for chunk in answer:
                now = self._now()
                if chunk.usage is not None:
                    counted = chunk.usage.completion_tokens
                # The first event has only the role. Each later one is a token, even if it has no text.
                if any(choice.delta.content or choice.delta.role is None for choice in chunk.choices):
                    arrivals.append(now)
        except OpenAIError as error:
            raise DeviceError(f"request '{name}' failed: {_said(error)}.") from error
        except Exception as error:  # the client's HTTP library has its own errors for interrupted streams
            raise DeviceError(f"request '{name}' ended early: {type(error).__name__}: {_said(error)}.") from error
        if not arrivals:
            raise DeviceError(f"the answer to request '{name}' has no tokens.")
        return Trace(name, kind, sent, tuple(arrivals), counted or len(arrivals))

    def _now(self) -> float:
        return time.perf_counter() - self._start


async def _all(work: Sequence[Coroutine[Any, Any, Trace]]) -> list[Trace]:
    """Return the results in order. After the first error the rest is cancelled."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _said(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
