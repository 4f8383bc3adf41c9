"""Images from files, and the checkpoint's own image processor that turns them into patches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.errors import CheckpointError, ConfigurationError, InputError
from visionaccel.grid import Grid, as_grids

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageProcessor", "image_processor", "load_image"]


class ImageProcessor:
    """The image processor that a checkpoint configures, on Pillow and numpy.

    Attributes:
        min_pixels: Smallest area that it gives an image.
        max_pixels: Largest area that it gives an image.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.min_pixels, self.max_pixels = int(processor.size.shortest_edge), int(processor.size.longest_edge)

    def __call__(self, image: Image, *, resize: bool = True) -> tuple[NDArray[np.float32], Grid]:
        """Patches of one image.

        Args:
            image: In any mode; read as RGB.
            resize: Whether the processor chooses the size. Otherwise the image is taken as it is, and its sides must
                be multiples of a merged token's.

        Returns:
            Patches float32 [P, patch_width] and their grid.

        Raises:
            InputError: If the processor refuses the image.
        """
        chosen = {} if resize else {"do_resize": False}
        try:
            inputs = self._processor(images=[image.convert("RGB")], return_tensors="np", **chosen)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the image processor refuses an image of {image.width}x{image.height} pixels: {error}",
                hint="Pass an image that the model's own processor takes.",
            ) from error
        return np.asarray(inputs["pixel_values"], dtype=np.float32), as_grids(inputs["image_grid_thw"])[0]


def image_processor(folder: Path) -> ImageProcessor:
    """The image processor of a checkpoint folder.

    Raises:
        ConfigurationError: If transformers or Pillow is missing.
        CheckpointError: If the folder has none, or it cannot be loaded.
    """
    try:
        import PIL.Image  # noqa: F401 - the processor of the pil backend needs it, and says so less clearly
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise _missing(error) from error
    try:
        return ImageProcessor(AutoImageProcessor.from_pretrained(folder, backend="pil"))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"the image processor of {folder} cannot be loaded: {error}",
            hint="The folder needs preprocessor_config.json or processor_config.json.",
        ) from error


def load_image(path: Path) -> Image:
    """The image in a file, decoded, turned as it is to be shown, in RGB.

    Raises:
        ConfigurationError: If Pillow is missing.
        InputError: If the file cannot be read as an image.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise _missing(error) from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}", hint="Pass a complete image file.") from error


def _missing(error: ImportError) -> ConfigurationError:
    return ConfigurationError(
        f"image files need transformers and Pillow, and {error.name} is missing.",
        hint="pip install 'visionaccel[images]'.",
    )
