"""A Markdown page as one HTML document that asks nothing of the network."""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from ocnopt.experiments.errors import InputError

__all__ = ["html_page"]

# Figures have white backgrounds: in the dark they stand on a white card, a little dimmed. A table
# that is wider than the text may use the margins before it scrolls.
_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #59636e; --rule: #d1d9e0;
  --back: #ffffff; --code: #f2f4f6; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #d6dbe0; --faint: #9198a1; --rule: #3d444d; --back: #15191f; --code: #232931;
    --link: #6cb0f5; }
  img { background: #ffffff; padding: 0.5rem; border-radius: 0.4rem; filter: brightness(0.88); }
}
* { box-sizing: border-box; }
body { max-width: 54rem; margin: 0 auto; padding: 2rem 1.2rem 4rem; background: var(--back);
  color: var(--text); line-height: 1.55; overflow-wrap: break-word;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1, h2, h3 { line-height: 1.25; margin: 1.8em 0 0.6em; }
h1 { font-size: 1.7rem; margin-top: 0; }
h2 { font-size: 1.25rem; }
h3 { font-size: 1.05rem; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: 0.88em; background: var(--code); border-radius: 0.25rem; }
code { padding: 0.1em 0.3em; }
pre { padding: 0.8rem 1rem; overflow-x: auto; }
pre code { padding: 0; background: none; font-size: 1em; }
blockquote { margin: 1em 0; padding-left: 1rem; border-left: 3px solid var(--rule);
  color: var(--faint); }
img { display: block; max-width: 100%; height: auto; margin: 1.2rem auto; }
.table { overflow-x: auto; margin: 1.2rem 0; width: max-content; min-width: 100%;
  max-width: calc(100vw - 3rem); position: relative; left: 50%; transform: translateX(-50%); }
table { border-collapse: collapse; font-size: 0.88rem; line-height: 1.4; }
th, td { max-width: 18rem; padding: 0.35rem 0.7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { vertical-align: bottom; border-bottom-width: 2px; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { max-width: none; white-space: nowrap; }
@media print { body { max-width: none; padding: 0; } }
""".strip()

# What a browser may load: the pictures and the style inside the document, and nothing else.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/svg+xml", "image/webp")
_NUMBER = re.compile(r"(?<![A-Za-z_])[-+~<>]*\d[\d.,]*(?:e[-+]?\d+)?")
#: What may stand around numbers in a column of them.
_FILLER = re.compile(r"\b(?:of|to|inf|nan|ms|s|x|MiB|GiB)\b|[\s()/;:,%+<>~±\u00d7.-]")
#: Cells longer than this are read as text even where all of it is numbers: they have to wrap.
_LONG = 32


def html_page(markdown: str, folder: Path) -> str:
    """Turn a Markdown page into one HTML document, pictures and style included.

    CommonMark and tables; HTML within the page is shown as it is written, not obeyed. Columns that
    hold numbers alone are aligned right. Links to Markdown files beside the page lead to their
    .html; a picture from the web becomes a link to it, as nothing is fetched.

    Args:
        markdown: The page.
        folder: Where its pictures are: their paths are relative to it.

    Returns:
        The document.

    Raises:
        InputError: A picture cannot be read, or is no PNG, JPEG, GIF, SVG or WebP file.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _open_table)
    parser.add_render_rule("table_close", _close_table)
    tokens = parser.parse(markdown)
    title = _name_headings(tokens)
    _align(tokens)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                _embed(child, folder)
            elif child.type == "link_open":
                child.attrSet("href", _to_html(str(child.attrGet("href") or "")))
    body = parser.renderer.render(tokens, parser.options, {})
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{html.escape(title or 'ocnopt')}</title>",
            f"<style>\n{_STYLE}\n</style>",
            "</head>",
            "<body>",
            body.rstrip(),
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(token: Token) -> str:
    """What a reader sees of an inline token."""
    parts = []
    for child in token.children or ():
        if child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        elif child.type in ("text", "code_inline", "image"):
            parts.append(child.content)
    return "".join(parts)


def _name_headings(tokens: Sequence[Token]) -> str:
    """Give every heading an id that links can name; return the first one's text."""
    title = ""
    taken: dict[str, int] = {}
    for token, inside in pairwise(tokens):
        if token.type != "heading_open":
            continue
        text = _text(inside)
        title = title or text
        # As GitHub does, so that one link serves both.
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        taken[name] = taken.get(name, -1) + 1
        token.attrSet("id", f"{name}-{taken[name]}" if taken[name] else name)
    return title


# pictures and links


def _embed(token: Token, folder: Path) -> None:
    """Put a picture's bytes where its path was."""
    source = str(token.attrGet("src") or "")
    if source.startswith("data:"):
        return
    parts = urlsplit(source)
    if parts.scheme or parts.netloc:
        alt = html.escape(token.content or source)
        token.type, token.children = "html_inline", None
        token.content = f'<a href="{html.escape(source)}">{alt}</a>'
        return
    path = folder / unquote(parts.path)
    kind, _ = mimetypes.guess_type(path.name)
    if kind not in _IMAGES:
        raise InputError(f"the page shows {source!r}, which is no picture that can be embedded")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the page shows {source!r}, but {path} cannot be read: {error.strerror or error}"
        ) from None
    token.attrSet("src", f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _to_html(target: str) -> str:
    """The link, or that to the HTML file where it is a Markdown file beside the page."""
    parts = urlsplit(target)
    name = parts.path.removeprefix("./")
    if parts.scheme or parts.netloc or "/" in name or not name.endswith(".md"):
        return target
    return parts._replace(path=name.removesuffix(".md") + ".html").geturl()


# tables


def _open_table(
    self: object, tokens: Sequence[Token], index: int, options: object, env: object
) -> str:
    return '<div class="table">\n<table>\n'


def _close_table(
    self: object, tokens: Sequence[Token], index: int, options: object, env: object
) -> str:
    return "</table>\n</div>\n"


def _align(tokens: Sequence[Token]) -> None:
    """Mark the cells of columns that hold numbers, unless the page aligns them itself."""
    rows: list[list[tuple[Token, str]]] = []
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append((token, _text(tokens[i + 1])))
        elif token.type == "table_close":
            _mark(rows)


def _mark(rows: list[list[tuple[Token, str]]]) -> None:
    head, *body = rows
    for column in range(len(head)):
        cells = [row[column][1].strip() for row in body if column < len(row)]
        if not _numeric(cells):
            continue
        for row in rows:
            token = row[column][0]
            if token.attrGet("style") is None:
                token.attrSet("class", "number")


def _numeric(cells: Sequence[str]) -> bool:
    """Whether all cells are numbers or empty, and some are not empty."""
    if any(len(cell) > _LONG for cell in cells):
        return False
    bare = [_FILLER.sub("", _NUMBER.sub("", cell)) for cell in cells]
    return not any(bare) and any(_NUMBER.search(cell) for cell in cells)
