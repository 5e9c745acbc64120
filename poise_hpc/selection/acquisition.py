"""Lineage prioritization: which archived entry becomes the next parent.

    U(d) = (w_p U_pareto + w_f U_perf + w_v U_div + w_g alpha_GP) / (1 + pending children of d)

POISE, arXiv:2603.23951. The paper leaves the weights and every normalization open; ours, each term in [0, 1]:
U_pareto, U_perf, U_div as in `features`, on lower bounds of what a score is worth (`shrinkage`), so that a lucky seed does not win; alpha_GP is
mean + beta sd of a Gaussian process over an entry's features whose target is the discounted top-K descendant gain
(`descendants`), rescaled over the pool. Its prior mean is 0: without evidence, children are expected to be like
their parent. A pending child is a descendant whose gain is what the process predicts now (constant liar), and divides
the whole (after local penalization, Gonzalez et al. 2016, arXiv:1505.08052): sd alone rarely moves the choice.

Length and cost count in U_pareto alone, and only where a directive names them; cost is measured time, so that the
choice then depends on the machine.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..config import Acquisition
from ..types import BASELINE_ID, EntrySummary, PoiseError, candidate_number
from . import features, gp
from .columns import Columns, in_order
from .descendants import Lineage, lineage
from .features import Table

Strategy = Literal["poise", "greedy", "random", "islands"]
TERMS = ("pareto", "performance", "diversity", "descendant")  # keys of a pick's table, and of their weights in the config
SHOWN = 5          # candidates in a pick's table
FRONT_OF = 1024    # best entries among which the pool's Pareto front is looked for
LENGTH = 2.0       # length scale: entries differ by a few units, in five groups of features, each of variance 1
TUNE_FROM = 8      # entries with descendants from which on it is fitted
TUNE_ON = 64       # of them that it is fitted on: a likelihood costs their number cubed


@dataclass(frozen=True)
class Pick:
    """A chosen parent and why. `terms`: the best few, JSON-able."""

    parent: str
    terms: list[dict[str, Any]]
    explanation: str


def choose_parent(entries: Sequence[EntrySummary], pending: Sequence[tuple[str, tuple[str, ...]]], settings: Acquisition,
                  rng: np.random.Generator, strategy: Strategy = "poise", barred: frozenset[str] = frozenset(),
                  objectives: Sequence[str] = ()) -> Pick:
    """The next parent among the scored entries. The order of `entries` does not matter; ties go to the older one.

    `pending`: (id, parents) of candidates that are proposed and not archived. `barred`: entries that are evidence, but
    no parents. `objectives`: of `features.OBJECTIVES`, beside the benchmarks in U_pareto ("poise" only).
    """
    ordered, read = in_order(entries)
    scored = Table.of(ordered, read)
    allowed = np.flatnonzero(~np.isin(read.number[scored.rows], [candidate_number(id) for id in barred]))
    if not allowed.size:
        raise PoiseError(f"no parent can be chosen: none of the {len(ordered)} archived entries has a score and no veto")
    table = scored.take(allowed)
    match strategy:
        case "poise":
            return _poise(ordered, read, scored, allowed, pending, settings, rng, objectives)
        case "greedy":
            best = int(np.argmax(table.lower))
            return Pick(table.entry(best).id, [], f"greedy: best lower confidence bound, {table.lower[best]:.1f} points")
        case "random":
            return Pick(table.entry(int(rng.integers(len(table)))).id, [], f"random: one of {len(table)} scored entries")
        case "islands":
            return _islands(ordered, table, rng)
    raise PoiseError(f"unknown selection strategy {strategy!r}; known: poise, greedy, random, islands")


def _poise(ordered: Sequence[EntrySummary], read: Columns, table: Table, allowed: np.ndarray, pending: Sequence[tuple[str, tuple[str, ...]]],
           settings: Acquisition, rng: np.random.Generator, objectives: Sequence[str]) -> Pick:
    lower = np.full(len(ordered), np.nan)
    lower[table.rows] = table.lower
    own, ended = lower.copy(), np.isfinite(read.behind)  # what a rung has ended is no parent, but a child that says something of its parent
    lower[ended] = lower[read.number == candidate_number(BASELINE_ID)] + read.behind[ended]
    family = lineage(read, lower, own, settings.discount, settings.top_k)

    able = table.take(allowed)
    members = able.take(pool(able, family.gain[able.rows], settings.pool, rng))
    family = Lineage(*(column[members.rows] for column in (family.gain, family.depth, family.children, family.failed)))
    waiting, entries = np.zeros(len(members), int), members.entries
    place = {e.id: i for i, e in enumerate(entries)}
    for _, parents in pending:
        for p in set(parents) & place.keys():
            waiting[place[p]] += 1

    mean, sd = predict_gain(members, family, waiting)
    ucb = mean + settings.ucb_beta * sd
    terms = {
        "pareto": features.pareto_strength(np.concatenate([members.benchmarks(), members.objectives(objectives)], axis=1)),
        "performance": features.normalized(members.lower, members.noise),
        "diversity": features.diversity(members),
        "descendant": (ucb - ucb.min()) / max(np.ptp(ucb), members.noise),
    }
    weighted = sum(getattr(settings, name) * terms[name] for name in TERMS)
    total = weighted / (1 + waiting)
    order = np.lexsort((np.arange(len(total)), -total.round(9)))  # rounded: a last-bit difference is a tie
    shown = [{"id": entries[i].id, "name": entries[i].name, "total": round(float(total[i]), 4),
              **{name: round(float(term[i]), 4) for name, term in terms.items()},
              "overall": round(float(members.overall[i]), 3), "value": round(float(members.value[i]), 3), "lower": round(float(members.lower[i]), 3),
              "gain": round(float(mean[i]), 3), "gain_sd": round(float(sd[i]), 3), "pending": int(waiting[i])} for i in order[:SHOWN]]
    return Pick(shown[0]["id"], shown, _explain(shown, settings, len(members), len(table), bool(np.isfinite(family.gain).any())))


def pool(table: Table, gain: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Rows to compare, in order: all, or `size`: a fifth each of the best lower bounds, the Pareto front (of the
    FRONT_OF best), the largest descendant gains and the newest, the rest drawn at random."""
    if len(table) <= size:
        return np.arange(len(table))
    share = max(size // 5, 1)
    best = np.argsort(-table.lower, kind="stable")[:FRONT_OF]
    front = best[features.pareto_front(table.take(best).benchmarks(), share)]
    fertile = np.argsort(-np.nan_to_num(gain, nan=-np.inf), kind="stable")[:share]
    chosen = np.unique(np.concatenate([best[:share], front, fertile, np.arange(len(table) - share, len(table))]))[:size]
    left = np.ones(len(table), bool)
    left[chosen] = False
    others = np.flatnonzero(left)
    return np.sort(np.concatenate([chosen, rng.choice(others, size - len(chosen), replace=False)]))


def predict_gain(table: Table, family: Lineage, waiting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) mean and sd, in points, of each entry's descendant gain. Without any descendant: 0, and the noise."""
    known = np.flatnonzero(np.isfinite(family.gain))
    if not known.size:
        return np.zeros(len(table)), np.full(len(table), table.noise)
    x, y = _inputs(table, family), family.gain[known]
    scale = max(float(np.sqrt((y**2).mean())), table.noise)
    noise = np.maximum((table.error[known] / scale) ** 2, 1e-2)
    given, length = (x[known], y / scale, noise), LENGTH
    if known.size >= TUNE_FROM:
        some = np.linspace(0, known.size - 1, min(known.size, TUNE_ON)).astype(int)
        length = gp.likeliest_length(*(column[some] for column in given))
    liars = np.flatnonzero(waiting)
    if liars.size:
        lies = x[liars], gp.regress(*given, length, x[liars])[0], ((table.noise / scale) ** 2 + 1e-2) / waiting[liars]
        given = tuple(np.concatenate(both) for both in zip(given, lies, strict=True))
    mean, sd = gp.regress(*given, length, x)
    return mean * scale, sd * scale


def _inputs(table: Table, family: Lineage) -> np.ndarray:
    """(N, F) what the process sees of an entry: five groups of features, each of mean square about 1."""
    groups = [table.lower[:, None], table.benchmarks(), table.mechanisms(), table.behaviour(),
              np.stack([family.depth, np.log1p(family.children), family.failed / np.maximum(family.children, 1)], axis=1)]
    return np.concatenate([features.standardized(g) / np.sqrt(max(g.shape[1], 1)) for g in groups], axis=1)


def _islands(ordered: Sequence[EntrySummary], table: Table, rng: np.random.Generator) -> Pick:
    """An island is the line of one first-generation entry; islands are drawn evenly, their members by rank (1/r)."""
    home: dict[str, str] = {}  # entry -> founder of its line
    roots = set()
    for e in ordered:
        known = [p for p in e.parents if p in home]
        if not known:
            roots.add(e.id)
        home[e.id] = home[known[0]] if known and known[0] not in roots else e.id
    islands: dict[str, list[int]] = {}
    entries = table.entries
    for i in np.argsort(-table.lower, kind="stable"):
        islands.setdefault(home[entries[i].id], []).append(int(i))
    founder = sorted(islands, key=candidate_number)[int(rng.integers(len(islands)))]
    weight = 1.0 / np.arange(1, len(islands[founder]) + 1)
    rank = int(rng.choice(len(weight), p=weight / weight.sum()))
    return Pick(entries[islands[founder][rank]].id, [],
                f"islands: the line of {founder} (one of {len(islands)}), rank {rank + 1} of {len(weight)} in it")


def _explain(shown: list[dict[str, Any]], settings: Acquisition, compared: int, scored: int, informed: bool) -> str:
    """The sum as it was made: weight x term, over the pending children."""
    first = shown[0]
    notes = {"performance": f" ({first['overall']:.1f} points, worth {first['value']:.1f} by its seeds' noise, parents and children, "
                            f"lower bound {first['lower']:.1f})",
             "descendant": f" (expected gain {first['gain']:+.1f} +- {first['gain_sd']:.1f})"}
    weighted = " + ".join(f"{getattr(settings, name):g} x {name} {first[name]:.2f}{notes.get(name, '')}" for name in TERMS)
    text = (f"{first['id']} {first['name']}: total {first['total']:.2f} = [{weighted}] / (1 + {first['pending']} pending children). "
            f"Compared {compared} of {scored} scored entries.")
    if not informed:
        text += " No entry has a scored descendant yet: the descendant term is the same for all."
    if len(shown) > 1:
        text += f" Next: {shown[1]['id']} {shown[1]['name']} with {shown[1]['total']:.2f}."
    return text
