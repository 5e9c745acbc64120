"""Training curves of a candidate beside the baseline's: the mean over seeds, and each seed."""
from __future__ import annotations

import warnings

import numpy as np

from ..entry import Entry
from ..types import BASELINE_ID
from . import svg
from .gather import Findings
from .markup import Html, cut, h
from .words import note, section

PANELS = {  # curve -> what a panel is called, with its unit
    "reward": "Reward of a step, mean", "acc": "Accuracy in training, share", "entropy": "Entropy, nats a token",
    "kl_old": "KL to the sampling policy, nats", "kl_ref": "KL to the start model, nats", "gradient_norm": "Gradient norm",
    "length": "Length, tokens", "clip_fraction": "Clip fraction, share", "valid": "Valid completions, share"}
SPIKY = ("kl_old", "kl_ref", "gradient_norm")   # on a logarithmic axis where they span a hundredfold
POINTS = 120      # of a line; longer runs are averaged in as many equal stretches
W, H, COLUMNS = 320, 176, 3


def training(f: Findings) -> Html:
    """The winner beside the baseline."""
    title = "Training curves"
    entry, base = (f.records.get(f.winner.id) if f.winner else None), f.records.get(BASELINE_ID)
    if entry is None and base is None:
        return section("curves", title, h("p", "No training run is archived yet."))
    entry = entry or base
    assert entry is not None
    what = f", the best candidate, beside {f.label}." if entry.id != BASELINE_ID else "."
    return section("curves", title, h("p", f"{entry.id} {cut(entry.name, 60)}", what),
                   figure(f, entry, base), note("Every detailed candidate has the same figure in its section."))


def figure(f: Findings, entry: Entry, base: Entry | None, seeds_of_base: bool = True) -> Html | None:
    """First the evaluations, then what training itself measured, one panel each. None without a curve."""
    base = base if base is not None and base.id != entry.id else None
    panels = [_evaluation(entry, base), *(_training(name, entry, base, seeds_of_base) for name in PANELS if name in entry.curve_names)]
    drawn = [p for p in panels if p is not None]
    if not drawn:
        return None
    keys = [(f"{entry.id}, mean of {len(entry.seeds)} seeds" if len(entry.seeds) != 1 else f"{entry.id}, one seed", "mine"),
            *([("its seeds", "mine one")] if len(entry.seeds) > 1 else []),
            *([(f"{cut(f.label, 24)}, mean" + (" and seeds" if seeds_of_base and len(base.seeds) > 1 else ""), "theirs")] if base else [])]
    placed = [h("g", p, transform=f"translate({W * (i % COLUMNS)} {34 + H * (i // COLUMNS)})") for i, p in enumerate(drawn)]
    long = max(len(entry.curve_steps), len(base.curve_steps) if base else 0) > POINTS
    caption = "Horizontal: training step; in the first panel, percent of training." + (f" Shown are means over {POINTS} equal stretches." if long else "")
    return svg.figure(34 + H * ((len(drawn) + COLUMNS - 1) // COLUMNS), f"Training curves of {entry.id}" + (f" and {BASELINE_ID}" if base else ""),
                      svg.legend(8, 16, [(words, svg.segment(-8, 0, 8, 0, f"line {c}")) for words, c in keys]), placed, name=f"curves-{entry.id}",
                      caption=caption)


def _evaluation(entry: Entry, base: Entry | None) -> list[Html] | None:
    """Overall on the evaluation prompts at each point; None of a candidate without a score."""
    curves = [(e, sorted((100 * float(at), v) for at, v in e.score["curve"].items())) for e in (base, entry) if e and e.score]
    if entry.score is None:
        return None
    x, y = svg.Scale(0, 100, 48, W - 12), svg.Scale(*svg.padded([v for _, c in curves for _, v in c], floor=2.0), H - 34, 24)
    out = [*_frame(x, y, "Overall in evaluation, points")]
    for e, c in curves:
        name = "mine" if e is entry else "theirs"
        out.append(svg.polyline([(x(a), y(v)) for a, v in c], name))
        out += [svg.mark(x(a), y(v), f"point {name}", f"{e.id} at {a:g} %: {v:.1f}", 2.6) for a, v in c]
    return out


def _training(name: str, entry: Entry, base: Entry | None, seeds_of_base: bool) -> list[Html] | None:
    mine, theirs = _values(entry, name), _values(base, name) if base else None
    drawn = [v for v in (theirs, mine) if v is not None and np.isfinite(v).any()]
    if not drawn or mine is None:
        return None
    means = [(c, _mean(v), v) for c, v in (("theirs", theirs), ("mine", mine)) if v is not None and np.isfinite(v).any()]
    shown = [m for _, m, _ in means] + [v for c, _, v in means if c == "mine" or seeds_of_base]
    flat = np.concatenate([s.ravel() for s in shown])
    flat = flat[np.isfinite(flat)]
    log = name in SPIKY and bool((flat > 0).all()) and flat.max() > 100 * flat.min()
    low, high = (flat.min() / 1.3, flat.max() * 1.3) if log else svg.padded(flat.tolist())
    steps = max(len(e.curve_steps) for e in (entry, base) if e)
    x, y = svg.Scale(0, max(steps - 1, 1), 48, W - 12), svg.Scale(float(low), float(high), H - 34, 24, log)
    out = _frame(x, y, PANELS[name] + (" (log)" if log else ""))
    for c, mean, values in means:
        if len(values) > 1 and (c == "mine" or seeds_of_base):
            out += [_line(seed, x, y, f"{c} one") for seed in values]
    return out + [_line(mean, x, y, c) for c, mean, _ in means]


def _frame(x: svg.Scale, y: svg.Scale, title: str) -> list[Html]:
    return [*svg.axis_y(y, x.start, x.end, 4), *svg.axis_x(x, y.end, y.start, count=4), svg.label(x.start, 14, title, "axis strong")]


def _values(entry: Entry, name: str) -> np.ndarray | None:
    """(S, T)"""
    return entry.curve_values[:, entry.curve_names.index(name), :] if name in entry.curve_names else None


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the rows that have a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step that no seed has is NaN, and says so by a gap
        return np.nanmean(values, axis=0)


def _line(values: np.ndarray, x: svg.Scale, y: svg.Scale, class_: str) -> Html:
    """Place t of `values` is step t. Long ones as means of POINTS stretches."""
    at = np.arange(len(values), dtype=float)
    if len(values) > POINTS:
        cuts = np.linspace(0, len(values), POINTS + 1).astype(int)
        at, values = (np.array([_mean(v[a:b][None].T)[0] for a, b in zip(cuts, cuts[1:], strict=False)]) for v in (at, values))
    return svg.polyline([(x(t), y(v) if np.isfinite(v) else float("nan")) for t, v in zip(at.tolist(), values.tolist(), strict=True)], class_)
