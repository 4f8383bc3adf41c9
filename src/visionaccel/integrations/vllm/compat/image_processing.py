"""The multi-modal processor's insides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from visionaccel.errors import InputError
from visionaccel.integrations.vllm.compat.architectures import Architecture

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


def with_planned_size(given: Mapping[str, Any], plan: Callable[[int, int], tuple[int, int]]) -> dict[str, Any]:
    """Arguments of `_get_vision_info`, with the height and width in pixels that `plan` gives an image."""
    # Releases differ in whether they pass the modality; without it, one frame is an image.
    if (given.get("modality") or ("image" if given.get("num_frames", 1) == 1 else "video")) != "image":
        return dict(given)
    height, width = plan(given["image_height"], given["image_width"])
    return {**given, "image_height": height, "image_width": width}


def item_grids(processed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`image` or `video` and the (t, h, w) of each processed item that has pixels; embeddings need no program."""
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        for item in processed.get(kind, ()):
            if item is not None and pixels in item:
                yield kind, item[f"{kind}_grid_thw"].data


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
