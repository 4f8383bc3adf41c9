"""What mkdocs calls while it builds the site: pages from elsewhere, tables from the package, a look at the result."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docsite.catalogue import error_catalogue, error_table
from docsite.commands import command_reference
from docsite.conformance import check_table, support_table
from docsite.links import ELSEWHERE, site_links
from docsite.tables import backend_options, backend_table, metrics_table, settings_table

ROOT = Path(__file__).parents[1]

TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings_table,
    "backends": backend_table,
    "backend options": backend_options,
    "checks": check_table,
    "commands": command_reference,
    "conformance": support_table,
    "errors": error_table,
    "metrics": metrics_table,
    "error catalogue": error_catalogue,
}
"""What takes the place of `<!-- generated: NAME -->` and of the line after it, which readers of the repository see."""

_PLACE = re.compile(r"^<!-- generated: (.+) -->\n.*$", re.MULTILINE)
_FOREIGN = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of `docs/`."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the tables and turns the repository's links into the site's."""
    place = page.file.src_uri
    source = next((source for source, there in ELSEWHERE.items() if there == place), f"docs/{place}")
    filled = _PLACE.sub(lambda match: TABLES[match[1]](), markdown)
    return site_links(filled, source, place)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuses a site that loads anything from elsewhere: it is read on machines without a network."""
    for page in Path(config.site_dir).rglob("*.html"):
        foreign = _FOREIGN.findall(page.read_text())
        if foreign:
            raise PluginError(f"{page} loads {foreign[0]} from elsewhere")
