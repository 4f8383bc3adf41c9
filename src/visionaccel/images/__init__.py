"""Images: reading files, the checkpoint's own processor, and fitting to the grids that programs take."""

from visionaccel.images.fitting import MOST_ASPECT_RATIO, FitPolicy, Fitter, fitter_for, grid_cost
from visionaccel.images.loading import (
    FORMATS,
    MOST_FILE_BYTES,
    MOST_PIXELS,
    ImageProcessor,
    as_rgb,
    decode_image,
    image_processor,
    load_image,
)

__all__ = [
    "FORMATS", "MOST_ASPECT_RATIO", "MOST_FILE_BYTES", "MOST_PIXELS", "FitPolicy", "Fitter", "ImageProcessor", "as_rgb",
    "decode_image", "fitter_for", "grid_cost", "image_processor", "load_image",
]  # fmt: skip
