"""Reads image files, and runs the checkpoint's own image processor, which turns images into patches."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import as_numpy
from visionaccel.core.bounded_files import open_regular
from visionaccel.core.grid import Grid, as_grids
from visionaccel.errors import CheckpointError, ConfigurationError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's names of the formats that `load_image` reads: only a few, because each decoder is native code."""

MOST_PIXELS = 2**26
"""The maximum number of pixels of an image, 8192x8192. Decoded it takes 256 MiB, twice that while it is turned, and
1.3 GiB as a WebP."""

MOST_FILE_BYTES = 256 * 2**20
"""The maximum size of an image file in bytes, as in vLLM for downloads."""

WEBP_HEADER = 30
"""Number of bytes at the start of a WebP file that contain its width and height."""

ImageBackend: TypeAlias = Literal["pil", "torchvision"]
"""The library that transformers computes with: Pillow and numpy, or torch.

Their results differ: by a grey level or two in pictures, by up to 30 in noise that is clipped at black and white.
"""


class ImageProcessor:
    """The image processor that a checkpoint configures.

    Attributes:
        backend: The library that it computes with.
        min_pixels: The smallest area that it gives an image.
        max_pixels: The largest area that it gives an image.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.backend: ImageBackend = processor.backend
        self.min_pixels, self.max_pixels = int(processor.size.shortest_edge), int(processor.size.longest_edge)

    def __call__(self, image: Image, *, resize: bool = True) -> tuple[NDArray[np.float32], Grid]:
        """Return the patches of one image, float32 [P, patch_width], and their grid.

        Args:
            image: An image in any mode; it is converted to RGB.
            resize: Whether the processor chooses the size. If not, the image's sides must be multiples of those of a
                merged token.

        Raises:
            InputError: If the processor refuses the image.
        """
        chosen = {} if resize else {"do_resize": False}
        rgb = as_rgb(image)
        try:
            inputs = self._processor(images=[rgb], return_tensors="np" if self.backend == "pil" else "pt", **chosen)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the image processor rejected an image of {image.width}x{image.height} pixels: {error}",
                hint="Pass an image that the model's own processor accepts.",
            ) from error
        patches: NDArray[np.float32] = np.asarray(as_numpy(inputs["pixel_values"]), dtype=np.float32)
        return patches, as_grids(inputs["image_grid_thw"])[0]


def as_rgb(image: Image) -> Image:
    """Convert an image to RGB; the same object if it is RGB already.

    Raises:
        InputError: If it is not an image, its file is damaged, or its mode cannot be converted.
    """
    try:
        if image.mode == "RGB":
            image.load()  # Pillow reads an opened file only now, and it may be damaged
            return image
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise any error for damaged bytes, zlib's and struct's too
        raise InputError(
            f"{type(image).__name__} {getattr(image, 'mode', '')} cannot be read as an image: {error}.",
            hint="Pass a complete Pillow image.",
        ) from error


def image_processor(folder: Path, backend: ImageBackend = "pil") -> ImageProcessor:
    """Load the image processor of a checkpoint folder.

    Args:
        folder: The checkpoint's folder.
        backend: The library to compute with. `torchvision` needs torch and torchvision; vLLM uses it.

    Raises:
        ConfigurationError: If transformers, Pillow or the backend's library is missing.
        CheckpointError: If the folder has no image processor, or it cannot be loaded.
    """
    try:
        import PIL.Image  # noqa: F401 - the processor needs it, and its own error is less clear
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise ConfigurationError.missing_extra("reading image files", error.name, "visionaccel[images]") from error
    try:
        loaded = AutoImageProcessor.from_pretrained(folder, backend=backend)  # nosec B615 # a folder of this machine
        processor = ImageProcessor(loaded)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"the image processor of {folder} cannot be loaded: {error}",
            hint="The folder needs preprocessor_config.json or processor_config.json.",
        ) from error
    if processor.backend != backend:  # transformers falls back to another one and only warns
        raise ConfigurationError(
            f"transformers has no {backend} image processor in this environment.", hint="Install torch and torchvision."
        )
    return processor


def load_image(path: Path) -> Image:
    """Read the first frame or page of an image file, in its display orientation and in RGB.

    Its format, file size, width and height are checked before any pixel is decoded.

    Args:
        path: A file in one of `FORMATS`, of at most `MOST_FILE_BYTES` bytes and `MOST_PIXELS` pixels.

    Raises:
        ConfigurationError: If Pillow is missing.
        InputError: If the file cannot be read as an image or is too large.
    """
    try:
        # Ignored warnings are about sizes that are refused anyway, and about unused metadata.
        with open_regular(path) as file, warnings.catch_warnings(action="ignore"):
            return _decoded(file, os.fstat(file.fileno()).st_size, str(path))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}", hint="Pass a complete image file.") from error


def decode_image(content: bytes) -> Image:
    """Like `load_image`, for the content of a file, in any thread. Its errors say nothing about this machine."""
    return _decoded(io.BytesIO(content), len(content), "the file")


def _decoded(file: BinaryIO, size: int, name: str) -> Image:
    """Decode a file of `size` bytes, which errors call `name`."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ConfigurationError.missing_extra("reading image files", error.name, "visionaccel[images]") from error
    try:
        if size > MOST_FILE_BYTES:
            raise InputError(
                f"{name} has {size} bytes; the limit is {MOST_FILE_BYTES} bytes.", hint="Pass a smaller file."
            )
        _check_pixels(name, *webp_size(file.read(WEBP_HEADER)))
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            _check_pixels(name, image.width, image.height)
            return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} cannot be read as an image; supported formats: {', '.join(FORMATS)}.",
            hint="Pass a complete image file in one of these formats.",
        ) from error
    except Exception as error:  # as in `as_rgb`; a size of twice Pillow's own limit raises another error
        raise InputError(f"{name} cannot be read as an image: {error}", hint="Pass a complete image file.") from error


def webp_size(start: bytes) -> tuple[int, int]:
    """Return the width and height in the first `WEBP_HEADER` bytes of a WebP file; zeros for other formats.

    Pillow returns them only after the decoder has allocated its frames. The layouts are in
    https://developers.google.com/speed/webp/docs/riff_container: `VP8X` has the size of the canvas less 1 in 24 bits
    each, `VP8L` in 14 bits each, and `VP8 ` the size itself in 14 bits each.
    """
    if len(start) < WEBP_HEADER or start[:4] != b"RIFF" or start[8:12] != b"WEBP":
        return 0, 0
    match start[12:16]:
        case b"VP8X":
            return int.from_bytes(start[24:27], "little") + 1, int.from_bytes(start[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(start[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF
    return 0, 0


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise InputError(
            f"{name} has {width}x{height} pixels; the limit is {MOST_PIXELS} pixels in total.",
            hint="Scale the image down; the model's processor would scale it down as well.",
        )
