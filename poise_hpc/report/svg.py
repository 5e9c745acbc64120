"""Drawing primitives: scales with round ticks, axes, marks. Pure functions, data in, markup out; pixels of a 960 wide page.

Colours, fonts and widths are classes of page.html, so that one figure serves screen, dark screen and print.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .markup import Html, cut, h

WIDTH = 960
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Values low..high to pixels start..end. `log`: by powers of ten; low and high are then positive."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._place(self.low), self._place(self.high)
        return self.start + (self._place(value) - low) / ((high - low) or 1.0) * (self.end - self.start)

    def _place(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def clip(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))

    def ticks(self, count: int = 5) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**k for k in range(first, last + 1, max(1, math.ceil((last - first + 1) / count)))]
        return round_ticks(self.low, self.high, count)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], as near to `count` of them as that allows."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / max(count, 1)))
    found = [[round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
             for step in (power, 2 * power, 5 * power, 10 * power)]
    return min(found, key=lambda ticks: (abs(len(ticks) - count), len(ticks)))


def tick_labels(ticks: Sequence[float], sign: bool = False) -> list[str]:
    """With as many decimals as tell them apart."""
    if ticks and all(t > 0 for t in ticks) and (max(ticks) >= 1e4 or min(ticks) < 1e-3):
        return [f"{t:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−") for t in ticks]
    gap = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=abs(ticks[0]) if ticks else 1.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    return [(f"{t:+.{decimals}f}" if sign and t else f"{abs(t) if not t else t:.{decimals}f}").replace("-", "−") for t in ticks]


def padded(values: Iterable[float], share: float = 0.06, floor: float = 0.0) -> tuple[float, float]:
    """Range of the finite values with some air; a range below `floor` is widened to it."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low <= floor or high == low:
        wide = floor or abs(high) * 0.2 or 1.0
        low, high = (low + high - wide) / 2, (low + high + wide) / 2
    air = (high - low) * share
    return low - air, high + air


# --- marks

def px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def label(x: float, y: float, content: Any, class_: str = "", anchor: str = "start", **more: Any) -> Html:
    return h("text", content, x=px(x), y=px(y), class_=class_ or None, text_anchor=None if anchor == "start" else anchor, **more)


def segment(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return h("path", d=f"M{px(x1)} {px(y1)}L{px(x2)} {px(y2)}", class_=class_)


def polyline(points: Iterable[Point], class_: str, step: bool = False) -> Html:
    """A line through the points, broken where one is not finite. `step`: horizontal until the next point."""
    out: list[str] = []
    pen, before = False, 0.0
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = False
            continue
        if pen and step:
            out.append(f"L{px(x)} {px(before)}")
        out.append(f"{'L' if pen else 'M'}{px(x)} {px(y)}")
        pen, before = True, y
    return h("path", d="".join(out), class_=f"line {class_}")


def mark(x: float, y: float, class_: str, title: str = "", r: float = 4.0) -> Html:
    """A dot; the title shows when the pointer rests on it."""
    return h("circle", h("title", title) if title else None, cx=px(x), cy=px(y), r=px(r), class_=class_)


def cross(x: float, y: float, class_: str, title: str = "", r: float = 3.5) -> Html:
    return h("path", h("title", title) if title else None, class_=f"line {class_}",
             d=f"M{px(x - r)} {px(y - r)}L{px(x + r)} {px(y + r)}M{px(x - r)} {px(y + r)}L{px(x + r)} {px(y - r)}")


def cloud(points: Iterable[Point], class_: str) -> Html:
    """Thousands of dots as one path; those on the same pixel are drawn once."""
    return h("path", d="".join(f"M{x} {y}h0" for x, y in sorted({(round(x), round(y)) for x, y in points})), class_=f"cloud {class_}")


def clouds(shaded: Iterable[tuple[str, Point]]) -> list[Html]:
    """A cloud for each class, in the order in which they come."""
    groups: dict[str, list[Point]] = {}
    for name, point in shaded:
        groups.setdefault(name, []).append(point)
    return [cloud(points, name) for name, points in groups.items()]


def span(scale: Scale, low: float, high: float, y: float, class_: str) -> list[Html]:
    """A horizontal interval; an end beyond the scale is an arrow head at its edge."""
    left, right = scale.clip(low), scale.clip(high)
    out = [segment(left, y, right, y, f"line {class_}")]
    for value, x, turn in ((low, left, 1), (high, right, -1)):
        beyond = value < scale.low if turn > 0 else value > scale.high
        end = f"M{px(x + 5 * turn)} {px(y - 4)}L{px(x)} {px(y)}L{px(x + 5 * turn)} {px(y + 4)}" if beyond else f"M{px(x)} {px(y - 3)}v6"
        out.append(h("path", d=end, class_=f"line {class_}"))
    return out


# --- axes and figures

def axis_x(scale: Scale, top: float, bottom: float, title: str = "", count: int = 6, sign: bool = False, upper: bool = False) -> list[Html]:
    """Grid lines, tick labels below (`upper`: above), a title at the right end of them."""
    ticks = scale.ticks(count)
    at = top - 6 if upper else bottom + 16
    out = [segment(scale(t), top, scale(t), bottom, "grid") for t in ticks]
    out += [label(scale(t), at, words, "tick", "middle") for t, words in zip(ticks, tick_labels(ticks, sign), strict=True)]
    if title:
        out.append(label((scale.start + scale.end) / 2, at - 16 if upper else at + 17, title, "axis", "middle"))
    return out


def axis_y(scale: Scale, left: float, right: float, count: int = 5, sign: bool = False) -> list[Html]:
    ticks = scale.ticks(count)
    out = [segment(left, scale(t), right, scale(t), "grid") for t in ticks]
    return out + [label(left - 7, scale(t) + 4, words, "tick", "end") for t, words in zip(ticks, tick_labels(ticks, sign), strict=True)]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places for labels, near where they are wanted and at least `gap` apart, in the same order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    at = list(wanted)
    for before, i in zip(order, order[1:], strict=False):
        at[i] = max(at[i], at[before] + gap)
    if len(order) > 1:  # what was pushed down comes back half of the way, together
        back = sum(at[i] - wanted[i] for i in order) / len(order)
        at = [a - back for a in at]
    return at


def legend(x: float, y: float, items: Sequence[tuple[str, Html]], gap: float = 22) -> list[Html]:
    """One line of (words, mark drawn at 0, 0); a character is taken for 6.3 pixels."""
    out: list[Html] = []
    for words, drawn in items:
        out += [h("g", drawn, transform=f"translate({px(x + 8)} {px(y - 4)})"), label(x + 22, y, words, "key")]
        x += 22 + 6.3 * len(words) + gap
    return out


def figure(height: float, title: str, *content: Any, caption: Any = None, name: str = "", width: float = WIDTH) -> Html:
    """A drawing with its caption. The title is what a screen reader says; `name` is the file that a browser saves it as."""
    drawing = h("svg", h("title", title), *content, viewBox=f"0 0 {px(width)} {px(height)}", role="img", aria_label=cut(title, 300),
                xmlns="http://www.w3.org/2000/svg", data_name=name or None)
    return h("figure", h("div", drawing, class_="scroll drawing", tabindex="0", role="region", aria_label=cut(title, 120)),
             h("figcaption", caption) if caption else None)
