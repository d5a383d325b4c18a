"""The site's pages are those that people read in the repository: links out of this folder get a place in the site.

`README.md` and its like become pages, and any other file that a page links to is shown under `source/`. So a link is
written once, as a path in the repository, and leads somewhere both there and in the site, which needs no server.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests read this file where MkDocs is not installed
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"

PAGES = {
    "README.md": "overview.md",
    "bench/README.md": "measurements.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages outside this folder, by their path in the repository, and where the site has them."""

COMMANDS = "commands.md"
"""Where the site has what the commands say of themselves."""

LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".txt": "text"}

CODE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)]*)?(?=\))")

FETCHED = re.compile(
    r"<(?:script|link|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|href|srcset|data)=[\"']?(?:https?:)?//[^>]*>"
    r"|(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s\"')]*",
    re.IGNORECASE,
)
"""What makes a browser ask another server for something as it shows a page; a link to follow does not."""


def links(markdown: str) -> list[re.Match[str]]:
    """The links of a page to other files, outside its code."""
    code = [match.span() for match in CODE.finditer(markdown)]
    return [found for found in LINK.finditer(markdown) if not any(a <= found.start() < b for a, b in code)]


def target(page: str, link: str) -> str:
    """The path in the repository that a page there links to."""
    return os.path.normpath(PurePosixPath(page).parent / link).replace(os.sep, "/")


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return PAGES.get(path, f"source/{path}.md")


def shown(path: str) -> str:
    """A file of the repository as the text of a page: a page as it is, anything else as code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    fence = "`" * 4  # longer than those in docstrings
    return f"# `{path}`\n\n{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def commands() -> str:
    """A page of the help of every command, as `--help` prints it on a terminal of a hundred columns."""
    from alexnet_triton.cli import _parser

    os.environ["COLUMNS"] = "100"
    parts = ["# Command line\n\nWhat `alexnet-triton COMMAND --help` prints.\n"]
    unread = [(1, _parser())]
    while unread:
        level, parser = unread.pop()
        if level > 1:
            parts.append(f"{'#' * level} {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
        families = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        unread += [(level + 1, child) for family in families for child in reversed(family.choices.values())]
    return "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what those link to, as pages."""
    from mkdocs.structure.files import File

    texts = {f"{DOCS}/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    texts |= {path: shown(path) for path in PAGES if (ROOT / path).is_file()}
    unread = list(texts)
    while unread:
        page = unread.pop()
        for found in links(texts[page]):
            path = target(page, found["path"])
            if path not in texts and not path.startswith(f"{DOCS}/") and (ROOT / path).is_file():
                texts[path] = shown(path)
                unread.append(path)
    for path, text in texts.items():
        if not path.startswith(f"{DOCS}/"):
            files.append(File.generated(config, site_path(path), content=text))
    files.append(File.generated(config, COMMANDS, content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Let links lead to where the site has the files."""
    own = page.file.src_uri
    inside = {site_path(path): path for path in PAGES}
    source = own.removeprefix("source/").removesuffix(".md") if own.startswith("source/") else f"{DOCS}/{own}"
    source = inside.get(own, source)
    parts, end = [], 0
    for found in links(markdown):
        to = os.path.relpath(site_path(target(source, found["path"])), PurePosixPath(own).parent).replace(os.sep, "/")
        parts += [markdown[end : found.start()], to, found["anchor"] or ""]
        end = found.end()
    return "".join([*parts, markdown[end:]])


def on_post_page(output: str, page: Page, config: Any) -> str:
    """Warn, which ends a strict build, of whatever a browser would fetch from elsewhere."""
    for found in FETCHED.findall(output):
        logging.getLogger("mkdocs.hooks").warning("%s makes a browser fetch %s", page.file.src_uri, found)
    return output
