"""`visionaccel demo`: stock vLLM and a backend read the same held-out handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionaccel.backends import default_registry
from visionaccel.cli.output import Json, messages, print_json, print_table, results, status
from visionaccel.errors import DeviceError
from visionaccel.observe import timed_encodes
from visionaccel_bench.commands.options import tidy_if_terminated
from visionaccel_bench.server import VllmServer, ask, log_end, serve

if TYPE_CHECKING:
    from PIL.Image import Image

ARGUMENTS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16",
    "--limit-mm-per-prompt", '{"image": 4, "video": 1}',
)  # fmt: skip

_LONGEST_ANSWER = 600.0
"""Seconds for an answer: a backend may compile its program at the first encode."""


def demo(
    backend: Annotated[str, typer.Option(help="The backend to show.")] = "onnxrt",
    images: Annotated[int, typer.Option(min=1, help="How many held-out images to send.")] = 16,
    as_json: Json = False,
) -> None:
    """Serve the digits model with stock vLLM, then with a backend, and compare their answers.

    Both are real OpenAI-compatible servers on loopback, in float32. Exit status 1 if any answer differs.
    """
    from digits_vlm import checkpoint_path
    from digits_vlm.samples import held_out_images

    default_registry().entry(backend)
    checkpoint, samples = checkpoint_path(), held_out_images(images)
    pictures = [sample.image for sample in samples]
    settings = {"VISIONACCEL_BACKEND": backend, "VISIONACCEL_TIMING": "1"}
    stock = _ask("stock vLLM", checkpoint, {}, pictures)
    ours = _ask(f"vLLM with {backend}", checkpoint, settings, pictures)
    rows = []
    for sample, (theirs, _), (mine, encode_ms) in zip(samples, stock, ours, strict=True):
        size = f"{sample.image.width}x{sample.image.height}"
        rows.append({"image": size, "truth": sample.truth, "stock": theirs, backend: mine, "encode_ms": encode_ms})
    agreeing = sum(row["stock"] == row[backend] for row in rows)
    right = {name: sum(row[name] == row["truth"] for row in rows) / len(rows) for name in ("stock", backend)}
    if as_json:
        print_json({"images": rows, "agreement": agreeing / len(rows), "accuracy": right})
    else:
        print_table(
            "Handwritten digits",
            ("image", "truth", "stock answer", f"{backend} answer", "encode ms"),
            [list(row.values()) for row in rows],
            styles=["" if row["stock"] == row[backend] else "bold red" for row in rows],
        )
        accuracy = ", ".join(f"{name} {share:.1%}" for name, share in right.items())
        results.print(f"agreement: {agreeing} of {len(rows)}; accuracy: {accuracy}")
    if agreeing != len(rows):
        raise typer.Exit(1)


def _ask(
    title: str, checkpoint: Path, settings: dict[str, str], pictures: Sequence[Image]
) -> list[tuple[str, float | None]]:
    """Start a server, ask it about each picture, and stop it; return each answer and the milliseconds of its encode."""
    with tidy_if_terminated(), ExitStack() as stack:
        with status(f"{title}: starting") as tell:

            def waiting(seconds: float) -> None:
                tell(f"{title}: starting, {seconds:.0f} s (usually under a minute)")

            server = stack.enter_context(serve(checkpoint, settings, ARGUMENTS, waiting=waiting))
        messages.print(f"{title}: serving on {server.url}", highlight=False)
        answers = []
        with status(f"{title}: asking") as tell:
            for number, picture in enumerate(pictures, 1):
                tell(f"{title}: image {number} of {len(pictures)}")
                answers.append(_one(server, picture, timed=bool(settings)))
    return answers


def _one(server: VllmServer, picture: Image, *, timed: bool) -> tuple[str, float | None]:
    def encodes() -> list[dict[str, Any]]:
        return timed_encodes(server.log.read_text(errors="replace")) if timed else []

    before = len(encodes())
    answer = ask(server.url, server.model, picture, timeout=_LONGEST_ANSWER)
    if answer.text is None:
        raise DeviceError(f"the server did not answer: {answer.error} The end of its log:\n{log_end(server.log)}")
    if not timed:
        return answer.text, None
    new = encodes()[before:]
    if not new:
        raise DeviceError(f"the server answered without using the backend. The end of its log:\n{log_end(server.log)}")
    parts = (ms for encode in new for part, ms in encode["ms"].items() if part != "queue")
    return answer.text, round(sum(parts), 2)
