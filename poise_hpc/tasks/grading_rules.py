r"""Final answers in LaTeX, compared by rules: exact, instant, standard library only.

`same(gold, answer)` is True or False where the rules are sure, None where an algebra system has to look. The
normalisation follows the MATH dataset's own (Hendrycks et al. 2021, arXiv:2103.03874) and appendix D.1 of Minerva
(Lewkowycz et al. 2022, arXiv:2206.14858). Deviations: numbers are compared as exact rationals, and a wrong decimal is
only sure when it is off by more than one part in a thousand (rounding is left to the algebra system).

Callers cap the length of an answer first (`grading.MAX_ANSWER`).
"""
from __future__ import annotations

import re
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})(?:e([+-]?\d{{1,3}}))?")
_RATIO = re.compile(rf"([+-]?)(?:\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}|({_DECIMAL})/({_DECIMAL}))")
_POWER = re.compile(rf"([+-]?)(?:({_DECIMAL})(?:\\times|\\cdot))?10\^(?:\{{([+-]?\d{{1,3}})\}}|(\d))")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_CLOSE = Fraction(1, 1000)  # relative

_REWRITES = tuple((re.compile(pattern), to) for pattern, to in (
    (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\\$|\$", ""),
    (r"\{,\}", ","),
    (r"\^\{?\\circ\}?|\\degree(?![A-Za-z])", ""),
    # A unit after a number: 5\text{ cm}, 5~\mathrm{cm}^2
    (r"(?<=[\d}])(?:\\[,;:! ]|~|\s)*\\(?:text|mathrm|mbox)\{[^{}\d]*\}(?:\^\{?\d\}?)?\s*$", ""),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\\[,;:!> ]|\\q?quad(?![A-Za-z])|~|\s+", ""),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac(\d)\{", r"\\frac{\1}{"),
    (r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}"),
    (r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}"),
    (r"^[A-Za-z]=", ""),
    (r"\.$", ""),
))


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds; None if there is none, it is empty, or its brace is never closed."""
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # \{ and \} are not braces
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i].strip() or None
        i += 1
    return None


def normalise(answer: str) -> str:
    """One spelling for what is written in several."""
    for pattern, to in _REWRITES:
        answer = pattern.sub(to, answer)
    return answer


def number(text: str) -> Fraction | None:
    """The rational that a normalised answer writes: 12, -0.5, 3/4, \\frac{3}{4}, 1,234, 6.3e-10, 6.3\\times10^{-10}."""
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if m := _NUMBER.fullmatch(text):
        return _sign(m[1]) * Fraction(m[2] + (f"e{m[3]}" if m[3] else ""))
    if m := _RATIO.fullmatch(text):
        top, bottom = Fraction(m[2] or m[4]), Fraction(m[3] or m[5])
        return _sign(m[1]) * top / bottom if bottom else None
    if m := _POWER.fullmatch(text):
        return _sign(m[1]) * Fraction(m[2] or 1) * Fraction(10) ** int(m[3] or m[4])
    return None


def _sign(sign: str) -> int:
    return -1 if sign == "-" else 1


def same(gold: str, answer: str) -> bool | None:
    """Is `answer` the same as `gold`? None: the rules cannot tell."""
    a, b = normalise(gold), normalise(answer)
    if a == b:
        return True
    percent = ("%" in a) != ("%" in b)  # 50\% is both 50 (as MATH has it) and 0.5
    a, b = re.sub(r"\\?%$", "", a), re.sub(r"\\?%$", "", b)
    x, y = number(a), number(b)
    if x is None or y is None:
        return True if a == b else None
    if x == y:
        return True
    if percent or "," in a + b:         # "100,200" is a number or two
        return None
    exact = not re.search(r"[.e^]", a + b)
    return False if exact or abs(x - y) > _CLOSE * abs(x) else None
