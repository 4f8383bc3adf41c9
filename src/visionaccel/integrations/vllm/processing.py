"""What vLLM's processor of prompts does with images: their grids, the options that count, and the time it takes.

Images are resized to the grids that the encoder's programs take before vLLM's processor sees them, so placeholders,
positions and tokens are vLLM's for that size. An image or video that no program takes is refused here, with its request
alone, unless a fallback takes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from visionaccel.core.arrays import as_numpy
from visionaccel.core.grid import as_grids
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import InputError, UnfitGridError
from visionaccel.images import Fitter, as_rgb
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import engine_config
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES
from visionaccel.integrations.vllm.compat.multimodal import REFUSAL, ImageSize
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

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _errors_for_clients(check: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorate a check of a request, so that an `InputError` that it raises is also a validation error of vLLM's.

    The API server answers that with 400 and its text; for any other ValueError, a later vLLM may not.
    """

    @wraps(check)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return check(*args, **kwargs)
        except InputError as error:
            kind = type(error)
            if not isinstance(error, REFUSAL):
                kind = type(kind.__name__, (kind, REFUSAL), {"parameter": None, "value": None})
            raise kind(error.message, hint=error.hint) from error

    return checked


class FittedInfo(compat.Mixin):  # type: ignore[misc]
    """Mixed in before a model's processing information: fits images to the grids that the programs take."""

    @cached_property
    def grids(self) -> Grids | None:
        """Which grids the encoder takes; None where it takes every one, or prompts may hold no media."""
        return grids_of(self._served, self._settings) if self._served.takes_media else None

    @property
    def limited(self) -> bool:
        """Some grid fits no program, and no other backend takes it."""
        return self.grids is not None and not self.grids.rest

    @cached_property
    def fitter(self) -> Fitter | None:
        """What resizes images; None where every grid is taken."""
        grids = self.grids
        if grids is None:
            return None
        least, most = self._pixel_bounds()
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

    @_errors_for_clients
    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items and self.limited:
            raise UnfitGridError(
                f"this server takes no videos: its vision encoder's programs take {self.grids} "
                "(height x width in patches).",
                hint="Have the server set VISIONACCEL_FALLBACK, or use a bundle with a dynamic program.",
            )
        super().validate_num_items(modality, num_items)

    def get_data_parser(self) -> Any:
        parser = super().get_data_parser()
        if not self.resizes:
            return parser
        parse = parser._parse_image_data

        def parse_image_data(data: Any) -> Any:
            # Embeddings, and images that are known by their identifier, pass as they are.
            if data is None or isinstance(data, dict) or parser.is_embeddings(data):
                return parse(data)
            return parse([item if item is None else self._fit(item) for item in parse(data).data])

        parser._parse_image_data = parse_image_data
        return parser

    def get_image_size_with_most_features(self, *args: Any, **kwargs: Any) -> Any:
        if self.fitter is None or not (self.resizes or self.limited):
            return super().get_image_size_with_most_features(*args, **kwargs)
        grid, side = self.fitter.largest, self.fitter.tower.patch_size
        return ImageSize(width=grid.w * side, height=grid.h * side)

    def _get_vision_info(self, **kwargs: Any) -> Any:
        # Releases differ in whether they pass the modality; without it, one frame is an image.
        kind = kwargs.get("modality") or ("image" if kwargs.get("num_frames", 1) == 1 else "video")
        if kind == "image" and self.fitter is not None and self.resizes:
            grid = self.fitter.grid_for(kwargs["image_height"], kwargs["image_width"])
            side = self.fitter.tower.patch_size
            kwargs |= {"image_height": grid.h * side, "image_width": grid.w * side}
        return super()._get_vision_info(**kwargs)

    @_errors_for_clients
    def obeyed(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options of a request's `mm_processor_kwargs` that count; refuses other patches than the encoder takes."""
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
            model.get_multimodal_config().mm_processor_kwargs = dict(counting)  # where processors take them from
            dropped = {name for scope in _scopes(given) for name in _NORMALISATION & scope.keys()}
            compat.logger().warning(
                "--mm-processor-kwargs sets how pixels are normalised (%s). This has no effect: as in vLLM's own "
                "encoder, the checkpoint's processor configuration decides.",
                ", ".join(sorted(dropped)),
            )

    @_errors_for_clients
    def check_fits(self, kind: str, grid_thw: Any) -> None:
        """Refuse an item whose grid no program takes, if there is no fallback."""
        if self.grids is None or self.grids.rest:
            return
        (grid,) = as_grids(as_numpy(grid_thw).reshape(-1, 3))
        if not any(self.grids.tower.fits(coverage, grid.frame) for coverage in self.grids.coverages):
            raise UnfitGridError(
                f"this {kind} has grid {grid}, and the encoder's programs take {self.grids} "
                "(height x width in patches).",
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
        """The options, of the server or a request, that vLLM's own encoder would not ignore.

        It may normalise pixels on its device, by the checkpoint's processor configuration alone.
        """
        on_device = getattr(self.ctx.model_config.get_multimodal_config(), "mm_device_do_normalize", None) is not None
        ignores = on_device and not engine_config.without_python_processor()
        return _without_normalisation(options) if ignores else options

    def _pixel_bounds(self) -> tuple[int, int]:
        """Smallest and largest area in pixels that the processor gives an image, the user's options included."""
        limits = ARCHITECTURES[self._served.replaces or ""].pixel_limits
        size = dict(self.get_image_processor().size)
        given = engine_config.processor_options(self.ctx.model_config)
        for options in (given, given.get("images_kwargs") or {}):
            size |= {name: value for name, value in dict(options.get("size") or {}).items() if value is not None}
            size |= {entry: options[name] for entry, name in limits if options.get(name) is not None}
        least, most = (int(size[entry]) for entry, _ in limits)
        return least, most

    @_errors_for_clients
    def _fit(self, image: Any) -> Image:
        assert self.fitter is not None
        return self.fitter.fit(_as_picture(image))


class FittedProcessor(compat.Mixin):  # type: ignore[misc]
    """Mixed in before a model's processor: refuses a grid that no program takes before the engine gets the request."""

    @cached_property
    def _timing(self) -> _Timing:
        return _Timing(load_settings())

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.info.settle_options_of_server()
        inputs.hf_processor_mm_kwargs = self.info.obeyed(inputs.hf_processor_mm_kwargs)
        started = time.monotonic()
        result = super().apply(inputs, *args, **kwargs)
        self._timing.note(result, started, time.monotonic() - started)
        return result

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            for item in out_mm_kwargs.get(kind, ()):
                if item is not None and pixels in item:  # embeddings need no program
                    self.info.check_fits(kind, item[f"{kind}_grid_thw"].data)
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)


def changed_size(options: Mapping[str, Any], vision: Mapping[str, Any]) -> str | None:
    """The first option that would cut images in another way than a vision configuration says, as `name=value`."""
    for scope in _scopes(options):
        for name, size in _SIZES.items():
            if name in scope and size in vision and scope[name] != vision[size]:
                return f"{name}={scope[name]!r}"
    return None


def _without_normalisation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that scale and shift pixel values."""
    return {
        name: _without_normalisation(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if name not in _NORMALISATION
    }


def _scopes(options: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Options for every modality, and those of one, which are in a nested mapping."""
    yield options
    yield from (value for value in options.values() if isinstance(value, Mapping))


class _Timing:
    """Reports how long a prompt with images took, where the settings want that: log, timeline and metrics."""

    def __init__(self, settings: Settings) -> None:
        self._log = settings.timing
        self._trace = None if settings.trace is None else TraceLog.install(settings.trace)
        self._metrics = publish() if settings.metrics else None

    def note(self, result: Any, started: float, seconds: float) -> None:
        """Report one prompt as vLLM's processor returned it, begun at `started` on the monotonic clock."""
        try:
            self._note(result.get("mm_placeholders", {}), started, seconds)
        except Exception:  # a report must not fail a request
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
    """An image of any kind that vLLM takes, as RGB; refused if it is not one, or has values that are not finite."""
    from PIL import Image as pillow

    image = getattr(image, "media", image)  # vLLM wraps what it decoded together with the bytes
    if isinstance(image, pillow.Image):
        return as_rgb(image)
    try:
        pixels = as_numpy(image)
        if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
            pixels = pixels.transpose(1, 2, 0)
        if np.iscomplexobj(pixels):
            raise TypeError("its numbers are complex")
        if pixels.dtype != np.uint8:  # the processor takes other numbers as grey levels of 0 to 255 too
            levels = np.asarray(pixels, dtype=np.float64)
            if not np.isfinite(levels).all():
                raise InputError(
                    f"an image has {np.count_nonzero(~np.isfinite(levels))} values that are NaN or infinite.",
                    hint="Pass finite grey levels of 0 to 255.",
                )
            pixels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        return pillow.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"an image of type {type(image).__name__} cannot be read: {error}.",
            hint="Pass a PIL image, or an array of shape [height, width, 3].",
        ) from error
