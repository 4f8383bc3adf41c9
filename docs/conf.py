"""Sphinx builds the site from the repository's pages, each read where it is: `make docs`."""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

project = "visionaccel"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = ["docs/**.md", "plugins/*/README.md", "examples/*/README.md", "benchmarks/README.md"]
exclude_patterns = [".*", "cpp", "dist", "src", "tests", "tools"]

html_theme = "furo"
html_title = "visionaccel"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

myst_heading_anchors = 3
default_role = "literal"  # docstrings are written in Markdown's way
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False

CONTENTS = {
    "Use it": [
        "quick-start", "vllm", "pipelined", "ways-into-vllm", "/examples/disaggregated/README",
        "/examples/embeds_client/README", "transformers", "dynamo", "python", "trust", "observe", "compatibility",
        "matrix", "bundles", "troubleshooting",
    ],
    "Hardware": ["ryzen-ai", "vitisai", "intel", "simulated"],
    "Backends": [
        "backends/index", "/plugins/onnxrt/README", "/plugins/openvino/README", "/plugins/flexmlrt/README",
        "/plugins/torch_ref/README", "backends/options",
    ],
    "Measure": ["/plugins/bench/README", "bench-encode", "bench-serve", "report", "/benchmarks/README"],
    "Understand and extend": [
        "how-it-works", "towers", "security", "writing-a-backend", "adding-a-family",
        "/examples/third_party_family/README", "conformance", "/plugins/testing/README", "/examples/digits_vlm/README",
        "contributing",
    ],
    "Reference": [
        "settings", "cli", "errors", "api/index", "api/encoder", "api/service", "api/transformers", "api/backends",
        "api/programs", "api/towers", "api/bundles", "api/errors",
    ],
}  # fmt: skip
"""The pages in the site's order, by heading."""

FOREIGN = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def add_contents(_: Sphinx, page: str, source: list[str]) -> None:
    """Append the contents to the first page. They are not written there because other readers would see the markup."""
    if page == root_doc:
        for heading, pages in CONTENTS.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {heading}", "", *pages, "```", ""])


def refuse_foreign(app: Sphinx, _: Exception | None) -> None:
    """Refuse a site that loads anything from elsewhere: it is read on machines without a network."""
    for page in Path(app.outdir).rglob("*.html"):
        if found := FOREIGN.search(page.read_text()):
            raise ExtensionError(f"{page} loads {found[1]} from elsewhere")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", refuse_foreign)
