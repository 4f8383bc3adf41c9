"""Images: reading them, the checkpoint's own processor, and fitting them to the grids that programs take."""

from visionaccel.images.fitting import (
    MOST_ASPECT_RATIO,
    FitPolicy,
    Fitter,
    check_policy,
    fitted,
    grid_cost,
    natural_grid,
    require_area,
)
from visionaccel.images.loading import (
    FORMATS,
    MOST_FILE_BYTES,
    MOST_PIXELS,
    WEBP_HEADER,
    ImageBackend,
    ImageProcessor,
    as_rgb,
    image_processor,
    load_image,
    webp_size,
)

__all__ = [
    "MOST_ASPECT_RATIO",
    "FORMATS",
    "FitPolicy",
    "Fitter",
    "ImageBackend",
    "ImageProcessor",
    "MOST_FILE_BYTES",
    "MOST_PIXELS",
    "WEBP_HEADER",
    "as_rgb",
    "check_policy",
    "fitted",
    "grid_cost",
    "image_processor",
    "load_image",
    "natural_grid",
    "require_area",
    "webp_size",
]
