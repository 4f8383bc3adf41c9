"""How an encoder's errors, and fitting images to its programs, change what a small model reads.

The digits model is a small Qwen2.5-VL that reads handwritten digits (`examples/digits_vlm`). Its language model runs in
transformers, in float32 and with greedy sampling, on the embeddings of any encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import CheckpointError, VisionAccelError
from visionaccel.images import Fitter, ImageProcessor, image_processor
from visionaccel_testing.conformance.kit import encoded, one_thread

if TYPE_CHECKING:
    from PIL.Image import Image

logger = safe_logger(__name__)

LEAST_AGREEMENT = 0.98
"""The least share of answers that must be equal to those with the reference encoder."""

_MOST_TOKENS = 8

Fit = Literal["natural", "letterbox", "stretch"]
Patches = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DigitsRead:
    """What the digits model reads with one way of fitting images to the programs.

    Attributes:
        fit: The way of fitting; `natural` leaves images as they are.
        images: Number of images.
        accuracy: Share of correct answers.
        agreement: Share of answers equal to those with the reference encoder on the same images.
    """

    fit: Fit
    images: int
    accuracy: float
    agreement: float


def read_digits(folder: Path, ours: Encoder, reference: Encoder, count: int) -> tuple[DigitsRead, ...]:
    """Return what the digits model reads in `count` held-out images, for each way of fitting images to the programs.

    For `natural`, images keep their size and are encoded by `ours`, or by the reference if no program takes any grid:
    the accuracy of `letterbox` and `stretch` is compared with that one. These two are measured if there are programs
    that do not take every grid; images are then fitted to those.

    Args:
        folder: The digits checkpoint.
        ours: The encoder with all programs of the bundle.
        reference: The reference encoder.
        count: Number of images.
    """
    from digits_vlm.samples import held_out_images

    samples, reader, process = held_out_images(count), _Reader(folder), image_processor(folder)
    coverages = ours.coverages
    limited = tuple(coverage for coverage in coverages if not isinstance(coverage, AnyGrid))
    ways: list[tuple[Fit, Encoder]] = [("natural", reference if limited == coverages else ours)]
    if limited:
        ways += [("letterbox", ours), ("stretch", ours)]
    found, failed = [], False
    with one_thread():
        for fit, encoder in ways:
            fitter = None
            if fit != "natural":
                fitter = Fitter(ours.tower, limited, fit, process.min_pixels, process.max_pixels)
            right = agreeing = 0
            for sample in samples:
                patches, grid = _fitted(sample.image, fitter, process)
                expected = reader.answer(reference, patches, grid)
                answer: str | None = expected
                if encoder is ours:
                    try:
                        answer = reader.answer(ours, patches, grid)
                    except VisionAccelError as error:
                        answer = None
                        if not failed:  # the others are likely the same
                            logger.warning("No answer to an image of grid %s: %s", grid, error)
                        failed = True
                right += answer == sample.truth
                agreeing += answer == expected
            found.append(DigitsRead(fit, count, right / count, agreeing / count))
    return tuple(found)


def _fitted(image: Image, fitter: Fitter | None, process: ImageProcessor) -> tuple[Patches, Grid]:
    """Return the patches and grid of an image, which the fitter, if given, fits first."""
    if fitter is None:
        return process(image)
    patch, grid = fitter.tower.patch_size, fitter.grid_for(image.height, image.width)
    fitted = fitter.fit(image)
    return process(fitted, resize=(fitted.height, fitted.width) != (grid.h * patch, grid.w * patch))


class _Reader:
    """The digits model without its vision tower."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.utils import logging as transformers_logging

        class Visual(torch.nn.Module):
            """Replaces the tower, and returns embeddings that were made elsewhere."""

            dtype = torch.float32

            def __init__(self, merge_size: int) -> None:
                super().__init__()
                self.spatial_merge_size = merge_size
                self.embeddings: Any = None

            def forward(self, *_: Any, **__: Any) -> Any:
                return BaseModelOutputWithPooling(pooler_output=self.embeddings)

        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(  # nosec B615 # a folder of this machine
                folder, dtype=torch.float32, use_safetensors=True
            )
            self._model: Any = model.eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # nosec B615 # the same
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the digits model in {folder} cannot be loaded: {error}") from error
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        self._merge: int = self._model.config.vision_config.spatial_merge_size
        self._visual = self._model.model.visual = Visual(self._merge)

    def answer(self, encoder: Encoder, patches: Patches, grid: Grid) -> str:
        """Return the digits that the model reads in one image of patches [P, width], with an encoder's embeddings."""
        import torch

        from digits_vlm.architecture import QUESTION

        embeddings = encoded(encoder, patches, [grid])
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        config = self._model.config
        placeholder = self._tokenizer.convert_ids_to_tokens(config.image_token_id)
        text = text.replace(placeholder, placeholder * grid.tokens(self._merge))
        prompt = self._tokenizer(text, return_tensors="pt")["input_ids"]
        self._visual.embeddings = torch.from_numpy(embeddings)
        fed: dict[str, Any] = {
            "input_ids": prompt,
            "mm_token_type_ids": (prompt == config.image_token_id).int(),
            "pixel_values": torch.from_numpy(patches),
            "image_grid_thw": torch.tensor([grid.thw]),
        }
        answer: list[int] = []
        # `generate` would take as long to set up as so small a model takes to answer.
        with torch.inference_mode():
            for _ in range(_MOST_TOKENS):
                step = self._model(**fed, use_cache=True)
                answer.append(int(step.logits[0, -1].argmax()))
                if answer[-1] == config.text_config.eos_token_id:
                    break
                fed = {"input_ids": torch.tensor([answer[-1:]]), "past_key_values": step.past_key_values}
        return str(self._tokenizer.decode(answer, skip_special_tokens=True))
