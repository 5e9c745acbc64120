"""HTML in which text cannot become markup: `h` escapes whatever is not `Html`, and only `h` makes `Html`.

Proposals, reflections, code and guidance are written by models and strangers. They get through as text, without control
characters and without the marks that turn the direction of writing (they can make code read otherwise than it runs).
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = frozenset({"br", "hr", "meta"})
SHAPES = frozenset({"path", "line", "circle", "rect"})
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
PAPER = re.compile(r"\barXiv:(\d{4}\.\d{4,5})(?!\d)", re.IGNORECASE)
INLINE = re.compile(r"\*\*([^*\n]+)\*\*|`([^`\n]+)`")


class Html(str):
    """Markup, made by `h` or `join`."""


def text(value: Any) -> Html:
    """Any value as text of a page or of an attribute."""
    return Html(escape(UNSEEN.sub("\ufffd", str(value).replace("\r\n", "\n"))))


def h(tag: str, *content: Any, **attributes: Any) -> Html:
    """An element. `class_` is class, `stroke_width` is stroke-width; None and False leave an attribute out, True gives it no value."""
    named = "".join(_attribute(name, value) for name, value in attributes.items() if value is not None and value is not False)
    if tag in VOID:
        return Html(f"<{tag}{named}>")
    inner = join(content)
    return Html(f"<{tag}{named}/>" if tag in SHAPES and not inner else f"<{tag}{named}>{inner}</{tag}>")


def _attribute(name: str, value: Any) -> str:
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(value)}"'


def join(content: Any, between: str = "") -> Html:
    """Content one after the other: strings are escaped, None is nothing, lists are looked into."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, Iterable) and not isinstance(content, str):
        return Html(text(between).join(filter(None, map(join, content))))
    return text(content)


def cut(value: str, most: int) -> str:
    """At most so many characters of it, on one line."""
    line = " ".join(str(value).split())
    return line if len(line) <= most else line[:most - 1] + "…"


def prose(value: str, most: int = 12000) -> Html:
    """A text of several lines: bold and code of Markdown, links to papers; everything else as it was written."""
    shown = value[:most]
    parts: list[Any] = []
    end = 0
    for match in INLINE.finditer(shown):
        parts += [linked(shown[end:match.start()]), h("strong", linked(match[1])) if match[1] else h("code", match[2])]
        end = match.end()
    parts.append(linked(shown[end:]))
    rest = h("em", f" … {len(value) - most:,} characters left out") if len(value) > most else None
    return h("div", parts, rest, class_="prose")


def linked(value: str) -> Html:
    """Text with its arXiv numbers as links: the only addresses that a report has."""
    parts: list[Any] = []
    end = 0
    for match in PAPER.finditer(value):
        parts += [value[end:match.start()], h("a", match[0], href=f"https://arxiv.org/abs/{match[1]}", rel="noreferrer")]
        end = match.end()
    return join([*parts, value[end:]])


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], caption: str = "", sortable: bool = False, class_: str = "",
          tall: bool = False) -> Html:
    """Cells are content, or `cell(...)`. A head that begins with `#` is of a column of numbers. `tall`: it scrolls within the page."""
    names = [str(name) for name in head]
    heads = [h("th", name.removeprefix("#"), scope="col", class_="number" if name.startswith("#") else None) for name in names]
    body = [h("tr", [c if isinstance(c, Html) and c.startswith("<td") else h("td", c, class_="number" if n.startswith("#") else None)
                     for c, n in zip(row, names, strict=True)]) for row in rows]
    return h("div", h("table", h("caption", caption) if caption else None, h("thead", h("tr", heads)), h("tbody", body),
                      class_=" ".join(filter(None, ("sortable" if sortable else "", class_))) or None),
             class_="scroll tall" if tall else "scroll", tabindex="0", role="region", aria_label=caption or "table")


def cell(*content: Any, order: float | str | None = None, number: bool = False, **attributes: Any) -> Html:
    """A cell of its own making. `order`: what it is sorted by."""
    return h("td", *content, class_="number" if number else None, data_order=order, **attributes)
