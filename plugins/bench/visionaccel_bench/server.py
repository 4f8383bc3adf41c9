"""Real OpenAI-compatible vLLM servers on loopback: starts them, asks about pictures, and reads metrics."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from visionaccel.core.child_groups import ChildGroup, how_it_ended
from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import ConfigurationError, DeviceError

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION = "Read the digits."

API_SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
"""Starts the server's module, which works for every vLLM distribution."""

_LOOPBACK = "127.0.0.1"
_ENDING = 20.0
"""Seconds that a server has to end after SIGTERM."""

_TIMEOUT = 60.0
_TEXT_TOKENS = 48
_LOG_LINES = 30
_SETTINGS = ("VISIONACCEL_", "VLLM_VISION_NPU_", "VLLM_NPU_")


def log_end(log: Path) -> str:
    """Return the last lines of a child process's output."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


@dataclass(frozen=True)
class VllmServer:
    """A running server; `url` is the base URL of its OpenAI API, ending in `/v1`.

    The engine's processes are in the group of `child`.
    """

    url: str
    model: str
    log: Path
    child: ChildGroup

    def healthy(self) -> bool:
        """Return whether the server runs and its engine answers the health check."""
        if self.child.exited():
            return False
        try:
            with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5) as answer:  # noqa: S310
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False


def quiet_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with only the given visionaccel settings, and a small, offline vLLM."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**defaults, **inherited, **settings}


@contextmanager
def serve(
    checkpoint: Path,
    settings: Mapping[str, str],
    arguments: Sequence[str] = (),
    *,
    command: Sequence[str] = API_SERVER,
    timeout: float = 300.0,
    waiting: Callable[[float], None] | None = None,
) -> Iterator[VllmServer]:
    """Serve a checkpoint while the context lasts.

    Args:
        checkpoint: Folder of the model.
        settings: visionaccel's settings for the server; none for stock vLLM.
        arguments: More arguments for the server.
        command: The server's command line up to the model.
        timeout: Seconds until the server must answer.
        waiting: Called twice a second with the seconds waited so far.

    Raises:
        ConfigurationError: The command cannot be started.
        DeviceError: The server ends, for example because vLLM is not installed, or does not answer in time; the
            message contains the end of its log.
    """
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port = probe.getsockname()[1]
    with temporary_folder("visionaccel-serve-") as folder:
        log = folder / "server.log"
        place = ("--host", _LOOPBACK, "--port", str(port), "--served-model-name", "visionaccel")
        with log.open("wb") as out:
            try:
                child = ChildGroup(
                    [*command, str(checkpoint), *place, *arguments],
                    # vLLM leaves its sockets behind when it is stopped; here they are removed with the folder.
                    environment={**quiet_environment(settings), "VLLM_RPC_BASE_PATH": str(folder)},
                    output=out,
                )
            except FileNotFoundError as error:
                raise ConfigurationError(f"{command[0]} cannot be started: {error}", hint="Install vLLM.") from error
        server = VllmServer(f"http://{_LOOPBACK}:{port}/v1", "visionaccel", log, child)
        try:
            started = time.monotonic()
            while not server.healthy():
                waited = time.monotonic() - started
                ended = child.exited()
                if ended or waited > timeout:
                    state = how_it_ended(child.reap()) if ended else "does not answer"
                    raise DeviceError(
                        f"the vLLM server {state} after {waited:.0f} s. The end of its log:\n{log_end(log)}",
                        hint="See the log above for the reason.",
                    )
                if waiting is not None:
                    waiting(waited)
                time.sleep(0.5)
            yield server
        finally:
            child.ask_to_end()
            child.end(_ENDING)


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
