"""Images: reading them, the checkpoint's own processor, and fitting them to the grids that programs take."""

from visionaccel.images.fitting import MOST_ASPECT_RATIO, Fitter, grid_cost, natural_grid
from visionaccel.images.fixed_grid import FittingProcessor, FixedGridProcessor, fixed_grid_processor
from visionaccel.images.level_table import read_levels
from visionaccel.images.reading import (
    FORMATS,
    MOST_FILE_BYTES,
    MOST_PIXELS,
    ImageProcessor,
    as_rgb,
    image_processor,
    load_image,
)
from visionaccel.images.webp_header import WEBP_HEADER, webp_size

__all__ = [
    "MOST_ASPECT_RATIO",
    "FORMATS",
    "Fitter",
    "FittingProcessor",
    "FixedGridProcessor",
    "ImageProcessor",
    "MOST_FILE_BYTES",
    "MOST_PIXELS",
    "WEBP_HEADER",
    "as_rgb",
    "fixed_grid_processor",
    "grid_cost",
    "image_processor",
    "load_image",
    "natural_grid",
    "read_levels",
    "webp_size",
]
