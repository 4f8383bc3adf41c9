"""Pages that lie elsewhere in the repository, and links between them and those of `docs/`."""

import posixpath
import re
from collections.abc import Callable
from pathlib import PurePosixPath

__all__ = ["ELSEWHERE", "outside_fences", "site_links"]

ELSEWHERE = {
    "benchmarks/README.md": "benchmarks.md",
    "examples/digits_vlm/README.md": "digits-model.md",
    "examples/disaggregated/README.md": "several-machines.md",
    "plugins/bench/README.md": "bench.md",
    "plugins/flexmlrt/README.md": "backends/flexmlrt.md",
    "plugins/onnxrt/README.md": "backends/onnxrt.md",
    "plugins/openvino/README.md": "backends/openvino.md",
    "plugins/testing/README.md": "testing.md",
    "plugins/torch_ref/README.md": "backends/torch_ref.md",
}
"""Pages of the repository outside of `docs/` by their place in the site. They are read where they are."""

_FENCE = re.compile(r"^( *```.*?^ *```[ \t]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """A page with everything changed but its blocks of code."""
    return "".join(part if part.lstrip().startswith("```") else change(part) for part in _FENCE.split(markdown))


def site_links(markdown: str, source: str, page: str) -> str:
    """A page of the repository with its links as they must be in the site.

    What is in the repository but not in the site, such as a source file, keeps its text and loses its link.

    Args:
        markdown: The page.
        source: Its place in the repository, such as `plugins/onnxrt/README.md`.
        page: Its place in the site, such as `backends/onnxrt.md`.
    """

    def moved(match: re.Match[str]) -> str:
        text, link = match.groups()
        target, anchor = re.fullmatch(r"([^#]*)(#.*)?", link).groups(default="")  # type: ignore[union-attr]
        if not target or ":" in target:
            return match.group()
        place = posixpath.normpath(PurePosixPath(source).parent / target)
        if place in ELSEWHERE or f"{place}/README.md" in ELSEWHERE:
            there = ELSEWHERE.get(place) or ELSEWHERE[f"{place}/README.md"]
        elif place.startswith("docs/"):
            there = place.removeprefix("docs/")
        else:
            return text
        return f"[{text}]({posixpath.relpath(there, PurePosixPath(page).parent)}{anchor})"

    return outside_fences(markdown, lambda part: _LINK.sub(moved, part))
