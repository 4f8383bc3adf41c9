"""Plots are pictures."""

import pytest
from PIL import Image

from report_inputs import encode_report
from visionaccel.errors import ConfigurationError
from visionaccel_bench.drawing import plot_latency, plot_timeline
from visionaccel_bench.serve.load import Run, Trace

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


def test_labels_are_text_and_not_formulas(tmp_path):
    """A label that would be a broken formula, with a letter that the font lacks."""
    plot_timeline({"$\\frac 漢$": RUN}, tmp_path / "timeline.png", "$x_{$")
    plot_latency(encode_report(" $\\frac 漢$"), tmp_path / "latency.png")
    for name in ("timeline.png", "latency.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
