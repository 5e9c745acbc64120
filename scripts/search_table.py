#!/usr/bin/env python3
"""A table of real lab results, on which scripts/search_replay.py asks whether it matters how parents are chosen.

    .venv/bin/python scripts/search_table.py make archive_store/search-table     hours; kill it and repeat it as you like
    .venv/bin/python scripts/search_table.py export archive_store/search-table docs/data/search_stress.json
    .venv/bin/python scripts/search_table.py extend docs/data/search_stress.json archive_store/more-rows --rows 13
    .venv/bin/python scripts/search_table.py append archive_store/more-rows docs/data/search_stress.json

`make` is an ordinary campaign (configs/search_table.yaml): the seed algorithms, then offline candidates from parents that
are drawn evenly, so that no strategy has shaped the table. `extend` and `append` add rows later, on the machine that made the
others: candidates of evenly drawn rows that compute what no row does, trained in the table's own config. Two rows are run
again beside them and must give their numbers: another processor makes another start policy, and with it other scores.
"""
from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from poise_hpc import config as configuration
from poise_hpc import files, orders
from poise_hpc.agent.base import Context
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.agent.recipe import Recipe, make, of_proposal
from poise_hpc.agent.render import render
from poise_hpc.algorithms import load, seeds
from poise_hpc.archive import ArchiveView
from poise_hpc.campaign import Campaign
from poise_hpc.settings import overlay
from poise_hpc.types import BASELINE_ID, EntrySummary, Outcome, PoiseError, Proposal, Score, candidate_id


BEST = 0.02  # share of the table that is searched for


# --- the table

@dataclass(frozen=True)
class Table:
    rows: list[dict[str, Any]]  # as `export` writes them; the baseline first

    @classmethod
    def read(cls, path: Path) -> Table:
        """The first row of each digest; children of the others become its children."""
        rows = json.loads(path.read_text())["rows"]
        first: dict[str, str] = {}
        same = {r["id"]: first.setdefault(r["digest"], r["id"]) for r in rows}
        return cls([r | {"parents": [same[p] for p in r["parents"]]} for r in rows if same[r["id"]] == r["id"]])

    def without(self, seed: str) -> Table:
        """The table as a search sees it that is not shown this training seed."""
        out = Table([r | {"by_seed": {s: v for s, v in r["by_seed"].items() if s != seed}} for r in self.rows])
        vars(out)["apart"] = self.apart  # known, and dear
        return out

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


def write(file: Path, data: dict[str, Any]) -> None:
    file.write_text('{"config": ' + json.dumps(data["config"]) + ', "rows": [\n' + ",\n".join(map(json.dumps, data["rows"])) + "\n]}\n")


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
    config = configuration.parse(overlay(made, {"search": {"candidates": 0}, "jobs": {"max_parallel": 1}}))
    cache.mkdir(parents=True, exist_ok=True)
    campaign, again = Campaign.create(root, config, cache_dir=str(cache)), table.rows[5]
    drafts = [(again, Proposal(again["name"], (), "", tuple(again["mechanisms"]), "", ""), code(again)), *children(table, rows, seed)]
    with tempfile.TemporaryDirectory() as folder:
        for parent, proposal, text in drafts:
            package = Path(folder) / proposal.name
            package.mkdir()
            (package / "algorithm.py").write_text(text)
            files.write_json(package / "proposal.json", proposal.to_json() | {"parents": [], "details": proposal.details | {"row": parent["id"]}})
            orders.package(campaign, package, parent=None)


def append(rows: list[dict[str, Any]], file: Path) -> tuple[int, int]:
    """(rows added, rows that were run again). PoiseError if one that was run again has other numbers, or if none was: the start policy
    is another one on another processor, and everything that is trained from it."""
    data, added, repeated = json.loads(file.read_text()), 0, 0
    known = {}
    for r in data["rows"]:
        known.setdefault(r["digest"], r)
    for row in rows:
        if (old := known.get(row["digest"])) is not None:
            if old["by_seed"] != row["by_seed"]:
                raise PoiseError(f"{row['name']} was run again, {old['id']} in the table, and has other numbers: {row['by_seed']}, there {old['by_seed']}. "
                                 "Another processor has another start policy; or the trainer, the task or a version changed. Make these rows where "
                                 "the table was made, or make a new table")
            repeated += 1
        else:
            known[row["digest"]] = row
            data["rows"].append(row | {"id": candidate_id(len(data["rows"])), "proposer": "offline"})
            added += 1
    if not repeated:
        raise PoiseError("none of the rows is in the table, so nothing shows that they are comparable; `extend` runs two again")
    write(file, data)
    return added, repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, *paths: str) -> argparse.ArgumentParser:
        adding = commands.add_parser(name, help=help)
        for path in paths:
            adding.add_argument(path, type=Path)
        return adding

    cache = Path.home() / ".cache" / "poise-hpc"
    command("make", "prepare the campaign; `poise-hpc run` works it off", "root").add_argument("--cache", type=Path, default=cache)
    command("export", "its archive as one JSON file", "root", "file")
    extending = command("extend", "prepare a campaign with further rows; `poise-hpc run` works it off", "file", "root")
    extending.add_argument("--rows", type=int, default=12)
    extending.add_argument("--seed", type=int, default=1)
    extending.add_argument("--cache", type=Path, default=cache)
    command("append", "its rows to the table", "root", "file")
    args = parser.parse_args()
    match args.command:
        case "make":
            start(args.root, args.cache)
            print(f"poise-hpc run {args.root}")
        case "export":
            data = export(Campaign.open(args.root))
            write(args.file, data)
            print(f"{len(data['rows'])} rows in {args.file}")
        case "extend":
            extend(args.file, args.root, args.cache, args.rows, args.seed)
            print(f"poise-hpc run {args.root}")
        case "append":
            try:
                added, repeated = append(export(Campaign.open(args.root))["rows"], args.file)
            except PoiseError as error:
                parser.exit(1, f"{error}\n")
            print(f"{added} rows added to {args.file}; {repeated} were run again and have the same numbers")


if __name__ == "__main__":
    main()
