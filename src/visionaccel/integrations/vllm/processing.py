"""What vLLM's processor of prompts does with images: their grids, the options that count, and the time it takes.

Images get the grids that the encoder's programs take before vLLM's processor sees them: placeholders, positions and
tokens are all vLLM's own for the size that the image then has. An image or video that no program takes is refused here,
with its request alone, unless a fallback takes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import as_numpy
from visionaccel.core.grid import as_grids
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import InputError, UnfitGridError
from visionaccel.images import Fitter
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import engine_config, image_processing
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES
from visionaccel.integrations.vllm.encoder_source import Grids, grids_of
from visionaccel.integrations.vllm.published_metrics import publish
from visionaccel.observe import TraceLog
from visionaccel.settings import Settings, load_settings

if TYPE_CHECKING:
    from PIL.Image import Image

logger = safe_logger(__name__)

_TIMING_PREFIX = "visionaccel processor "
"""What a timing line of the processor starts with; a JSON object follows."""

_SIZES = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
"""Options that decide what a row of patches is, and what the vision configuration calls them."""

_NORMALISATION = frozenset({"do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor"})


class FittedInfo(compat.Mixin):  # type: ignore[misc]
    """Mixed in before a model's processing information: fits images to the grids that the programs take."""

    @cached_property
    def grids(self) -> Grids | None:
        """Which grids the encoder takes; None where it takes every one, and where prompts may hold no media."""
        return grids_of(self._served, self._settings) if self._served.takes_media else None

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
        row = ARCHITECTURES[self._served.replaces or ""]
        least, most = image_processing.pixel_bounds(self, row)
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
            image_processing.convert_images(parser, self._fit)
        if self.limited:
            image_processing.refuse_videos(parser, self._refuse_video)
        return parser

    def get_image_size_with_most_features(self, *args: Any, **kwargs: Any) -> Any:
        if self.fitter is None or not (self.resizes or self.limited):
            return super().get_image_size_with_most_features(*args, **kwargs)
        grid, side = self.fitter.largest, self.fitter.tower.patch_size
        return compat.ImageSize(width=grid.w * side, height=grid.h * side)

    def _get_vision_info(self, **kwargs: Any) -> Any:
        return super()._get_vision_info(**image_processing.with_planned_size(kwargs, self._planned_size))

    @image_processing.errors_for_clients
    def obeyed(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options of a request's `mm_processor_kwargs` that count.

        Raises:
            InputError: If one would cut images in another way than the encoder takes them.
        """
        if not options:
            return options
        changed = changed_size(options, self._served.vision or {})
        if changed is not None:
            raise InputError(
                f"mm_processor_kwargs sets {changed}, which is not what the served model's vision encoder takes.",
                hint="Leave patch_size, temporal_patch_size and merge_size alone.",
            )
        return self._counting(options)

    def settle_options_of_server(self) -> None:
        """Drop the server's options that do not count. Which do is not known yet when vLLM makes this object."""
        model = self.ctx.model_config
        given = engine_config.processor_options(model)
        counting = self._counting(given)
        if counting != given:
            engine_config.set_processor_options(model, counting)
            compat.logger().warning(
                "--mm-processor-kwargs sets how pixels are normalised (%s). This has no effect: as in vLLM's own "
                "encoder, the checkpoint's processor configuration decides.",
                ", ".join(_normalisation_in(given)),
            )

    @image_processing.errors_for_clients
    def check_fits(self, kind: str, grid_thw: Any) -> None:
        """Refuse an item whose grid no program takes.

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

    @cached_property
    def _settings(self) -> Settings:
        return load_settings()

    @cached_property
    def _served(self) -> engine_config.ServedModel:
        return engine_config.served_by(self.ctx.model_config)

    def _counting(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options, of the server or a request, that vLLM's own encoder would not ignore."""
        return _without_normalisation(options) if engine_config.normalises_itself(self.ctx.model_config) else options

    def _planned_size(self, height: int, width: int) -> tuple[int, int]:
        if self.fitter is None or not self.resizes:
            return height, width
        grid, side = self.fitter.grid_for(height, width), self.fitter.tower.patch_size
        return grid.h * side, grid.w * side

    @image_processing.errors_for_clients
    def _fit(self, image: Any) -> Image:
        assert self.fitter is not None
        return self.fitter.fit(_as_picture(image))

    @image_processing.errors_for_clients
    def _refuse_video(self) -> None:
        taken = "; ".join(map(str, self.grids.coverages if self.grids is not None else ()))
        raise UnfitGridError(
            f"this server takes no videos: its vision encoder's programs take {taken} (height x width in patches).",
            hint="Have the server set VISIONACCEL_FALLBACK, or use a bundle with a dynamic program.",
        )


class FittedProcessor(compat.Mixin):  # type: ignore[misc]
    """Mixed in before a model's processor: refuses a grid that no program takes before the engine gets the request."""

    @cached_property
    def _timing(self) -> _Timing:
        return _Timing(load_settings())

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with the options of a request that vLLM's own encoder would obey.

        Raises:
            InputError: If an option would cut images in another way than the encoder takes them.
        """
        self.info.settle_options_of_server()
        inputs.hf_processor_mm_kwargs = self.info.obeyed(inputs.hf_processor_mm_kwargs)
        started = time.monotonic()
        result = super().apply(inputs, *args, **kwargs)
        self._timing.note(result, started, time.monotonic() - started)
        return result

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        for kind, grid in image_processing.item_grids(out_mm_kwargs):
            self.info.check_fits(kind, grid)
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)


def changed_size(options: Mapping[str, Any], vision: Mapping[str, Any]) -> str | None:
    """The first option that would cut images in another way than the vision encoder takes them, as `name=value`.

    Args:
        options: Options, and those of one modality in a mapping of their own.
        vision: The vision tower's configuration.
    """
    for scope in _scopes(options):
        for name, size in _SIZES.items():
            if name in scope and size in vision and scope[name] != vision[size]:
                return f"{name}={scope[name]!r}"
    return None


def _without_normalisation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that scale and shift pixel values.

    vLLM's own encoder does that on its device, by the checkpoint's processor configuration alone, and ignores these,
    whether the server or a request sets them.
    """
    kept = {name: value for name, value in options.items() if name not in _NORMALISATION}
    return {
        name: _without_normalisation(value) if isinstance(value, Mapping) else value for name, value in kept.items()
    }


def _normalisation_in(options: Mapping[str, Any]) -> list[str]:
    """Names of the options that scale and shift pixel values."""
    return sorted({name for scope in _scopes(options) for name in _NORMALISATION & scope.keys()})


def _scopes(options: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield options
    yield from (value for value in options.values() if isinstance(value, Mapping))


class _Timing:
    """Shows how long a prompt with images took where the settings want that: the log, the timeline and the metrics."""

    def __init__(self, settings: Settings) -> None:
        self._log = settings.timing
        self._trace = None if settings.trace is None else TraceLog.install(settings.trace)
        self._metrics = publish() if settings.metrics else None

    def note(self, result: Any, started: float, seconds: float) -> None:
        """One prompt as vLLM's processor returned it, begun at `started` on the clock of `time.monotonic`."""
        try:
            if self._log or self._trace is not None or self._metrics is not None:
                self._note(result.get("mm_placeholders", {}), started, seconds)
        except Exception:  # What is only looked at must not fail a request.
            compat.logger().exception("Timing the image processor failed.")

    def _note(self, places: Mapping[str, Any], started: float, seconds: float) -> None:
        items = {kind: len(ranges) for kind, ranges in places.items() if ranges}
        if not items:
            return
        tokens = sum(int(place.length) for ranges in places.values() for place in ranges)
        if self._metrics is not None:
            self._metrics.processed(seconds)
        if self._trace is not None:
            what = ", ".join(f"{number} {kind}" for kind, number in items.items())
            self._trace.slice("processor", "processor", what, started, seconds, tokens=tokens)
        if self._log:
            line = {"ms": round(1e3 * seconds, 3), "items": items, "tokens": tokens}
            logger.info("%s%s", _TIMING_PREFIX, json.dumps(line))


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
