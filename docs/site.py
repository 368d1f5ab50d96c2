"""Pages of the site from outside this folder: the documents in the repository's root.

README.md is the overview, CONTRIBUTING.md and CHANGELOG.md are pages, and what any page links to
outside this folder, such as an example, is copied along. So a link works on a forge, where it goes
from file to file, and on the site, where everything has this folder as its root.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(?=[)#])")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")


def on_startup(command: str, dirty: bool) -> None:
    """Let a build say only what is wrong; with --quiet, --strict would not count the warnings."""
    if command == "build":
        for handler in logging.getLogger("mkdocs").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.WARNING)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's documents, and the files outside this folder that pages link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for file in list(files.documentation_pages()):
        for target in _LINK.findall(as_on_site(file.content_string)):
            source = ROOT / target
            if source.is_file() and target not in files.src_uris and target not in PAGES:
                files.append(File.generated(config, target, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page at the site's files."""
    return as_on_site(markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drop the roles of reStructuredText, which docstrings have for editors."""
    return _ROLE.sub("", html)


def as_on_site(markdown: str) -> str:
    """Markdown whose links are relative to the site's root.

    Args:
        markdown: A document of the repository's root, or of this folder.

    Returns:
        The same with ``docs/page.md`` and ``../file`` as ``page.md`` and ``file``.
    """

    def move(link: re.Match[str]) -> str:
        path = link[1].removeprefix("../").removeprefix("docs/")
        return PAGES.get(path, path)

    return _LINK.sub(move, markdown)
