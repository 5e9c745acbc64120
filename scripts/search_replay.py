#!/usr/bin/env python3
"""Does it matter how parents are chosen? Selection strategies, replayed on a table of real lab results.

    .venv/bin/python scripts/search_replay.py docs/data/search_stress.json [--json]      the table: scripts/search_table.py

The table is searched again and again instead of the lab: a strategy names a parent, and the child is a row that was not
evaluated yet, as far from the parent as the offline proposer's children are from theirs. Two things are therefore not in the
figures: what a proposer learns from the archive, and whatever the table does not hold. Of a search, the baseline's evaluation
not counted:

    evaluations   until one of the best 2 % is evaluated. The best are so by the scores that the search sees, luck and all
    held out      one seed is kept from the search; its score, in points, of the row that leads by the others after 20, 40, 60 evaluations

Strategies are compared search by search, with the same random numbers. Rows that compute the same as an older one are left out.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise_hpc import stats, views
from poise_hpc.config import Acquisition, Search
from poise_hpc.selection.acquisition import Strategy, choose_parent
from poise_hpc.types import BASELINE_ID, candidate_id

sys.path.insert(0, str(Path(__file__).parent))

from search_table import Table  # noqa: E402

AFTER = (20, 40, 60)  # evaluations at which the leader's held-out seed is looked at
WINDOW, PER_PARENT = Search().width(slots=1), Search().per_parent  # as a campaign has them by default
Interval = Callable[[Sequence[float]], tuple[float, tuple[float, float] | None]]
# (pareto, performance, diversity, descendant, ucb_beta) that tuning chooses from; the default is among them
GRID = ((1, 1, 0.5, 1, 1), (0, 1, 0, 1, 1), (0, 1, 0.5, 1, 1), (1, 1, 0.5, 2, 1), (1, 1, 0.5, 1, 3), (1, 1, 2, 1, 1), (0, 0, 0, 1, 1), (0, 1, 1, 0, 1),
        (0, 1, 0, 0, 1))


# --- a search on it

def search(table: Table, rows: np.ndarray, strategy: Strategy | None, settings: Acquisition, rng: np.random.Generator) -> Iterator[int]:
    """Rows in the order in which this strategy evaluates them, the baseline left out. None: no parents, an even draw."""
    left = list(rows[1:])
    if strategy is None:
        yield from (int(r) for r in rng.permutation(left))
        return
    done, born = [int(rows[0])], [table.entry(int(rows[0]), BASELINE_ID, ())]
    parent = 0
    while left:
        number = len(done)
        visible = max(1, number - WINDOW + 1)
        if (number - 1) % PER_PARENT == 0:
            pending = [(e.id, e.parents) for e in born[visible:]]
            parent = int(choose_parent(born[:visible], pending, settings, rng, strategy).parent[1:])
        off = np.abs(table.apart[done[parent], left] - rng.choice(table.steps))
        row = int(rng.choice(np.array(left)[off == off.min()]))
        left.remove(row)
        done.append(row)
        born.append(table.entry(row, candidate_id(number), (candidate_id(parent),)))
        yield row


def evaluations(table: Table, rows: np.ndarray, strategy: Strategy | None, settings: Acquisition, rng: np.random.Generator) -> int:
    """Until one of the best 2 % of `rows` is evaluated."""
    targets = table.targets(rows)
    return next(i for i, row in enumerate(search(table, rows, strategy, settings, rng), 1) if row in targets)


def mean_evaluations(table: Table, rows: np.ndarray, strategy: Strategy | None, settings: Acquisition, replays: int, seed: Sequence[int]) -> float:
    return float(np.mean([evaluations(table, rows, strategy, settings, np.random.default_rng([*seed, i])) for i in range(replays)]))


def held_out(table: Table, strategy: Strategy | None, settings: Acquisition, replays: int) -> np.ndarray:
    """(seeds, replays, AFTER) points: the seed that the search did not see, of the row that leads by those that it saw."""
    everything, out = np.arange(len(table.rows)), []
    for number, seed in enumerate(sorted(table.rows[0]["by_seed"])):
        seen = table.without(seed)
        kept = np.array([r["by_seed"].get(seed, 0.0) for r in table.rows])
        for i in range(replays):
            order = np.array([row for row, _ in zip(search(seen, everything, strategy, settings, np.random.default_rng([number, i])), range(AFTER[-1]))])
            out.append([kept[order[:n][np.argmax(seen.truth[order[:n]])]] for n in AFTER])
    return np.array(out).reshape(-1, replays, len(AFTER))


def weights(values: Sequence[float]) -> Acquisition:
    return Acquisition(**dict(zip(("pareto", "performance", "diversity", "descendant", "ucb_beta"), values, strict=True)))


STRATEGIES: dict[str, tuple[Strategy | None, Acquisition]] = {
    "poise": ("poise", Acquisition()),
    "poise without the GP term": ("poise", Acquisition(descendant=0.0)),
    "the GP term alone": ("poise", Acquisition(pareto=0.0, performance=0.0, diversity=0.0)),
    "greedy": ("greedy", Acquisition()),
    "islands": ("islands", Acquisition()),
    "random parents": ("random", Acquisition()),
    "no parents": (None, Acquisition()),
}


def split(table: Table, seed: int, replays: int, tuning: int) -> dict[str, float]:
    """Mean evaluations on one half, for every strategy; "poise, tuned" has the weights that were best on the other."""
    tune_on, report_on = table.half(np.random.default_rng([seed, 0]))
    found = {w: mean_evaluations(table, tune_on, "poise", weights(w), tuning, [seed, 1]) for w in GRID}
    best = min(GRID, key=lambda w: found[w])
    out = {name: mean_evaluations(table, report_on, *how, replays, [seed, 2]) for name, how in STRATEGIES.items()}
    return out | {"poise, tuned": mean_evaluations(table, report_on, "poise", weights(best), replays, [seed, 2])}


def reliability(table: Table) -> dict[str, Any]:
    """How far the table's ranking can be trusted, and whether near rows have near scores: without that nothing can be searched."""
    scored = [i for i, r in enumerate(table.rows) if len(r["by_seed"]) > 1]
    y = np.array([list(table.rows[i]["by_seed"].values()) for i in scored])
    noise = float(y.var(axis=1, ddof=1).mean() / y.shape[1])
    spread = float(y.mean(axis=1).var(ddof=1))
    apart, score = table.apart[np.ix_(scored, scored)], table.truth[scored]
    pairs = {}
    for d in (1, 2, 3, 4):
        a, b = np.nonzero(np.triu(apart == d, 1))
        if len(a) > 2:
            pairs[d] = round(float(((score[a] - score.mean()) * (score[b] - score.mean())).mean() / score.var()), 2)
    return {"rows": len(table.rows), "failed": len(table.rows) - int(np.isfinite(table.truth).sum()), "sd": spread**0.5, "seed_error": noise**0.5,
            "reliability": 1 - noise / spread, "correlation_by_distance": pairs, "child_distance": np.bincount(table.steps).tolist()}


