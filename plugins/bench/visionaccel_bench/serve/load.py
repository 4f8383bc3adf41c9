"""A load of text streams and image requests against an OpenAI-compatible server, with the time of every token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visionaccel.errors import ConfigurationError, DeviceError
from visionaccel_bench.asking import image_content
from visionaccel_bench.serve.figures import STALL, Kind, Run, Trace

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from PIL.Image import Image

_LEAD = 0.5
"""Seconds that text streams run before the first image is sent."""

_TIMEOUT = 600.0
_BEAT = 0.01
_STREAM = "Stream {number}: read the digits."
_CELLS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that are each sent when its time comes, whether or not those before were answered.

    All text streams are sent at the start. Image requests, one for each image and `gap` seconds apart, begin half a
    second later; without streams, at once.
    """

    images: tuple[Image, ...]
    image_tokens: int
    gap: float = 0.0
    streams: int = 0
    stream_tokens: int = 0


def picture(seed: Sequence[int], size: tuple[int, int]) -> Image:
    """A picture of coloured clouds of a width and height in pixels; another one for each seed of numbers from 0."""
    import numpy as np
    from PIL import Image

    cells = np.random.default_rng(seed).integers(0, 256, (_CELLS, _CELLS, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def send(url: str, model: str, load: Load, *, one_by_one: bool = False) -> Run:
    """Send a load and wait for every answer. Each answer has exactly the number of tokens that was asked for.

    With `one_by_one`, only the image requests are sent, each when the one before was answered.

    Raises:
        DeviceError: If a request fails; the message names it. The others are cancelled.
    """
    return asyncio.run(_send(url, model, load, one_by_one))


def first_model(url: str) -> str:
    """The model that a running server serves, the first of several; a `ConfigurationError` if it names none."""
    from openai import OpenAI, OpenAIError

    try:
        with OpenAI(base_url=url, api_key="none", timeout=30.0, max_retries=0) as client:
            models = [model.id for model in client.models.list()]
    except (OpenAIError, ValueError) as error:
        raise ConfigurationError(
            f"the server at {url} cannot be asked for its model: {_said(error)}.",
            hint="Pass the base URL of a running OpenAI-compatible server, such as http://127.0.0.1:8000/v1.",
        ) from error
    if not models:
        raise ConfigurationError(f"the server at {url} serves no model.", hint="Start it with one.")
    return models[0]


async def _send(url: str, model: str, load: Load, one_by_one: bool) -> Run:
    from openai import AsyncOpenAI

    contents = [image_content(image) for image in load.images]
    # A request that is sent again would be measured as one slow request.
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=_TIMEOUT, max_retries=0) as client:
        sender = _Sender(client, model)
        watching = asyncio.create_task(sender.watch())
        try:
            if one_by_one:
                traces = [
                    await sender.ask(f"image {i}", "image", content, load.image_tokens)
                    for i, content in enumerate(contents)
                ]
            else:
                lead = _LEAD if load.streams else 0.0
                streams = (
                    sender.ask(f"text {i}", "text", _STREAM.format(number=i), load.stream_tokens)
                    for i in range(load.streams)
                )
                images = (
                    sender.ask(f"image {i}", "image", content, load.image_tokens, due=lead + i * load.gap)
                    for i, content in enumerate(contents)
                )
                traces = await _all([*streams, *images])
        finally:
            watching.cancel()
    return Run(tuple(traces), tuple(sender.pauses))


class _Sender:
    """Sends requests. Times count from when it was made; `pauses` are start and length of this process's pauses."""

    def __init__(self, client: AsyncOpenAI, model: str) -> None:
        # Its modules are imported here, before the time of a request counts.
        self._completions, self._model = client.chat.completions, model
        self._start = time.perf_counter()
        self.pauses: list[tuple[float, float]] = []

    async def watch(self) -> None:
        """Note when this process should have run and did not."""
        while True:
            due = self._now() + _BEAT
            await asyncio.sleep(_BEAT)
            late = self._now() - due
            if late > STALL:
                self.pauses.append((due, late))

    async def ask(self, name: str, kind: Kind, content: Any, tokens: int, *, due: float = 0.0) -> Trace:
        """Send a request when its time comes, and note when its tokens arrive."""
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
                # The first event has only the role. Later ones are a token each, even if it has no text.
                if any(choice.delta.content or choice.delta.role is None for choice in chunk.choices):
                    arrivals.append(now)
        except OpenAIError as error:
            raise DeviceError(f"request '{name}' failed: {_said(error)}.") from error
        except Exception as error:  # The client's HTTP library has its own errors for streams that break off.
            raise DeviceError(f"request '{name}' broke off: {type(error).__name__}: {_said(error)}.") from error
        if not arrivals:
            raise DeviceError(f"request '{name}' was answered without a token.")
        return Trace(name, kind, sent, tuple(arrivals), counted or len(arrivals))

    def _now(self) -> float:
        return time.perf_counter() - self._start


async def _all(work: Sequence[Coroutine[Any, Any, Trace]]) -> list[Trace]:
    """The results, in order. With the first error the rest is cancelled."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _said(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
