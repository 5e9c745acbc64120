#!/usr/bin/env python3
"""What would screening have saved, and what would it have cost? Rungs, replayed on a table of whole learning curves.

    .venv/bin/python scripts/screen_table.py make archive_store/whole docs/data/search_stress.json && poise-hpc run archive_store/whole
    .venv/bin/python scripts/screen_table.py export archive_store/whole docs/data/screen_stress.json
    .venv/bin/python scripts/screen_table.py replay docs/data/screen_stress.json [--json]

`make` is a campaign without screening: recipes of another table (scripts/search_table.py), the best, the worst and evenly over the ranks
between, in random order, so that one that was broken off is a sample, too. `replay` judges every row by the rules of poise_hpc/screening.py as if its training had been stopped there, with each order of the
training seeds (a rung takes the first ones). Run time is training steps, and `--startup` a job; the truth is a row's Overall over
all seeds and points. It is measured on the same seeds as the rungs are, so it is kind to them: read the losses as lower bounds.
[a, b]: 95 %, rows drawn again with replacement.
"""
from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from poise_hpc import archive, files, orders, screening
from poise_hpc import config as configuration
from poise_hpc.agent import recipe
from poise_hpc.agent.render import render
from poise_hpc.archive import ArchiveView
from poise_hpc.campaign import Campaign
from poise_hpc.config import Config, Rung
from poise_hpc.evaluation import metrics
from poise_hpc.settings import overlay
from poise_hpc.types import BASELINE_ID, START

BEST = 3           # rows that ought to survive
RESAMPLES = 1000


def below(at: float, seeds: int = 1, margin: float = 0.0) -> Rung:
    return Rung(at=at, seeds=seeds, margin=margin)


def behind(at: float, seeds: int, confidence: float, margin: float = 0.0) -> Rung:
    return Rung(at=at, seeds=seeds, rule="behind", confidence=confidence, margin=margin)


PLANS: dict[str, tuple[Rung, ...]] = {
    "below start, 25 %, 1 seed": (below(0.25),),
    "below start, 50 %, 1 seed": (below(0.5),),
    "behind, 25 %, 1 seed": (behind(0.25, 1, 0.5),),
    "behind, 25 %, 2 seeds": (behind(0.25, 2, 0.5),),
    **{f"behind{f' by {m:g}' if m else ''}, 50 %, {n} seed{'s' * (n > 1)}": (behind(0.5, n, 0.5, m),) for n in (1, 2) for m in (0.0, 1.0, 2.0, 4.0)},
    **{f"behind, {100 * c:.0f} % sure, 50 %, 2 seeds": (behind(0.5, 2, c),) for c in (0.8, 0.9)},
    "below start, 25 %, 1 seed; behind by 1, 50 %, 2 seeds": (below(0.25), behind(0.5, 2, 0.5, 1.0)),
    "behind by 2, 50 %, 1 seed; behind by 1, 50 %, 2 seeds": (behind(0.5, 1, 0.5, 2.0), behind(0.5, 2, 0.5, 1.0)),
}


# --- the table

def make(root: Path, table: Path, config_file: Path, count: int, seeds: int, cache: Path) -> Campaign:
    rows = [r for r in json.loads(table.read_text())["rows"] if r["by_seed"] and r["proposer"] == "offline"]
    ranked = sorted(rows, key=lambda r: -np.mean(list(r["by_seed"].values())))
    change = {"search": {"candidates": 0, "train_seeds": list(range(seeds))}, "screen": {"rungs": []}}
    config = configuration.parse(overlay(configuration.load(config_file).dump(), change))
    cache.mkdir(parents=True, exist_ok=True)
    opened, packages = Campaign.create(root, config, cache_dir=str(cache)), root.with_name(root.name + "-packages")
    for i in np.random.default_rng(0).permutation(count):
        row = ranked[round(i * (len(ranked) - 1) / (count - 1))]
        folder = packages / row["id"]
        folder.mkdir(parents=True)
        (folder / "algorithm.py").write_text(render(recipe.make(row["recipe"]["parts"].values(), row["recipe"]["knobs"]), row["name"]))
        files.write_json(folder / "proposal.json", {"name": row["name"]})
        orders.package(opened, folder, parent=BASELINE_ID)
    return opened


