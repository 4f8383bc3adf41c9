"""The page: its sections, and above them the summary, the worst first.

Text becomes HTML in the template only, where Jinja2 escapes each value and the environment makes it safe to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined

from visionaccel.backends.spec import Status
from visionaccel.core.safe_text import one_line
from visionaccel_bench.tables import Table

_ORDER: tuple[Status, ...] = ("failure", "warning", "pass")


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, a paler one for a remark, or a heading within a section."""

    kind: ClassVar = "text"
    text: str
    layout: Literal["paragraph", "remark", "heading"] = "paragraph"


@dataclass(frozen=True, slots=True)
class Picture:
    """An `svg` element in which all text is escaped, and what it shows, for readers who do not see it."""

    kind: ClassVar = "picture"
    svg: str
    title: str


Block: TypeAlias = Text | Picture | Table


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its fragment, a plain word; its heading, worst status, one sentence, and the rest."""

    key: str
    title: str
    status: Status
    summary: str
    blocks: Sequence[Block] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A page. `created` is a time in ISO 8601, `version` that of visionaccel."""

    title: str
    created: str
    version: str
    sections: tuple[Section, ...]

    @property
    def status(self) -> Status:
        """The worst of all sections."""
        return worst([section.status for section in self.sections])

    def page(self) -> str:
        """The whole HTML document."""
        ordered = sorted(self.sections, key=lambda section: _ORDER.index(section.status))
        return environment().get_template("page.html").render(report=self, ordered=ordered)


@cache
def environment() -> Environment:
    """Templates in which each value is shown as one line of text, shortened where it is long, and escaped."""
    return Environment(
        loader=PackageLoader("visionaccel_bench.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def worst(statuses: Sequence[Status]) -> Status:
    """The worst of some statuses; `pass` of none."""
    return next((status for status in _ORDER if status in statuses), "pass")


def _shown(value: Any) -> Any:
    return value if hasattr(value, "__html__") else one_line(str(value))
