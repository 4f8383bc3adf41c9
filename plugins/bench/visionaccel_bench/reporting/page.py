"""The page: its sections, and above them the summary, the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visionaccel.backends.spec import Status
from visionaccel_bench.reporting.markup import Html, chip, element, html, paragraph
from visionaccel_bench.reporting.style import STYLE

__all__ = ["Report", "Section", "worst"]

_ORDER: tuple[Status, ...] = ("failure", "warning", "pass")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing. It holds even if some text were taken for markup."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        key: Its fragment, a plain word.
        title: Its heading.
        status: The worst of what is in it.
        summary: One sentence of it.
        body: The rest.
    """

    key: str
    title: str
    status: Status
    summary: str
    body: Html


@dataclass(frozen=True, slots=True)
class Report:
    """A page.

    Attributes:
        title: Above everything.
        created: Time in ISO 8601.
        version: Of visionaccel.
        sections: In their order.
    """

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
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", self.title),
            element("style", Html(STYLE)),
        )
        about = f"Written {self.created} by visionaccel {self.version}."
        header = element("header", element("h1", self.title), paragraph(about, class_="faint"))
        footer = element("footer", paragraph("This page needs no network and runs no script."))
        main = element("main", self._summary(), *map(_shown, self.sections), footer)
        return f'<!DOCTYPE html>\n<html lang="en">{head}<body>{header}{main}</body></html>\n'

    def _summary(self) -> Html:
        ordered = sorted(self.sections, key=lambda section: _ORDER.index(section.status))
        items = [
            element(
                "li",
                chip(section.status),
                element("a", section.title, href=f"#{section.key}"),
                element("span", section.summary),
            )
            for section in ordered
        ]
        return element(
            "section",
            element("h2", "Summary", chip(self.status)),
            element("ul", *items, class_="summary"),
            id="summary",
        )


def worst(statuses: Sequence[Status]) -> Status:
    """The worst of some statuses; `pass` of none."""
    return next((status for status in _ORDER if status in statuses), "pass")


def _shown(section: Section) -> Html:
    heading = element("h2", section.title, chip(section.status))
    return element("section", heading, paragraph(section.summary), html(section.body), id=section.key)
