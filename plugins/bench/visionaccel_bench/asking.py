"""Asks a vLLM server about pictures, and reads its metrics."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION = "Read the digits."

_TIMEOUT = 60.0
_TEXT_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a request: a text and its token ids, or the error that the client got.

    `lost` is whether there was neither: no reply, or an error without a text.
    """

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    error: str | None = None
    lost: bool = False


def image_content(image: Image) -> list[dict[str, Any]]:
    """Make the content of a chat message that asks for the digits of a picture."""
    png = io.BytesIO()
    image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]


def ask(url: str, model: str, image: Image, *, timeout: float = _TIMEOUT) -> Answer:
    """Ask the API at a URL for the digits of a picture; after `timeout` seconds without a reply the request is lost."""
    messages = [{"role": "user", "content": image_content(image)}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8, "return_token_ids": True}
    try:
        choice = _post(f"{url}/chat/completions", body, timeout)["choices"][0]
        return Answer(choice["message"]["content"] or "", tuple(choice["token_ids"]))
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        return Answer(error=text, lost=not text.strip())
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Answer(error=f"{type(error).__name__}: {error}", lost=True)


@contextmanager
def text_stream(url: str, model: str) -> Iterator[list[str]]:
    """Request one text after the other in a thread while the context lasts; yields a list of their problems."""
    ended, problems = Event(), list[str]()
    body = {
        "model": model, "prompt": QUESTION, "max_tokens": _TEXT_TOKENS, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip

    def decode() -> None:
        while not ended.is_set():
            try:
                tokens = _post(f"{url}/completions", body)["usage"]["completion_tokens"]
                if tokens != _TEXT_TOKENS:
                    problems.append(f"a text of {tokens} tokens")
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
    """Return the server's metrics in Prometheus' text format."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=_TIMEOUT) as reply:  # noqa: S310
        text: str = reply.read().decode()
    return text


def metric(text: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


def _post(url: str, body: Mapping[str, Any], timeout: float = _TIMEOUT) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout) as reply:  # noqa: S310
        return json.loads(reply.read())
