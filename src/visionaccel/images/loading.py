"""Images from files, and the checkpoint's own image processor that turns them into patches."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import as_numpy
from visionaccel.core.bounded_files import open_regular
from visionaccel.core.grid import Grid, as_grids
from visionaccel.errors import CheckpointError, ConfigurationError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's names of the formats that `load_image` reads. Few, as each decoder is native code."""

MOST_PIXELS = 2**26
"""Most pixels of an image file, 8192x8192: 256 MiB once decoded, as much again to be turned; a WebP takes 1.3 GiB."""

MOST_FILE_BYTES = 256 * 2**20
"""Most bytes of an image file, as in vLLM for downloads."""

WEBP_HEADER = 30
"""Bytes that hold the size in each kind of WebP file."""

ImageBackend: TypeAlias = Literal["pil", "torchvision"]
"""What transformers computes on: Pillow and numpy, or torch.

They resize differently: by a grey level or two in pictures, by up to 30 in noise that is clipped at black and white.
"""


class ImageProcessor:
    """The image processor that a checkpoint configures.

    Attributes:
        backend: What it computes on.
        min_pixels: Smallest area that it gives an image.
        max_pixels: Largest area that it gives an image.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.backend: ImageBackend = processor.backend
        self.min_pixels, self.max_pixels = int(processor.size.shortest_edge), int(processor.size.longest_edge)

    def __call__(self, image: Image, *, resize: bool = True) -> tuple[NDArray[np.float32], Grid]:
        """Patches of one image.

        Args:
            image: In any mode; read as RGB.
            resize: Whether the processor chooses the size. If not, the image's sides must be multiples of a merged
                token's.

        Returns:
            Patches float32 [P, patch_width] and their grid.

        Raises:
            InputError: If the processor refuses the image.
        """
        chosen = {} if resize else {"do_resize": False}
        tensors = "np" if self.backend == "pil" else "pt"
        rgb = as_rgb(image)
        try:
            inputs = self._processor(images=[rgb], return_tensors=tensors, **chosen)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the image processor refuses an image of {image.width}x{image.height} pixels: {error}",
                hint="Pass an image that the model's own processor takes.",
            ) from error
        patches: NDArray[np.float32] = np.asarray(as_numpy(inputs["pixel_values"]), dtype=np.float32)
        return patches, as_grids(inputs["image_grid_thw"])[0]


def as_rgb(image: Image) -> Image:
    """An image in RGB; the same object if it is RGB already.

    Raises:
        InputError: If it is not an image, its file is damaged, or its mode has no way to RGB.
    """
    try:
        if image.mode == "RGB":
            image.load()  # an opened file is read only now, and may be damaged
            return image
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise any error for damaged bytes, zlib's and struct's too
        raise InputError(
            f"{type(image).__name__} {getattr(image, 'mode', '')} cannot be read as an image: {error}.",
            hint="Pass a complete Pillow image.",
        ) from error


def image_processor(folder: Path, backend: ImageBackend = "pil") -> ImageProcessor:
    """The image processor of a checkpoint folder.

    Args:
        folder: The checkpoint's.
        backend: What it computes on. `torchvision` needs torch and torchvision; it is what vLLM uses.

    Raises:
        ConfigurationError: If transformers or Pillow is missing, or the backend's library.
        CheckpointError: If the folder has none, or it cannot be loaded.
    """
    try:
        import PIL.Image  # noqa: F401 - the processor needs it, and says so less clearly
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
    if processor.backend != backend:  # transformers takes another one with a mere warning
        raise ConfigurationError(
            f"transformers offers no image processor on {backend} here.", hint="Install torch and torchvision."
        )
    return processor


def load_image(path: Path) -> Image:
    """The image in a file, decoded, in its display orientation and in RGB; of several frames or pages the first.

    Its format, its size in bytes and the size that it states are checked before any pixel is decoded.

    Args:
        path: A file of one of `FORMATS`, of at most `MOST_FILE_BYTES` bytes and `MOST_PIXELS` pixels.

    Raises:
        ConfigurationError: If Pillow is missing.
        InputError: If the file cannot be read as an image, is too large, or states too large a size.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ConfigurationError.missing_extra("reading image files", error.name, "visionaccel[images]") from error
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MOST_FILE_BYTES:
                raise InputError(
                    f"{path} has {size} bytes, and image files may have {MOST_FILE_BYTES}.",
                    hint="Pass the image in a smaller file.",
                )
            _check_pixels(path, *webp_size(file.read(WEBP_HEADER)))
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes that are refused below, and of metadata that is not used
                with Image.open(file, formats=FORMATS) as image:
                    _check_pixels(path, image.width, image.height)
                    return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path} cannot be read as an image: it is none of {', '.join(FORMATS)}.",
            hint="Pass a complete image file of one of these formats.",
        ) from error
    except Exception as error:  # as in `as_rgb`; a size of twice Pillow's own limit raises another error
        raise InputError(f"{path} cannot be read as an image: {error}", hint="Pass a complete image file.") from error


def webp_size(start: bytes) -> tuple[int, int]:
    """Width and height in pixels that a WebP file states in its first `WEBP_HEADER` bytes; zeros for other formats.

    Pillow tells them only after the decoder has allocated its frames. The layouts are those of
    https://developers.google.com/speed/webp/docs/riff_container: `VP8X` holds the size of the canvas, less 1, in 24
    bits each, `VP8L` in 14 bits each, and `VP8 ` the size itself in 14 bits each.
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


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise InputError(
            f"{path} states {width}x{height} pixels, and images may have {MOST_PIXELS} in all.",
            hint="Pass the image scaled down; the model's processor would scale it down as well.",
        )
