"""What vLLM's processor of prompts does with images: their grids, the options that apply, and the time it takes.

Images are resized to the grids that the encoder's programs take before vLLM's processor sees them, so placeholders,
positions and tokens are vLLM's for that size. If no program or fallback takes an image or video, its request is refused
here, and no other request is affected.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from visionaccel.core.arrays import as_numpy
from visionaccel.core.containment import tell
from visionaccel.core.grid import as_grids
from visionaccel.core.safe_text import safe_logger
from visionaccel.core.tower_spec import TowerSpec
from visionaccel.errors import InputError, UnfitGridError
from visionaccel.images import Fitter, as_rgb
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import architectures, engine_config
from visionaccel.integrations.vllm.compat.serving import errors_for_clients, image_size
from visionaccel.integrations.vllm.encoder_source import Grids, grids_of, served_spec
from visionaccel.integrations.vllm.published_metrics import publish
from visionaccel.observe import EncoderMetrics, TraceLog
from visionaccel.settings import Settings, load_settings

if TYPE_CHECKING:
    from PIL.Image import Image

logger = safe_logger(__name__)

_SIZES = {"patch_size": "patch", "temporal_patch_size": "temporal", "merge_size": "merge"}
"""Options that decide what a row of patches is, and their names in the tower's description."""

_LIMITS = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
"""For the smallest and the largest area: the entry of the image processor's `size`, and the option that replaces it."""

_NORMALISATION = frozenset({"do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor"})