def export(campaign: Campaign) -> dict[str, Any]:
    """Overall of every row at every point with every seed, of the records' evaluation tables."""
    rows, start = [], None
    for e in ArchiveView.load(campaign.root).entries:
        if e.score is None:
            continue
        points: dict[str, dict[str, float]] = defaultdict(dict)
        table = archive.read(campaign.records / f"{e.id}.h5").evaluations
        for seed, at in sorted({(int(r["seed"]), float(r["at"])) for r in table}):
            part = table[(table["seed"] == seed) & (table["at"] == at)]
            points[f"{at:g}"][str(seed)] = round(overall(part, campaign.config), 4)
        start = points.pop(START, {}).get(str(campaign.config.search.train_seeds[0]), start)
        rows.append({"id": e.id, "name": e.name, "run_seconds": round(e.run_seconds, 1), "points": points})
    return {"config": campaign.config.dump(), "start": start, "rows": rows}


def overall(table: np.ndarray, config: Config) -> float:
    elements = []
    for name in config.evaluate.benchmarks:
        part = table[table["benchmark"] == name.encode()]
        columns = {k: part[k].tolist() for k in ("correct", "valid", "truncated", "mean_length")}
        elements.append({"at": START, "benchmark": name, "n": int(part["n"][0]), **columns})
    return metrics.merge(elements, config.evaluate.benchmarks)["final"]


@dataclass(frozen=True)
class Table:
    config: Config
    start: float
    rows: list[dict[str, Any]]  # the baseline first
    startup: float = 0.0        # of a job, as a share of what a seed's whole training takes: a promotion costs one a seed

    @classmethod
    def read(cls, path: Path, startup: float) -> Table:
        data = json.loads(path.read_text())
        return cls(configuration.parse(data["config"]), data["start"], data["rows"], startup)

    @cached_property
    def truth(self) -> np.ndarray:
        """(N,) Overall of the rows without the baseline, points."""
        return np.array([self.score(r) for r in self.rows[1:]])

    @staticmethod
    def score(row: dict[str, Any]) -> float:
        return float(np.mean([list(seeds.values()) for seeds in row["points"].values()]))

    def run(self, row: dict[str, Any], rungs: Sequence[Rung], seeds: Sequence[str]) -> tuple[bool, float]:
        """(did it pass, what it has cost as a share of a training without rungs) with the seeds in this order."""
        came, starts, whole = dict.fromkeys(seeds, 0.0), 0, len(seeds) * (1 + self.startup)
        for rung in rungs:
            used, at = seeds[:rung.seeds], f"{rung.at:g}"
            starts += sum(came[s] < rung.at for s in used)
            came |= dict.fromkeys(used, rung.at)
            ours, base = ({s: r["points"][at][s] for s in used} for r in (row, self.rows[0]))
            if not screening.judge(rung, ours, base, self.start).passed:
                return False, (sum(came.values()) + self.startup * starts) / whole
        return True, 1 + self.startup * starts / whole

    def judged(self, rungs: Sequence[Rung]) -> tuple[np.ndarray, np.ndarray]:
        """(orders, N) who passed, and what it has cost."""
        orders = list(permutations(self.rows[0]["points"]["1"]))
        found = np.array([[self.run(row, rungs, order) for row in self.rows[1:]] for order in orders])
        return found[..., 0].astype(bool), found[..., 1]


# --- figures

def figures(passed: np.ndarray, spent: np.ndarray, truth: np.ndarray, base: float) -> dict[str, float]:
    best, better = np.argsort(-truth, kind="stable")[:BEST], truth > base
    left = np.where(passed, truth, -np.inf).max(axis=1)
    return {"dropped": 100 * (1 - passed.mean()), "saved": 100 * (1 - spent.mean()),
            "better_lost": 100 * (1 - passed[:, better].mean()) if better.any() else 0.0,
            "best_lost": 100 * (1 - passed[:, best].mean()), "points_lost": float(np.mean(max(truth.max(), base) - np.maximum(left, base)))}


