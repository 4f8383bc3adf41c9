"""The timeline is a picture."""

import pytest
from PIL import Image

from visionaccel.errors import ConfigurationError
from visionaccel_bench.serve.figures import Run, Trace
from visionaccel_bench.serve.serve_plot import plot_timeline

RUN = Run(
    (
        Trace("image 0", "image", 0.5, (1.5, 1.6), 2),
        Trace("text 0", "text", 0.0, (0.1, 0.15, 0.9, 1.0), 4),
        Trace("image 1", "image", 0.6, (2.5,), 1),
    ),
    ((1.0, 0.2),),
)


def test_a_timeline_is_a_png(tmp_path):
    path = tmp_path / "timeline.png"
    plot_timeline({"stock": RUN, "pipelined": RUN}, path, "Text and images")
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 800
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(85, 168, 104), (208, 208, 208)} <= colours, "bars of waiting and answered images"


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        plot_timeline({"stock": RUN}, tmp_path, "a folder")
