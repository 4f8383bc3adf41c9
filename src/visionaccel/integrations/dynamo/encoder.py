"""The encode service behind Dynamo's contract for custom encoders.

Dynamo runs `preprocess` on a pool of threads, and `build`, `forward_batch` and `close` on another thread. What
`preprocess` raises fails the request with that image. What `forward_batch` raises fails every request in the batch, so
here a batch has one image, and the service, not Dynamo, keeps several in progress: `preprocess` puts an image into the
service's queue, and `forward_batch` waits for its embeddings. While the queue is full, `preprocess` waits, so images
are not fetched faster than they are encoded.

Dynamo sends the message of a ValueError to the client, with status 400. `InputError` is one, and is passed on without
its hint, which is for the operator. Other errors become a status of 500 without details.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from dynamo.vllm.multimodal_utils.custom_encoder import Preprocessed, Qwen3VLImageEncoding, VisionEncoderBackend

from visionaccel.checkpoint import locate_checkpoint
from visionaccel.core.arrays import as_host_tensor
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import open_matching
from visionaccel.errors import ConfigurationError, InputError
from visionaccel.families import tower_of
from visionaccel.images import Fitter, ImageProcessor, decode_image, fitter_for, image_processor
from visionaccel.integrations.dynamo.media import fetch
from visionaccel.service import Embedding, EncodeService, open_wanted_service
from visionaccel.settings import load_settings

logger = safe_logger(__name__)

ARCHITECTURES = (
    "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)  # fmt: skip
"""Models to which Dynamo 1.6 can give embeddings with a grid, from which vLLM derives the tokens' positions."""


@dataclass(frozen=True, slots=True)
class QueuedImage:
    """An image that the service has; it is withdrawn from the queue if Dynamo drops it.

    Dynamo does so if its request was cancelled, or if another image of the request failed.
    """

    embedding: Future[Embedding]
    grid: Grid

    def __del__(self) -> None:
        self.embedding.cancel()


@dataclass(frozen=True, slots=True)
class _Opened:
    service: EncodeService
    process: ImageProcessor
    fitter: Fitter | None


class VisionAccelEncoder(VisionEncoderBackend[str | bytes, QueuedImage, Qwen3VLImageEncoding]):  # type: ignore[misc]
    """Encodes the images of a Qwen3-VL or Qwen3.5 model with the encoder that the settings choose.

    All settings come from the environment, as in vLLM. `buckets` is None, as programs for fixed shapes are the
    backend's.
    """

    max_batch_cost = 1  # the cost of each image
    preprocess_concurrency = 8

    def __init__(self) -> None:
        self._opened: _Opened | None = None

    def build(self, model_id: str) -> None:
        """Open the encoder of a model, and encode the golden images of its bundle.

        Args:
            model_id: The checkpoint's folder or repository that the worker serves.

        Raises:
            ConfigurationError: If Dynamo cannot give embeddings to the model, the bundle belongs to another model, a
                setting is invalid, or the backend cannot run here.
            ArtifactError: If the checkpoint or the bundle is broken.
            DeviceError: If the device fails to open, or encodes the golden images incorrectly.
        """
        settings = load_settings()
        plugins = os.environ.get("VLLM_PLUGINS")
        if settings.backend is not None and (plugins is None or "visionaccel" in plugins.split(",")):
            logger.warning(
                "visionaccel: vLLM has loaded its plug-in as well, which may open a second encoder in the engine. Set "
                "VLLM_PLUGINS to a list without visionaccel."
            )
        stored = locate_checkpoint(model_id)
        if not set(stored.architectures) & set(ARCHITECTURES):
            raise ConfigurationError(
                f"Dynamo cannot give embeddings of a custom encoder to {', '.join(stored.architectures) or model_id}: "
                f"it can for {', '.join(ARCHITECTURES)}.",
                hint="Serve one of these models, or start the worker without --custom-encoder-class.",
            )
        wanted = tower_of(stored)
        source = wanted if settings.bundle is None else open_matching(settings.bundle, wanted, stored)
        process = image_processor(stored.folder, "torchvision")  # with the results of vLLM's own
        service = open_wanted_service(source, settings)
        try:
            fitter = fitter_for(service.tower, service.encoders[0].primary.coverages, settings.fit, process)
        except BaseException:
            service.close()
            raise
        self._opened = _Opened(service, process, fitter)
        for encoder in service.encoders:
            logger.info("visionaccel: %s", encoder.described("in Dynamo's worker"))

    def preprocess(self, raw: str | bytes) -> Preprocessed[QueuedImage]:
        """Fetch an image, make patches of it, and put them into the service's queue.

        Args:
            raw: The URL in the request, or the content of an image file.

        Raises:
            InputError: If the image cannot be fetched or read, or the model's processor refuses it.
            ServiceClosedError: If the encoder is closed.
        """
        opened = self._require_opened()
        with _errors_for_clients():
            image = decode_image(fetch(raw))
            patches, grid = opened.process(image if opened.fitter is None else opened.fitter.fit(image))
            return Preprocessed(QueuedImage(opened.service.submit(patches, grid), grid))

    def forward_batch(
        self,
        items: list[QueuedImage],
        target_bucket: int | None = None,  # noqa: ARG002
    ) -> list[Qwen3VLImageEncoding]:
        """Wait for the embeddings of images.

        Returns:
            For each image its float32 embeddings [tokens, out_width], which belong to the caller, and its grid. Each
            row has the deepstack levels after the embedding, as vLLM expects; vLLM casts the rows to its dtype.

        Raises:
            VisionAccelError: Why an image could not be encoded.
        """
        with _errors_for_clients():
            return [
                Qwen3VLImageEncoding(as_host_tensor(item.embedding.result().copy(), "float32"), item.grid.thw)
                for item in items
            ]

    def close(self) -> None:
        """Close the encoder. Images that are still in the queue fail."""
        if self._opened is not None:
            self._opened.service.close()

    def _require_opened(self) -> _Opened:
        if self._opened is None:
            raise ConfigurationError("the encoder was not built.", hint="Call build with the model first.")
        return self._opened


@contextmanager
def _errors_for_clients() -> Iterator[None]:
    """Take the hint from an InputError, which Dynamo sends to the client; it is in the log, as the error's cause."""
    try:
        yield
    except InputError as error:
        raise type(error)(error.message) from error
