"""Asks a vLLM server about images and videos that are encoded here: `python client.py ENCODER QUESTION IMAGE...`.

The server serves the model that the encoder belongs to and runs with `--enable-mm-embeds`. This process needs neither
vLLM nor the language model.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from numpy.typing import NDArray
from PIL.Image import Image

from visionaccel import EncodeService, Grid, VisionAccelError, open_service
from visionaccel.backends import AUTO
from visionaccel.core.arrays import Array
from visionaccel.errors import InputError, UnsupportedArchitectureError
from visionaccel.images import Fitter, as_rgb, image_processor, load_image

TIMES = {"qwen2_5_vl": "second_per_grid_ts", "qwen3_vl": "timestamps"}
"""By family of the vision tower: the field in which vLLM expects the times of a video's frames."""


class AnswerError(RuntimeError):
    """The server cannot be reached, or answered with an error."""


class MessageParts:
    """Makes parts of messages from images and videos.

    Args:
        service: Encodes. The caller closes it.

    Raises:
        ConfigurationError: If torchvision is missing, or the image processor cannot make images for the programs.
        CheckpointError: If the encoder comes without an image processor.
    """

    def __init__(self, service: EncodeService) -> None:
        self._service, self._tower = service, service.tower
        # On torchvision, as in vLLM: Pillow's results differ by a grey level or two.
        self._process = image_processor(self._tower.checkpoint.folder, "torchvision")
        coverages = service.encoders[0].primary.coverages
        self._fitter = Fitter(self._tower, coverages, "letterbox", self._process.min_pixels, self._process.max_pixels)
        self._fitter.check_bounds()

    def image(self, image: Image) -> dict[str, Any]:
        """Encode an image as a part of a message. If no program takes its grid, it is fitted to one.

        Raises:
            InputError: If the image processor or the encoder refuses it.
            DeviceError: If the encoder fails.
        """
        patches, grid = self._process(self._fitter.fit(as_rgb(image)))
        return self._part("image", patches, grid)

    def video(self, frames: NDArray[np.uint8], fps: float) -> dict[str, Any]:
        """Encode a video as a part of a message.

        Args:
            frames: RGB, uint8 [frames, height, width, 3].
            fps: Frames per second.

        Raises:
            InputError: If the frames do not fill whole patches, the rate is not positive, or the encoder refuses them.
            UnsupportedArchitectureError: If this client does not know which times the model needs.
            DeviceError: If the encoder fails.
        """
        family, step = self._tower.family, self._tower.spec.temporal
        if family not in TIMES:
            raise UnsupportedArchitectureError(
                f"this client does not know which times vLLM needs for a video of family {family!r}.",
                hint=f"It knows those of {' and '.join(TIMES)}.",
            )
        if len(frames) == 0 or len(frames) % step or not 0 < fps < math.inf:
            raise InputError(
                f"{len(frames)} frames at {fps} frames per second are not a video for this model.",
                hint=f"Pass a multiple of {step} frames, and how many were taken in a second.",
            )
        from transformers import AutoVideoProcessor

        process = AutoVideoProcessor.from_pretrained(self._tower.checkpoint.folder)  # nosec B615 # a local folder
        inputs = process(videos=[frames], do_sample_frames=False, return_tensors="pt")
        # The time from one step of the grid to the next, or the middle of each step, in seconds.
        middles = (np.arange(0, len(frames), step) + (step - 1) / 2) / fps
        times = middles if TIMES[family] == "timestamps" else np.array(step / fps)
        grid = Grid(*inputs["video_grid_thw"][0].tolist())
        return self._part("video", inputs["pixel_values_videos"], grid, **{TIMES[family]: times})

    def _part(self, kind: str, patches: Array, grid: Grid, **times: NDArray[Any]) -> dict[str, Any]:
        rows = self._service.submit(patches, grid).result()
        fields = {f"{kind}_embeds": rows, f"{kind}_grid_thw": np.array(grid.thw), **times}
        return {"type": f"{kind}_embeds", f"{kind}_embeds": {name: encoded(field) for name, field in fields.items()}}


def ask(url: str, content: Sequence[dict[str, Any]], key: str | None = None, **parameters: Any) -> Any:
    """Send one message to the first model of a server, and return the chat completion.

    Args:
        url: Base URL of the server's OpenAI API, ending in `/v1`.
        content: Parts of the message.
        key: The server's API key.
        parameters: More fields of the request, such as `max_tokens`.

    Raises:
        AnswerError: If the server cannot be reached or answers with an error.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=300) as server:
            model = _json(server.get("/models"))["data"][0]["id"]
            body = {"model": model, "messages": [{"role": "user", "content": list(content)}], **parameters}
            return _json(server.post("/chat/completions", json=body))
    except httpx.HTTPError as error:
        raise AnswerError(f"{url} does not answer: {type(error).__name__}: {error}") from error


def _json(reply: httpx.Response) -> Any:
    if not reply.is_success:
        raise AnswerError(f"{reply.url} answered with status {reply.status_code}: {reply.text[:1000]}")
    return reply.json()


def encoded(array: NDArray[Any]) -> str:
    """Encode an array as vLLM reads it: the bytes of a `.npy` file in base64."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def main(
    encoder: Annotated[str, typer.Argument(help="Checkpoint or bundle whose vision tower encodes.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.", dir_okay=False)],
    url: Annotated[str, typer.Option(help="The server's OpenAI API.")] = "http://127.0.0.1:8000/v1",
    key: Annotated[str | None, typer.Option(help="The server's API key.", envvar="VLLM_API_KEY")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the vision encoder.")] = AUTO,
) -> None:
    """Ask a vLLM server about images, which are encoded in this process."""
    try:
        with open_service(encoder, backend=backend) as service:
            parts = MessageParts(service)
            content = [parts.image(load_image(file)) for file in images]
            answer = ask(url, [*content, {"type": "text", "text": question}], key, temperature=0)
    except (VisionAccelError, AnswerError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    typer.run(main)