def over_searches(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and interval over the searches' chance: this table, other random numbers."""
    return stats.mean_interval(values)


def over_tables(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean, and an interval over the rows' chance: another table. `values`: of random half tables, which overlap, so that their mean is
    not the surer the more there are. Their spread itself is the standard error (half-sample bootstrap; Shao & Wu 1989)."""
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return mean, (mean - half, mean + half)


def compared(samples: dict[str, Sequence[float]], interval: Interval) -> list[dict[str, Any]]:
    out = []
    for name, values in samples.items():
        mean, ci = interval(values)
        row = {"strategy": name, "evaluations": mean, "ci": ci}
        for other, key in (("random parents", "against_random"), ("poise", "against_poise")):
            row[key], row[f"{key}_ci"] = interval(np.array(values) - np.array(samples[other]))
        out.append(row)
    return sorted(out, key=lambda r: r["evaluations"])


def held_out_rows(samples: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Per strategy and number of evaluations: the points, what poise has more, and that by held-out seed."""
    out = []
    for name, points in samples.items():
        ahead = samples["poise"] - points
        out.append({"strategy": name, "after": [
            {"evaluations": n, "points": over_searches(points[:, :, k].ravel())[0], "poise_ahead": over_searches(ahead[:, :, k].ravel())[0],
             "poise_ahead_ci": over_searches(ahead[:, :, k].ravel())[1], "by_seed": ahead[:, :, k].mean(axis=1).tolist()} for k, n in enumerate(AFTER)]})
    return sorted(out, key=lambda r: -r["after"][1]["points"])


def replay(table: Table, splits: int, replays: int, tuning: int, progress: bool) -> dict[str, Any]:
    everything = np.arange(len(table.rows))
    whole, held = {}, {}
    for name, how in STRATEGIES.items():
        whole[name] = [evaluations(table, everything, *how, np.random.default_rng([9, i])) for i in range(2 * replays)]
        held[name] = held_out(table, *how, replays)
        say(progress, f"whole table: {name} {np.mean(whole[name]):.1f}; held out {np.round(held[name].mean(axis=(0, 1)), 2)}")
    halves = []
    for s in range(splits):
        halves.append(split(table, s, replays, tuning))
        say(progress, f"split {s + 1}/{splits}: " + ", ".join(f"{k} {v:.1f}" for k, v in halves[-1].items()))
    return {"table": reliability(table), "whole": compared(whole, over_searches), "held_out": held_out_rows(held),
            "halves": compared({k: [h[k] for h in halves] for k in halves[0]}, over_tables) if halves else [],
            "splits": splits, "replays": replays, "targets": [len(table.targets(everything)), len(table.targets(everything[: len(everything) // 2]))]}


def say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def markdown(result: dict[str, Any]) -> str:
    t, lines = result["table"], []
    lines.append(f"{t['rows']} rows ({t['failed']} failed); sd of Overall between rows {t['sd']:.1f} points, standard error of a row {t['seed_error']:.1f}, "
                 f"reliability {t['reliability']:.2f}. Correlation of rows by distance: {t['correlation_by_distance']}.")
    for title, what in (("Whole table, default weights; intervals over searches", "whole"), (f"Half tables, {result['splits']} splits; intervals over tables", "halves")):
        if result[what]:
            lines += ["", f"{title}:", "", "| strategy | evaluations | against random parents | against poise |", "|---|---|---|---|"]
            lines += [f"| {r['strategy']} | {views.interval(r['evaluations'], r['ci'])} | "
                      f"{views.interval(r['against_random'], r['against_random_ci'], sign=True)} | "
                      f"{views.interval(r['against_poise'], r['against_poise_ci'], sign=True)} |" for r in result[what]]
    lines += ["", "Held-out seed of the leader, points; what poise has more, with its interval over searches and (by held-out seed):", "",
              "| strategy | " + " | ".join(f"after {n} | poise ahead" for n in AFTER) + " |", "|---" * (1 + 2 * len(AFTER)) + "|"]
    lines += [f"| {r['strategy']} | " + " | ".join(
        f"{a['points']:.2f} | {a['poise_ahead']:+.2f} [{a['poise_ahead_ci'][0]:.2f}, {a['poise_ahead_ci'][1]:.2f}] ({', '.join(f'{x:+.1f}' for x in a['by_seed'])})"
        for a in r["after"]) + " |" for r in result["held_out"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--splits", type=int, default=10, help="halvings of the table: tuned on one half, reported on the other")
    parser.add_argument("--replays", type=int, default=50, help="searches per strategy and half, and per held-out seed; twice as many on the whole table")
    parser.add_argument("--tuning", type=int, default=20, help="searches per weights while tuning")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = replay(Table.read(args.file), args.splits, args.replays, args.tuning, progress=not args.json)
    print(json.dumps(result, indent=1) if args.json else markdown(result))


if __name__ == "__main__":
    main()