def replay(table: Table, plans: dict[str, tuple[Rung, ...]] = PLANS) -> dict[str, Any]:
    base, rng = table.score(table.rows[0]), np.random.default_rng(0)
    draws = rng.integers(0, len(table.truth), (RESAMPLES, len(table.truth)))
    out = []
    for name, rungs in plans.items():
        passed, spent = table.judged(rungs)
        again = [figures(passed[:, d], spent[:, d], table.truth[d], base) for d in draws]
        own = figures(passed, spent, table.truth, base)
        out.append({"plan": name, **{k: [v, *np.quantile([a[k] for a in again], [0.025, 0.975]).tolist()] for k, v in own.items()}})
    return {"rows": len(table.truth), "seeds": len(table.rows[0]["points"]["1"]), "baseline": base, "start": table.start,
            "better": int((table.truth > base).sum()), "correlation": correlations(table), "plans": out}


def correlations(table: Table) -> dict[str, float]:
    """Point -> rank correlation of one seed's Overall there with the truth of all seeds, mean over seeds."""
    def ranks(x: Sequence[float]) -> np.ndarray:
        return np.argsort(np.argsort(x, kind="stable"))

    return {at: float(np.mean([np.corrcoef(ranks([r["points"][at][s] for r in table.rows[1:]]), ranks(table.truth))[0, 1]
                               for s in seeds])) for at, seeds in table.rows[0]["points"].items()}


def markdown(result: dict[str, Any]) -> str:
    def cell(v: list[float], unit: str = "") -> str:
        return f"{v[0]:.{0 if unit else 1}f}{unit} [{v[1]:.{0 if unit else 1}f}, {v[2]:.{0 if unit else 1}f}]"

    points = ", ".join(f"{screening.percent(at)} {r:.2f}" for at, r in result["correlation"].items())
    lines = [f"{result['rows']} rows, {result['seeds']} seeds; baseline {result['baseline']:.1f}, untrained policy {result['start']:.1f}; "
             f"{result['better']} rows are better than the baseline. Rank correlation of one seed at a point with Overall: {points}.", "",
             f"| rungs | dropped | run time saved | better than the baseline, lost | best {BEST}, lost | the best survivor is worse by |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {p['plan']} | {cell(p['dropped'], ' %')} | {cell(p['saved'], ' %')} | {cell(p['better_lost'], ' %')} | "
                              f"{cell(p['best_lost'], ' %')} | {cell(p['points_lost'])} |" for p in result["plans"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="prepare the campaign; `poise-hpc run` works it off")
    making.add_argument("root", type=Path)
    making.add_argument("table", type=Path)
    making.add_argument("--config", type=Path, default=Path(__file__).resolve().parents[1] / "configs" / "stress.yaml")
    making.add_argument("--rows", type=int, default=16)
    making.add_argument("--seeds", type=int, default=3)
    making.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "poise-hpc")
    exporting = commands.add_parser("export", help="a campaign's learning curves as one JSON file")
    exporting.add_argument("root", type=Path)
    exporting.add_argument("file", type=Path)
    replaying = commands.add_parser("replay", help="rungs on the table")
    replaying.add_argument("file", type=Path)
    replaying.add_argument("--startup", type=float, default=0.0, help="of a job, as a share of what a seed's whole training takes")
    replaying.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.command == "make":
        make(args.root, args.table, args.config, args.rows, args.seeds, args.cache)
        print(f"poise-hpc run {args.root}")
    elif args.command == "export":
        data = export(Campaign.open(args.root))
        args.file.write_text('{"config": ' + json.dumps(data["config"]) + f', "start": {json.dumps(data["start"])}, "rows": [\n'
                             + ",\n".join(map(json.dumps, data["rows"])) + "\n]}\n")
        print(f"{len(data['rows'])} rows in {args.file}")
    else:
        result = replay(Table.read(args.file, args.startup))
        print(json.dumps(result, indent=1) if args.json else markdown(result))


if __name__ == "__main__":
    main()