class FittedInfo(compat.Mixin):  # type: ignore[misc]
    """A mixin for a model's processing information: it fits images to the grids that the programs take."""

    accelerated: str  # the architecture

    @cached_property
    def grids(self) -> Grids | None:
        """The grids that the encoder takes; None if it takes all grids, or prompts may contain no images and videos."""
        return grids_of(self._served, self._settings) if self._served.takes_media else None

    @property
    def limited(self) -> bool:
        """Whether there are grids that no program and no fallback takes."""
        return self.grids is not None and not self.grids.rest

    @cached_property
    def fitter(self) -> Fitter | None:
        """Resizes images; None if the encoder takes all grids."""
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
        """Whether images are resized to the programs' grids."""
        return self.grids is not None and self._settings.fit != "none"

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()
        return {kind: 0 if self.limited and kind == "video" else limit for kind, limit in limits.items()}

    @errors_for_clients()
    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items and self.limited:
            raise UnfitGridError(
                f"this server does not accept videos: its vision encoder's programs accept {self.grids} "
                "(height x width in patches).",
                hint="Set VISIONACCEL_FALLBACK on the server, or use a bundle with a dynamic program.",
            )
        super().validate_num_items(modality, num_items)

    def get_data_parser(self) -> Any:
        parser = super().get_data_parser()
        if not self.resizes:
            return parser
        parse = parser._parse_image_data

        def parse_image_data(data: Any) -> Any:
            # Embeddings, and images that the client only identifies, are left as they are.
            if data is None or isinstance(data, dict) or parser.is_embeddings(data):
                return parse(data)
            assert self.fitter is not None  # made now, as vLLM makes some parsers before it has a tokenizer
            fit = self.fitter.fit
            with errors_for_clients():
                return parse([item if item is None else fit(_as_picture(item)) for item in parse(data).data])

        parser._parse_image_data = parse_image_data
        return parser

    def get_image_size_with_most_features(self, *args: Any, **kwargs: Any) -> Any:
        # With arguments, it is about the frames of videos, which are not fitted.
        if args or kwargs or self.fitter is None or not (self.resizes or self.limited):
            return super().get_image_size_with_most_features(*args, **kwargs)
        grid, side = self.fitter.largest, self.fitter.tower.patch_size
        return image_size(width=grid.w * side, height=grid.h * side)

    def _get_vision_info(self, **kwargs: Any) -> Any:
        # Not every release passes the modality; without it, one frame is an image.
        kind = kwargs.get("modality") or ("image" if kwargs.get("num_frames", 1) == 1 else "video")
        if kind == "image" and self.fitter is not None and self.resizes:
            grid = self.fitter.grid_for(kwargs["image_height"], kwargs["image_width"])
            side = self.fitter.tower.patch_size
            kwargs |= {"image_height": grid.h * side, "image_width": grid.w * side}
        return super()._get_vision_info(**kwargs)

    @errors_for_clients()
    def obeyed(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options in a request's `mm_processor_kwargs` that apply; refuse those that change the patches."""
        if not options:
            return options
        changed = changed_size(options, self._spec)
        if changed is not None:
            raise InputError(
                f"mm_processor_kwargs sets {changed}, which does not match the served model's vision encoder.",
                hint="Leave patch_size, temporal_patch_size and merge_size alone.",
            )
        return self._applying(options)

    def settle_options_of_server(self) -> None:
        """Drop the server's options that do not apply. vLLM makes this object before that can be known."""
        model = self.ctx.model_config
        given = engine_config.processor_options(model)
        applying = self._applying(given)
        if applying != given:
            model.get_multimodal_config().mm_processor_kwargs = dict(applying)  # where processors read them
            dropped = {name for scope in _scopes(given) for name in _NORMALISATION & scope.keys()}
            compat.logger().warning(
                "--mm-processor-kwargs sets how pixels are normalised (%s). This has no effect: as with vLLM's own "
                "encoder, the checkpoint's processor configuration decides.",
                ", ".join(sorted(dropped)),
            )

    @errors_for_clients()
    def check_fits(self, kind: str, grid_thw: Any) -> None:
        """Refuse an item of a grid that no program and no fallback takes."""
        if self.grids is None or self.grids.rest:
            return
        (grid,) = as_grids(as_numpy(grid_thw).reshape(-1, 3))
        if not any(self.grids.tower.fits(coverage, grid.frame) for coverage in self.grids.coverages):
            raise UnfitGridError(
                f"this {kind} has grid {grid}, but the encoder's programs accept {self.grids} "
                "(height x width in patches).",
                hint="Leave the processor's size options alone, or set VISIONACCEL_FIT or VISIONACCEL_FALLBACK on the "
                "server.",
            )

    @cached_property
    def _settings(self) -> Settings:
        return load_settings()

    @cached_property
    def _served(self) -> engine_config.ServedModel:
        return engine_config.served_by(self.ctx.model_config)

    @cached_property
    def _spec(self) -> TowerSpec:
        return served_spec(self._served)

    def _applying(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options, of the server or a request, that vLLM's own encoder would not ignore.

        If it normalises pixels on its device, which not every model can, it only uses the checkpoint's processor
        configuration for that.
        """
        on_device = getattr(self.ctx.model_config.get_multimodal_config(), "mm_device_do_normalize", None) is not None
        can = architectures.stock_class(self.accelerated).supports_mm_device_do_normalize
        ignores = on_device and can and not engine_config.without_python_processor()
        return _without_normalisation(options) if ignores else options

    def _pixel_bounds(self) -> tuple[int, int]:
        """Return the smallest and largest area in pixels to which the processor, with the user's options, resizes."""
        size = dict(self.get_image_processor().size)
        given = engine_config.processor_options(self.ctx.model_config)
        for options in (given, given.get("images_kwargs") or {}):
            size |= {name: value for name, value in dict(options.get("size") or {}).items() if value is not None}
            size |= {entry: options[name] for entry, name in _LIMITS if options.get(name) is not None}
        least, most = (int(size[entry]) for entry, _ in _LIMITS)
        counts_frames = architectures.ARCHITECTURES[self.accelerated].limits_count_frames
        frames = self.grids.tower.spec.temporal if self.grids is not None and counts_frames else 1
        return -(-least // frames), most // frames


class FittedProcessor(compat.Mixin):  # type: ignore[misc]
    """A mixin for a model's processor: it refuses grids that no program takes, before the engine gets the request."""

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.info.settle_options_of_server()
        inputs.hf_processor_mm_kwargs = self.info.obeyed(inputs.hf_processor_mm_kwargs)
        started = time.monotonic()
        result = super().apply(inputs, *args, **kwargs)
        tell(partial(self._report, result, started, time.monotonic() - started))
        return result

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            for item in out_mm_kwargs.get(kind, ()):
                if item is not None and pixels in item:  # embeddings need no program
                    self.info.check_fits(kind, item[f"{kind}_grid_thw"].data)
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

    @cached_property
    def _observers(self) -> tuple[bool, TraceLog | None, EncoderMetrics | None]:
        """What the settings ask for: whether to log times, the timeline and the metrics."""
        settings = load_settings()
        trace = None if settings.trace is None else TraceLog.install(settings.trace)
        return settings.timing, trace, publish() if settings.metrics else None

    def _report(self, result: Mapping[str, Any], started: float, seconds: float) -> None:
        """Report how long a prompt took, if it has images or videos."""
        log, trace, metrics = self._observers
        found = result.get("mm_placeholders", {})
        places = {kind: found[kind] for kind in ("image", "video") if found.get(kind)}
        if not places:
            return
        items = {kind: len(ranges) for kind, ranges in places.items()}
        tokens = sum(int(place.length) for ranges in places.values() for place in ranges)
        if metrics is not None:
            metrics.processed(seconds)
        if trace is not None:
            what = ", ".join(f"{number} {kind}" for kind, number in items.items())
            trace.slice("processor", "processor", what, started, seconds, tokens=tokens)
        if log:
            line = {"ms": round(1e3 * seconds, 3), "items": items, "tokens": tokens}
            logger.info("visionaccel processor %s", json.dumps(line))


def changed_size(options: Mapping[str, Any], spec: TowerSpec) -> str | None:
    """Return the first option that contradicts a tower's description about the patches, as `name=value`."""
    for scope in _scopes(options):
        for name, size in _SIZES.items():
            if name in scope and scope[name] != getattr(spec, size):
                return f"{name}={scope[name]!r}"
    return None


def _without_normalisation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without those that scale and shift pixel values."""
    return {
        name: _without_normalisation(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if name not in _NORMALISATION
    }


def _scopes(options: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the options for every modality, and then each nested mapping of options for one."""
    yield options
    yield from (value for value in options.values() if isinstance(value, Mapping))


def _as_picture(image: Any) -> Image:
    """Convert any image that vLLM takes to RGB; refuse anything else, and images with non-finite values."""
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
        if pixels.dtype != np.uint8:  # the processor reads other dtypes as grey levels of 0 to 255 too
            levels = np.asarray(pixels, dtype=np.float64)
            if not np.isfinite(levels).all():
                raise InputError(
                    f"an image contains {np.count_nonzero(~np.isfinite(levels))} values that are NaN or infinite.",
                    hint="Pass finite pixel values from 0 to 255.",
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
