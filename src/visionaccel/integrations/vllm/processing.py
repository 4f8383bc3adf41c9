"""Images get the grids that the encoder's programs take before vLLM's processor sees them.

Resizing comes first, so that placeholders, positions and tokens are all vLLM's own for the size the image then has. An
image or video that no program takes is refused here, with its request alone, unless a fallback takes it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import as_numpy
from visionaccel.core.grid import as_grids
from visionaccel.errors import InputError, UnfitGridError
from visionaccel.images import Fitter
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.encoder_source import Grids, grids_of
from visionaccel.integrations.vllm.processor_options import changed_size, normalisation_in, without_normalisation
from visionaccel.integrations.vllm.processor_times import ProcessorObserver
from visionaccel.settings import Settings, load_settings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FittedInfo", "FittedProcessor"]


class FittedInfo(compat.HookedInfo):
    """Mixed in before a model's processing information: fits images to the grids that the programs take."""

    @cached_property
    def _settings(self) -> Settings:
        return load_settings()

    @cached_property
    def grids(self) -> Grids | None:
        """Which grids the encoder takes; None where it takes every one, and where prompts may hold no media."""
        model = self.ctx.model_config
        return grids_of(compat.served_by(model), self._settings) if compat.takes_media(model) else None

    @property
    def limited(self) -> bool:
        """Some grid fits no program, and no other backend takes it."""
        return self.grids is not None and not self.grids.rest

    @cached_property
    def fitter(self) -> Fitter | None:
        """What resizes images; None where every grid is taken.

        Raises:
            ConfigurationError: If the processor would change the size of an image that was fitted to a program.
        """
        grids = self.grids
        if grids is None:
            return None
        least, most = compat.pixel_bounds(self)
        policy = "letterbox" if self._settings.fit == "none" else self._settings.fit
        fitter = Fitter(grids.tower, grids.coverages, policy, least, most)
        fitter.check_bounds()
        return fitter

    @property
    def resizes(self) -> bool:
        """Images are resized to the programs' grids."""
        return self.grids is not None and self._settings.fit != "none"

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()
        return {**limits, "video": 0} if self.limited else limits

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items and self.limited:
            self._refuse_video()
        super().validate_num_items(modality, num_items)

    def get_data_parser(self) -> Any:
        parser = super().get_data_parser()
        if self.resizes:
            compat.convert_images(parser, self._fit)
        if self.limited:
            compat.refuse_videos(parser, self._refuse_video)
        return parser

    def get_image_size_with_most_features(self, *args: Any, **kwargs: Any) -> Any:
        if self.fitter is None or not (self.resizes or self.limited):
            return super().get_image_size_with_most_features(*args, **kwargs)
        grid, side = self.fitter.largest, self.fitter.tower.patch_size
        return compat.ImageSize(width=grid.w * side, height=grid.h * side)

    def planned_size(self, kind: str, height: int, width: int) -> tuple[int, int]:
        if kind != "image" or self.fitter is None or not self.resizes:
            return height, width
        grid, side = self.fitter.grid_for(height, width), self.fitter.tower.patch_size
        return grid.h * side, grid.w * side

    @compat.errors_for_clients
    def obeyed(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options of a request's `mm_processor_kwargs` that count.

        Raises:
            InputError: If one would cut images in another way than the encoder takes them.
        """
        if not options:
            return options
        changed = changed_size(options, compat.served_by(self.ctx.model_config).vision or {})
        if changed is not None:
            raise InputError(
                f"mm_processor_kwargs sets {changed}, which is not what the served model's vision encoder takes.",
                hint="Leave patch_size, temporal_patch_size and merge_size alone.",
            )
        return self._counting(options)

    def settle_options_of_server(self) -> None:
        """Drop the server's options that do not count. Which do is not known yet when vLLM makes this object."""
        model = self.ctx.model_config
        given = compat.processor_options(model)
        counting = self._counting(given)
        if counting != given:
            compat.set_processor_options(model, counting)
            compat.logger().warning(
                "--mm-processor-kwargs sets how pixels are normalised (%s). This has no effect: as in vLLM's own "
                "encoder, the checkpoint's processor configuration decides.",
                ", ".join(normalisation_in(given)),
            )

    def _counting(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options, of the server or a request, that vLLM's own encoder would not ignore."""
        return without_normalisation(options) if compat.normalises_itself(self.ctx.model_config) else options

    @compat.errors_for_clients
    def check_fits(self, kind: str, grid_thw: Any) -> None:
        """Refuse an item whose grid no program takes, whatever gave it that grid.

        Raises:
            UnfitGridError: If there is no fallback either.
        """
        if self.grids is None or self.grids.rest:
            return
        (grid,) = as_grids(as_numpy(grid_thw).reshape(-1, 3))
        if not any(self.grids.tower.fits(coverage, grid.frame) for coverage in self.grids.coverages):
            taken = "; ".join(map(str, self.grids.coverages))
            raise UnfitGridError(
                f"this {kind} has grid {grid}, and the encoder's programs take {taken} (height x width in patches).",
                hint="Leave the processor's size options alone, or have the server set VISIONACCEL_FIT or "
                "VISIONACCEL_FALLBACK.",
            )

    @compat.errors_for_clients
    def _fit(self, image: Any) -> Image:
        assert self.fitter is not None
        return self.fitter.fit(_as_picture(image))

    @compat.errors_for_clients
    def _refuse_video(self) -> None:
        taken = "; ".join(map(str, self.grids.coverages if self.grids is not None else ()))
        raise UnfitGridError(
            f"this server takes no videos: its vision encoder's programs take {taken} (height x width in patches).",
            hint="Have the server set VISIONACCEL_FALLBACK, or use a bundle with a dynamic program.",
        )


class FittedProcessor(compat.HookedProcessor):
    """Mixed in before a model's processor: refuses a grid that no program takes before the engine gets the request."""

    @cached_property
    def _observer(self) -> ProcessorObserver | None:
        return ProcessorObserver.wanted_by(load_settings())

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with the options of a request that vLLM's own encoder would obey, timed where that is observed.

        Raises:
            InputError: If an option would cut images in another way than the encoder takes them.
        """
        self.info.settle_options_of_server()
        inputs.hf_processor_mm_kwargs = self.info.obeyed(inputs.hf_processor_mm_kwargs)
        observer = self._observer
        if observer is None:
            return super().apply(inputs, *args, **kwargs)
        started = time.monotonic()
        result = super().apply(inputs, *args, **kwargs)
        try:
            observer.processed(started, time.monotonic() - started, result)
        except Exception:  # What is only looked at must not fail a request.
            compat.logger().exception("Timing the image processor failed.")
        return result

    def processed(self, kind: str, grid: Any) -> None:
        self.info.check_fits(kind, grid)


def _as_picture(image: Any) -> Image:
    """An image of any kind that vLLM takes, as RGB.

    Raises:
        InputError: If it is not one, or has values that are not finite.
    """
    from PIL import Image as pillow

    image = getattr(image, "media", image)  # vLLM wraps what it decoded together with the bytes
    if isinstance(image, pillow.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    try:
        pixels = as_numpy(image)
        if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8:
            pixels = _as_levels(pixels)
        return pillow.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"an image of type {type(image).__name__} cannot be read: {error}.",
            hint="Pass a PIL image, or an array of shape [height, width, 3].",
        ) from error


def _as_levels(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers of another type than uint8, which the processor takes as grey levels of 0 to 255 too.

    Raises:
        InputError: If one is not finite.
    """
    if np.iscomplexobj(pixels):
        raise TypeError("its numbers are complex")
    levels = np.asarray(pixels, dtype=np.float64)
    if not np.isfinite(levels).all():
        raise InputError(
            f"an image has {np.count_nonzero(~np.isfinite(levels))} values that are NaN or infinite.",
            hint="Pass finite grey levels of 0 to 255.",
        )
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
