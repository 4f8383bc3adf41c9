"""Figures of matplotlib without a display, written as PNG files or as SVG inside a page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from visionaccel.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Seconds = Annotated[float, Field(ge=0, le=1e12)]
"""A figure that a picture can show, checked where a report is read from a file. The most is 30,000 years."""

_PROLOGUE = re.compile(r"^.*?(?=<svg)| xmlns(:\w+)?=\"[^\"]*\"|<style.*?</style>| id=\"[\w.]+_\d+\"", re.DOTALL)
"""What an SVG file holds and an element of a page does not: declarations, a style for all elements, repeated ids."""


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure, to be drawn and saved within the context.

    Text is shown as it is: `$` does not begin a formula, and letters that the font lacks give no warning.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "visionaccel", "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield Figure(figsize=(width, height), layout="constrained")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        ConfigurationError: If the file cannot be written.
    """
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigurationError(
            f"the picture cannot be written to {path}: {error}.", hint="Name a file in a folder that you can write to."
        ) from error


def inline_svg(figure: Figure) -> str:
    """The figure as an `svg` element for an HTML page, in which all text is escaped."""
    file = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _PROLOGUE.sub("", file.getvalue())
