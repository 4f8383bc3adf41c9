"""Starts encoder instances, language-model instances and the router on this machine: `python start.py CHECKPOINT`."""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from visionaccel_bench.server import VllmServer, serve

ROUTER = Path(__file__).with_name("router.py")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Deployment:
    """The running router and instances.

    Attributes:
        url: Base URL of the router's OpenAI API, ending in `/v1`.
        storage: Folder through which embeddings are passed, with a subfolder for each image.
        router: The router's process.
    """

    url: str
    encoders: tuple[VllmServer, ...]
    language_models: tuple[VllmServer, ...]
    storage: Path
    router: subprocess.Popen[bytes]


def connected(role: str, storage: Path) -> tuple[str, str]:
    """Return the vLLM argument that makes an instance an `ec_producer` or `ec_consumer` of embeddings in a folder."""
    config = {
        "ec_connector": "ECExampleConnector",
        "ec_role": role,
        "ec_connector_extra_config": {"shared_storage_path": str(storage)},
    }
    return "--ec-transfer-config", json.dumps(config)


@contextmanager
def disaggregated(
    checkpoint: Path,
    settings: Mapping[str, str],
    arguments: Sequence[str] = (),
    *,
    encoders: int = 1,
    language_models: int = 1,
    encoder_settings: Mapping[str, str] | None = None,
    affinity: bool = False,
    port: int = 0,
) -> Iterator[Deployment]:
    """Run everything while the context lasts; the instances start at the same time.

    Args:
        checkpoint: Folder of the model; the same for both kinds, because its path is part of an image's identifier.
        settings: visionaccel's settings for every instance.
        arguments: More arguments for every vLLM server.
        encoder_settings: Settings for the encoders only, such as `VISIONACCEL_DEVICE`.
        encoders: Number of encoder instances.
        language_models: Number of language-model instances.
        affinity: Whether the same image always goes to the same encoder.
        port: The router's port; 0 for a free one.
    """
    stopping = threading.Event()

    def waiting(_: float) -> None:
        if stopping.is_set():
            raise InterruptedError("another instance did not start")

    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="visionaccel-embeddings-") as folder:
        instances: list[AbstractContextManager[VllmServer]] = []
        for role, count, own in (
            ("ec_producer", encoders, encoder_settings or {}),
            ("ec_consumer", language_models, {}),
        ):
            given = (*arguments, *connected(role, Path(folder)))
            instances += [serve(checkpoint, {**settings, **own}, given, waiting=waiting) for _ in range(count)]
        with ThreadPoolExecutor(len(instances)) as pool:
            started = [pool.submit(stack.enter_context, instance) for instance in instances]
            try:
                done, _ = wait(started, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                stopping.set()
                raise
        servers = [future.result() for future in started]
        yield stack.enter_context(
            _routed(servers[:encoders], servers[encoders:], Path(folder), affinity=affinity, port=port)
        )


@contextmanager
def _routed(
    encoders: Sequence[VllmServer],
    language_models: Sequence[VllmServer],
    storage: Path,
    *,
    affinity: bool,
    port: int,
) -> Iterator[Deployment]:
    """Run the router in front of running instances."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, port))
        port = probe.getsockname()[1]
    places = [f"--encoder={server.url.removesuffix('/v1')}" for server in encoders]
    places += [f"--language-model={server.url.removesuffix('/v1')}" for server in language_models]
    own = [f"--host={LOOPBACK}", f"--port={port}", *(["--affinity"] if affinity else [])]
    process = subprocess.Popen([sys.executable, str(ROUTER), *places, *own])
    try:
        _wait_for(f"http://{LOOPBACK}:{port}/health", process)
        yield Deployment(f"http://{LOOPBACK}:{port}/v1", tuple(encoders), tuple(language_models), storage, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the router does not answer at {url}")


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the model.", exists=True, file_okay=False)],
    backend: Annotated[str, typer.Option(help="Backend of the vision encoder.")] = "onnxrt",
    encoders: Annotated[int, typer.Option(help="Encoder instances.", min=1)] = 1,
    language_models: Annotated[int, typer.Option(help="Language-model instances.", min=1)] = 1,
    affinity: Annotated[bool, typer.Option(help="Always send the same image to the same encoder.")] = False,
    port: Annotated[int, typer.Option(help="The router's port; 0 for a free one.")] = 8000,
    argument: Annotated[list[str] | None, typer.Option(help="Argument for every vLLM server; repeat for more.")] = None,
) -> None:
    """Serve a model with its vision encoder and its language model in separate processes, until Ctrl-C."""

    def end(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, end)
    typer.echo("Starting; this takes about a minute.")
    try:
        with disaggregated(
            checkpoint.resolve(),
            {"VISIONACCEL_BACKEND": backend},
            argument or (),
            encoders=encoders,
            language_models=language_models,
            affinity=affinity,
            port=port,
        ) as running:
            typer.echo(f"Serving as 'visionaccel' at {running.url}. Ctrl-C ends it.")
            for server in (*running.encoders, *running.language_models):
                kind = "encoder" if server in running.encoders else "language model"
                typer.echo(f"  {kind} at {server.url}, log {server.log}")
            running.router.wait()
            typer.echo("The router ended.", err=True)
            raise typer.Exit(1)
    except KeyboardInterrupt:
        typer.echo("Ended.")


if __name__ == "__main__":
    typer.run(main)
