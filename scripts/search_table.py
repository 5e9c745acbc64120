#!/usr/bin/env python
"""Does it matter how parents are chosen? Selection strategies, replayed on a table of real lab results.

    .venv/bin/python scripts/search_table.py make archive_store/search-table     hours; kill it and repeat it as you like
    .venv/bin/python scripts/search_table.py export archive_store/search-table docs/data/search_stress.json
    .venv/bin/python scripts/search_table.py extend docs/data/search_stress.json archive_store/more-rows --rows 13
    .venv/bin/python scripts/search_table.py append archive_store/more-rows docs/data/search_stress.json
    .venv/bin/python scripts/search_table.py replay docs/data/search_stress.json [--json]

`make` is an ordinary campaign (configs/search_table.yaml): the seed algorithms, then offline candidates from parents that
are drawn evenly, so that no strategy has shaped the table. `extend` and `append` add rows later: candidates of evenly drawn
rows that compute what no row does, trained in the table's own config; a row that is run again must give its numbers. `replay` searches the table again and again instead of the lab:
a strategy names a parent, and the child is a row that was not evaluated yet, as far from the parent as the offline proposer's
children are from theirs. Two things are therefore not in the figures: what a proposer learns from the archive, and whatever
the table does not hold. Counted are evaluations, the baseline not among them, until one of the best 2 % is evaluated.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from poise_hpc import config as configuration
from poise_hpc import orders, stats, views
from poise_hpc import files as on_disk
from poise_hpc.agent.base import Context
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.agent.recipe import Recipe, make, of_proposal
from poise_hpc.agent.render import render
from poise_hpc.algorithms import load, seeds
from poise_hpc.archive import ArchiveView
from poise_hpc.campaign import Campaign
from poise_hpc.config import Acquisition, Search
from poise_hpc.selection.acquisition import Strategy, choose_parent
from poise_hpc.types import BASELINE_ID, EntrySummary, Outcome, PoiseError, Proposal, Score, candidate_id

BEST = 0.02    # share of the table that is searched for
WINDOW, PER_PARENT = Search().window, Search().per_parent  # as a campaign has them by default
# (pareto, performance, diversity, descendant, ucb_beta) that tuning chooses from; the default is among them
GRID = ((1, 1, 0.5, 1, 1), (0, 1, 0, 1, 1), (0, 1, 0.5, 1, 1), (1, 1, 0.5, 2, 1), (1, 1, 0.5, 1, 3), (1, 1, 2, 1, 1), (0, 0, 0, 1, 1), (0, 1, 1, 0, 1),
        (0, 1, 0, 0, 1))


# --- the table

@dataclass(frozen=True)
class Table:
    rows: list[dict[str, Any]]  # as `export` writes them; the baseline first

    @classmethod
    def read(cls, path: Path) -> Table:
        return cls(json.loads(path.read_text())["rows"])

    @cached_property
    def truth(self) -> np.ndarray:
        """(N,) Overall over all seeds, points; -inf for a row that failed."""
        return np.array([np.mean(list(r["by_seed"].values())) if r["by_seed"] else -np.inf for r in self.rows])

    @cached_property
    def apart(self) -> np.ndarray:
        """(N, N) slots with different parts, and one more where common hyperparameters differ."""
        recipes = [make(r["recipe"]["parts"].values(), r["recipe"]["knobs"]) for r in self.rows]
        return np.array([[distance(a, b) for b in recipes] for a in recipes])

    @cached_property
    def steps(self) -> np.ndarray:
        """Distances of the offline candidates from the parents they really had: what a child's distance is drawn from."""
        place = {r["id"]: i for i, r in enumerate(self.rows)}
        return np.array([self.apart[i, place[r["parents"][0]]] for i, r in enumerate(self.rows) if r["proposer"] == "offline"])

    def half(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Two halves of the rows, the baseline in both."""
        others = 1 + rng.permutation(len(self.rows) - 1)
        middle = len(others) // 2
        return tuple(np.concatenate([[0], np.sort(part)]) for part in (others[:middle], others[middle:]))

    def targets(self, rows: np.ndarray) -> set[int]:
        """The best 2 % of these rows, at least one, the baseline not among them."""
        ranked = rows[1:][np.argsort(-self.truth[rows[1:]], kind="stable")]
        return set(ranked[: max(ceil(BEST * len(ranked)), 1)].tolist())

    def entry(self, row: int, id: str, parents: tuple[str, ...]) -> EntrySummary:
        """The row as if it had just been archived under this id."""
        r = self.rows[row]
        score = Score(overall=float(self.truth[row]), ci=None, by_seed=r["by_seed"], final=r["final"], curve={}, benchmarks=r["benchmarks"],
                      delta=None, delta_ci=None) if r["by_seed"] else None
        return EntrySummary(id, r["name"], parents, Outcome.SUCCEEDED if score else Outcome.CANDIDATE_ERROR, r["cause"], r["proposer"],
                            tuple(r["mechanisms"]), score, r["behaviour"], "", r["run_seconds"], "")


def distance(a: Recipe, b: Recipe) -> int:
    parts = [{p.slot: p.name for p in recipe.by_slot.values()} for recipe in (a, b)]
    slots = sum(parts[0].get(s) != parts[1].get(s) for s in parts[0].keys() | parts[1].keys())
    return slots + any(a.values[k] != b.values[k] for k in a.values.keys() & b.values.keys())


def export(campaign: Campaign) -> dict[str, Any]:
    view, rows = ArchiveView.load(campaign.root), []
    for e in sorted(view.entries, key=lambda e: e.id):
        proposal = campaign.proposal(e.id)
        parents = [proposal.details["row"]] if "row" in proposal.details else list(e.parents)
        rows.append({"id": e.id, "name": e.name, "proposer": e.proposer, "parents": parents, "cause": e.cause, "digest": e.digest,
                     "mechanisms": list(e.mechanisms) or list(load.declared_mechanisms(campaign.code(e.id))),
                     "recipe": of_proposal(proposal).to_json(), "run_seconds": round(e.run_seconds, 1),
                     "by_seed": {s: round(v, 4) for s, v in e.score.by_seed.items()} if e.score else {},
                     "final": round(e.score.final, 4) if e.score else None,
                     "benchmarks": {b: round(v, 4) for b, v in e.score.benchmarks.items()} if e.score else {},
                     "behaviour": {k: float(f"{v:.5g}") for k, v in e.behaviour.items()}})
    return {"config": campaign.config.dump(), "rows": rows}


# --- further rows

def code(row: dict[str, Any]) -> str:
    """The row's package: a seed's own file, or its recipe rendered."""
    named = row["name"].lower().replace("-", "_")
    return seeds.source(named) if named in seeds.SEEDS else render(make(row["recipe"]["parts"].values(), row["recipe"]["knobs"]), row["name"])


def digest(text: str) -> str:
    from poise_hpc.algorithms.digest import digest as computed

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "algorithm.py").write_text(text)
        return computed(load.load(Path(folder)))


def children(table: Table, rows: int, seed: int) -> Iterator[tuple[dict[str, Any], Proposal, str]]:
    """(parent's row, proposal, package) of offline candidates that compute what neither a row nor one of them does."""
    proposals = {r["id"]: Proposal(r["name"], tuple(r["parents"]), "", tuple(r["mechanisms"]), "", "", details={"recipe": r["recipe"]})
                 for r in table.rows}
    entries = tuple(table.entry(i, r["id"], tuple(r["parents"])) for i, r in enumerate(table.rows))
    known, rng, proposer, number = {r["digest"] for r in table.rows}, np.random.default_rng([seed, len(table.rows)]), OfflineProposer(), len(table.rows)
    while rows:
        parent = int(rng.integers(len(table.rows)))
        r = table.rows[parent]
        draft = proposer.propose(Context(candidate_id(number), seed, entries[parent], {"algorithm.py": code(r)}, proposals[r["id"]], entries=entries,
                                         proposals=proposals, code=lambda id: {"algorithm.py": code(table.rows[int(id[1:])])}))
        number += 1
        if (new := digest(draft.files["algorithm.py"])) not in known:
            known.add(new)
            rows -= 1
            yield r, draft.proposal, draft.files["algorithm.py"]


def extend(file: Path, root: Path, cache: Path, rows: int, seed: int) -> None:
    """A campaign in the table's config whose inbox has the new candidates, and a row to be run again beside the baseline."""
    table, made = Table.read(file), json.loads(file.read_text())["config"]
    config = configuration.parse(configuration.overlay(made, {"search": {"candidates": 0}, "jobs": {"max_parallel": 1}}))
    cache.mkdir(parents=True, exist_ok=True)
    campaign, again = Campaign.create(root, config, cache_dir=str(cache)), table.rows[5]
    drafts = [(again, Proposal(again["name"], (), "", tuple(again["mechanisms"]), "", ""), code(again)), *children(table, rows, seed)]
    with tempfile.TemporaryDirectory() as folder:
        for parent, proposal, text in drafts:
            package = Path(folder) / proposal.name
            package.mkdir()
            (package / "algorithm.py").write_text(text)
            on_disk.write_json(package / "proposal.json", proposal.to_json() | {"parents": [], "details": proposal.details | {"row": parent["id"]}})
            orders.package(campaign, package, parent=None)


def append(root: Path, file: Path) -> tuple[int, int]:
    """(rows added, rows that were run again). PoiseError if one that was run again has other numbers."""
    data, added, repeated = json.loads(file.read_text()), 0, 0
    known = {r["digest"]: r for r in data["rows"]}
    for row in export(Campaign.open(root))["rows"]:
        if (old := known.get(row["digest"])) is not None:
            if old["by_seed"] != row["by_seed"]:
                raise PoiseError(f"{row['name']} was run again as {old['id']} {old['name']} and has other numbers: {row['by_seed']}, in the table "
                                 f"{old['by_seed']}. The trainer, the task or a package's version changed: make a new table")
            repeated += 1
        else:
            known[row["digest"]] = row
            data["rows"].append(row | {"id": candidate_id(len(data["rows"])), "proposer": "offline"})
            added += 1
    write(file, data)
    return added, repeated


def write(file: Path, data: dict[str, Any]) -> None:
    file.write_text('{"config": ' + json.dumps(data["config"]) + ', "rows": [\n' + ",\n".join(map(json.dumps, data["rows"])) + "\n]}\n")


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


def replay(table: Table, splits: int, replays: int, tuning: int, progress: bool) -> dict[str, Any]:
    everything = np.arange(len(table.rows))
    whole = {}
    for name, how in STRATEGIES.items():
        whole[name] = [evaluations(table, everything, *how, np.random.default_rng([9, i])) for i in range(2 * replays)]
        say(progress, f"whole table: {name} {np.mean(whole[name]):.1f}")
    halves = []
    for s in range(splits):
        halves.append(split(table, s, replays, tuning))
        say(progress, f"split {s + 1}/{splits}: " + ", ".join(f"{k} {v:.1f}" for k, v in halves[-1].items()))

    def rows(samples: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
        out = []
        for name, values in samples.items():
            mean, ci = stats.mean_interval(values)
            delta, delta_ci = stats.mean_interval(np.array(values) - np.array(samples["random parents"]))
            out.append({"strategy": name, "evaluations": mean, "ci": ci, "against_random": delta, "against_random_ci": delta_ci})
        return sorted(out, key=lambda r: r["evaluations"])

    return {"table": reliability(table), "whole": rows(whole), "halves": rows({k: [h[k] for h in halves] for k in halves[0]}) if halves else [],
            "splits": splits, "replays": replays, "targets": [len(table.targets(everything)), len(table.targets(everything[: len(everything) // 2]))]}


def say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def markdown(result: dict[str, Any]) -> str:
    t, lines = result["table"], []
    lines.append(f"{t['rows']} rows ({t['failed']} failed); sd of Overall between rows {t['sd']:.1f} points, standard error of a row {t['seed_error']:.1f}, "
                 f"reliability {t['reliability']:.2f}. Correlation of rows by distance: {t['correlation_by_distance']}.")
    for title, what in (("Whole table, default weights", "whole"), (f"Half tables, {result['splits']} splits", "halves")):
        if result[what]:
            lines += ["", f"{title}:", "", "| strategy | evaluations | against random parents |", "|---|---|---|"]
            lines += [f"| {r['strategy']} | {views.interval(r['evaluations'], r['ci'])} | "
                      f"{views.interval(r['against_random'], r['against_random_ci'], sign=True)} |" for r in result[what]]
    return "\n".join(lines)


def start(root: Path, cache: Path) -> Campaign:
    """The campaign, new with the seed algorithms in its inbox, or taken up again."""
    if (root / "campaign.json").exists():
        return Campaign.open(root)
    config = configuration.load(Path(__file__).resolve().parents[1] / "configs" / "search_table.yaml")
    cache.mkdir(parents=True, exist_ok=True)
    campaign, packages = Campaign.create(root, config, cache_dir=str(cache)), root.with_name(root.name + "-packages")
    for name in seeds.SEEDS:
        if name != "grpo":
            load.write_seed_package(name, packages / name)
            orders.package(campaign, packages / name, parent=BASELINE_ID)
    return campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="prepare the campaign; `poise-hpc run` works it off")
    making.add_argument("root", type=Path)
    making.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "poise-hpc")
    exporting = commands.add_parser("export", help="its archive as one JSON file")
    exporting.add_argument("root", type=Path)
    exporting.add_argument("file", type=Path)
    extending = commands.add_parser("extend", help="prepare a campaign with further rows; `poise-hpc run` works it off")
    extending.add_argument("file", type=Path)
    extending.add_argument("root", type=Path)
    extending.add_argument("--rows", type=int, default=12)
    extending.add_argument("--seed", type=int, default=1)
    extending.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "poise-hpc")
    appending = commands.add_parser("append", help="its rows to the table")
    appending.add_argument("root", type=Path)
    appending.add_argument("file", type=Path)
    replaying = commands.add_parser("replay", help="strategies on the table")
    replaying.add_argument("file", type=Path)
    replaying.add_argument("--splits", type=int, default=10, help="halvings of the table: tuned on one half, reported on the other")
    replaying.add_argument("--replays", type=int, default=50, help="searches per strategy and half; twice as many on the whole table")
    replaying.add_argument("--tuning", type=int, default=20, help="searches per weights while tuning")
    replaying.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.command == "make":
        start(args.root, args.cache)
        print(f"poise-hpc run {args.root}")
    elif args.command == "export":
        data = export(Campaign.open(args.root))
        write(args.file, data)
        print(f"{len(data['rows'])} rows in {args.file}")
    elif args.command == "extend":
        extend(args.file, args.root, args.cache, args.rows, args.seed)
        print(f"poise-hpc run {args.root}")
    elif args.command == "append":
        added, repeated = append(args.root, args.file)
        print(f"{added} rows added to {args.file}; {repeated} were run again and have the same numbers")
    else:
        result = replay(Table.read(args.file), args.splits, args.replays, args.tuning, progress=not args.json)
        print(json.dumps(result, indent=1) if args.json else markdown(result))


if __name__ == "__main__":
    main()
