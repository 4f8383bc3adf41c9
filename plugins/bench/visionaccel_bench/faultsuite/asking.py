"""Questions to a vLLM server: a picture of digits in, token ids or an error out; and what its metrics say."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Answer", "ask", "metric", "metrics_of", "text_stream"]

_QUESTION = "Read the digits."
_TIMEOUT = 60.0
_SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Attributes:
        tokens: Token ids of the answer; None for an error.
        error: What the client was told; None for an answer.
        lost: Neither came: no reply, or one that says nothing.
        seconds: How long it took.
    """

    tokens: tuple[int, ...] | None
    error: str | None
    lost: bool
    seconds: float


def ask(url: str, model: str, image: Image) -> Answer:
    """Have the digits of a picture read.

    Args:
        url: Base URL of the API, ending in `/v1`.
        model: The served model.
        image: The picture.
    """
    png = io.BytesIO()
    image.save(png, "PNG")
    data = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": _QUESTION}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8,
            "return_token_ids": True}  # fmt: skip
    started = time.monotonic()
    try:
        reply = _post(f"{url}/chat/completions", body)
        choice = reply["choices"][0]
        tokens = tuple(choice["token_ids"])
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        return Answer(None, text, not text.strip(), time.monotonic() - started)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Answer(None, f"{type(error).__name__}: {error}", True, time.monotonic() - started)
    return Answer(tokens, None, False, time.monotonic() - started)


@contextmanager
def text_stream(url: str, model: str) -> Iterator[list[str]]:
    """Texts decoded one after the other while the context lasts; what went wrong with them is in the list."""
    ended, problems = Event(), list[str]()

    def decode() -> None:
        while not ended.is_set():
            body = {"model": model, "prompt": _QUESTION, "max_tokens": 48, "ignore_eos": True, "temperature": 0}
            try:
                reply = _post(f"{url}/completions", body)
                if reply["usage"]["completion_tokens"] != 48:
                    problems.append(f"a text of {reply['usage']['completion_tokens']} tokens")
            except (OSError, ValueError, KeyError) as error:
                problems.append(f"{type(error).__name__}: {error}")
                return

    thread = Thread(target=decode, name="text-stream", daemon=True)
    thread.start()
    try:
        yield problems
    finally:
        ended.set()
        thread.join(_TIMEOUT)
        if thread.is_alive():
            problems.append("a text that does not end")


def metrics_of(url: str) -> str:
    """The server's metrics, in Prometheus' text format."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=_TIMEOUT) as reply:  # noqa: S310
        text: str = reply.read().decode()
    return text


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's values over those of its samples that have these labels."""
    total = 0.0
    for found in _SAMPLE.finditer(text):
        given = found["labels"] or ""
        if found["name"] == name and all(f'{label}="{value}"' in given for label, value in labels.items()):
            total += float(found["value"])
    return total


def _post(url: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:  # noqa: S310
        return json.loads(reply.read())
