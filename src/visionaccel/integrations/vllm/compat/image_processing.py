"""The multi-modal processor's insides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from visionaccel.errors import InputError
from visionaccel.integrations.vllm.compat import Mixin
from visionaccel.integrations.vllm.compat.architectures import Architecture

__all__ = ["HookedInfo", "HookedProcessor", "convert_images", "errors_for_clients", "pixel_bounds", "refuse_videos"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def errors_for_clients(check: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorate what looks at a request: an `InputError` that it raises is a validation error of vLLM's as well.

    The API server answers that with 400 and its text. Other kinds of ValueError it does so only until all of vLLM's
    errors are of its own kinds.
    """

    @functools.wraps(check)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return check(*args, **kwargs)
        except InputError as error:
            raise _for_clients(type(error))(error.message, hint=error.hint) from error

    return checked


def _for_clients(kind: type[InputError]) -> type[InputError]:
    theirs = getattr(import_module("vllm.exceptions"), "VLLMValidationError", None)
    if theirs is None or issubclass(kind, theirs):
        return kind
    return type(kind.__name__, (kind, theirs), {"parameter": None, "value": None})


class HookedInfo(Mixin):  # type: ignore[misc]
    """Mixed in before a model's processing information: asks for the size that vLLM is to plan an image with."""

    def planned_size(self, kind: str, height: int, width: int) -> tuple[int, int]:  # noqa: ARG002
        """Height and width in pixels that the processor gets of an `image` or `video` of that size in the prompt."""
        return height, width

    def _get_vision_info(self, **kwargs: Any) -> Any:
        # Releases differ in whether they pass the modality; without it, one frame is an image.
        kind = kwargs.get("modality") or ("image" if kwargs.get("num_frames", 1) == 1 else "video")
        height, width = self.planned_size(kind, kwargs["image_height"], kwargs["image_width"])
        return super()._get_vision_info(**{**kwargs, "image_height": height, "image_width": width})


class HookedProcessor(Mixin):  # type: ignore[misc]
    """Mixed in before a model's processor: shows each processed image and video before the engine gets it."""

    def processed(self, kind: str, grid: Any) -> None:
        """Called for each `image` and `video` that has pixels, with its (t, h, w)."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            for item in out_mm_kwargs.get(kind, ()):
                if item is not None and pixels in item:  # what comes as embeddings needs no program
                    self.processed(kind, item[f"{kind}_grid_thw"].data)
        updates: Sequence[Any] = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return updates


def pixel_bounds(info: Any, row: Architecture) -> tuple[int, int]:
    """Smallest and largest area in pixels that a model's processor gives an image, the user's options included."""
    size = dict(info.get_image_processor().size)
    given = info.ctx.get_mm_config().mm_processor_kwargs or {}
    for options in (given, given.get("images_kwargs") or {}):
        size |= {name: value for name, value in dict(options.get("size") or {}).items() if value is not None}
        size |= {entry: options[name] for entry, name in row.pixel_limits if options.get(name) is not None}
    least, most = (int(size[entry]) for entry, _ in row.pixel_limits)
    return least, most


def convert_images(parser: Any, convert: Callable[[Any], Any]) -> None:
    """Have a data parser convert each image; embeddings and images known by their identifier pass as they are."""
    parse = parser._parse_image_data

    def parse_image_data(data: Any) -> Any:
        if data is None or isinstance(data, dict) or parser.is_embeddings(data):
            return parse(data)
        items = parse(data)
        return parse([item if item is None else convert(item) for item in items.data])

    parser._parse_image_data = parse_image_data


def refuse_videos(parser: Any, refuse: Callable[[], None]) -> None:
    """Have a data parser call `refuse`, which raises, for each prompt with a video."""
    parse = parser._parse_video_data

    def parse_video_data(data: Any) -> Any:
        if data is not None and not isinstance(data, dict) and not parser.is_embeddings(data) and len(data):
            refuse()
        return parse(data)

    parser._parse_video_data = parse_video_data
