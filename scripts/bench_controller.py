#!/usr/bin/env python3
"""How much time the controller itself takes per candidate, with a no-op evaluation (jobs end at once, in this process).

    .venv/bin/python scripts/bench_controller.py [--candidates 40] [--entries 10000] [--json] [--keep DIR]

Rows: an empty archive and small results (4 training steps, 4 evaluation elements a seed); an empty archive and results of
the base lab's size (48 steps, 9 elements, 32 samples a problem); one of --entries records and small results. A row is
wall and CPU milliseconds per candidate, proposal to HDF5 record, the no-op jobs' own time taken out, and its split:

    propose   parent selection, references, proposal, novelty gate, package    collect  results read
    submit    job.json, intent, submission record                              record   scores, reflection, HDF5 record

"start": opening the campaign and its first WARM candidates, with what is imported on the way, once per process. Then one
parent selection and `status` at --entries records. The archive is filled with distinct recipes of the offline
proposer and shifted scores (10 ms an entry, not counted).
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np  # noqa: E402
from helpers_campaign import campaign, noop_work  # noqa: E402

from poise_hpc import recording, views  # noqa: E402
from poise_hpc.agent import offline  # noqa: E402
from poise_hpc.agent.base import Context  # noqa: E402
from poise_hpc.agent.recipe import of_proposal  # noqa: E402
from poise_hpc.archive import read  # noqa: E402
from poise_hpc.campaign import Campaign  # noqa: E402
from poise_hpc.cluster.inline import InlineCluster  # noqa: E402
from poise_hpc.config import parse  # noqa: E402
from poise_hpc.controller import Controller  # noqa: E402
from poise_hpc.selection.acquisition import choose_parent  # noqa: E402
from poise_hpc.settings import overlay  # noqa: E402
from poise_hpc.types import Proposal, candidate_id, candidate_number  # noqa: E402

WARM = 4  # candidates before the clock starts
BASE_LAB = {"train": {"steps": 48}, "evaluate": {"at": [0.25, 0.5, 1.0], "benchmarks": {
    "easy": {"split": "easy", "problems": 96, "samples": 4, "metrics": {"acc@1": 0.2}},
    "medium": {"split": "medium", "problems": 96, "samples": 4, "metrics": {"acc@1": 0.3}},
    "hard": {"split": "hard", "problems": 48, "samples": 32, "metrics": {"acc@1": 0.3, "pass@32": 0.2}}}}}


class Clock:
    """Wall and CPU seconds by part of the controller; what a part calls that has a name of its own is taken out."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._inner = [[0.0, 0.0]]

    def measure(self, name: str, call: Any, *arguments: Any) -> Any:
        begun = time.perf_counter(), time.process_time()
        self._inner.append([0.0, 0.0])
        try:
            return call(*arguments)
        finally:
            inner = self._inner.pop()
            for i, now in enumerate((time.perf_counter(), time.process_time())):
                self._inner[-1][i] += now - begun[i]
                self.spent.setdefault(name, [0.0, 0.0])[i] += now - begun[i] - inner[i]


class Timed(Controller):
    """The controller with a clock around its parts."""

    def __init__(self, opened: Campaign, clock: Clock):
        self.parts = clock
        super().__init__(opened, InlineCluster(lambda attempt, job: clock.measure("jobs", noop_work, attempt, job)), offline.OfflineProposer())

    def step(self):
        return self.parts.measure("rest", super().step)

    def collect(self):
        return self.parts.measure("collect", super().collect)

    def propose(self):
        return self.parts.measure("propose", super().propose)

    def submit(self):
        return self.parts.measure("submit", super().submit)

    def reflect(self, candidate):
        return self.parts.measure("record", super().reflect, candidate)

    def archive_it(self, candidate):
        return self.parts.measure("record", super().archive_it, candidate)


def run(folder: Path, candidates: int, seeds: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Controller milliseconds per candidate over `candidates` more of them, after WARM."""
    clock, begun = Clock(), time.perf_counter()
    opened = _more(folder, WARM + candidates) if folder.exists() else campaign(
        folder, **overlay(sizes, {"search": {"candidates": WARM - 1 + candidates, "train_seeds": list(range(seeds))}}))
    controller = Timed(opened, clock)
    before = len(controller.archive.entries)
    while len(controller.archive.entries) < before + WARM:
        controller.step()
    start, warm = time.perf_counter() - begun, len(controller.archive.entries)
    clock.spent.clear()
    while not controller.finished:
        controller.step()
    made = len(controller.archive.entries) - warm
    del clock.spent["jobs"]
    wall, cpu = ({name: round(1e3 * spent[i] / made, 2) for name, spent in clock.spent.items()} for i in (0, 1))
    return {"candidates": made, "ms_per_candidate": round(sum(wall.values()), 2), "cpu_ms_per_candidate": round(sum(cpu.values()), 2),
            "split_ms": wall, "split_cpu_ms": cpu, "start_ms": round(1e3 * start, 1)}


def _more(folder: Path, candidates: int) -> Campaign:
    opened = Campaign.open(folder)
    opened.adopt(parse(overlay(opened.config.dump(), {"search": {"candidates": len(opened.ids()) - 1 + candidates}})))
    return opened


def fill(folder: Path, entries: int) -> None:
    """Distinct recipes of the offline proposer, each around a random older one, with the campaign's own results, scores shifted,
    one in ten failed, until there are `entries`."""
    opened, rng = Campaign.open(folder), np.random.default_rng(0)
    models = [read(opened.records / f"{id}.h5") for id in opened.ids()[1:]]
    view = recording.ArchiveView.load(opened.root)
    proposals = {e.id: opened.proposal(e.id) for e in view.entries}
    recipes, names = {of_proposal(p) for p in proposals.values()}, Counter(p.name for p in proposals.values())
    while len(view.entries) < entries:
        id = candidate_id(len(view.entries))
        parent = view.entries[int(rng.integers(len(view.entries)))]
        context = Context(id, 0, parent, {}, proposals[parent.id])
        recipe = next(r for r in offline.candidates(context) if r not in recipes)
        recipes.add(recipe)
        draft = offline.write(recipe, context)
        names[draft.proposal.name] += 1
        if (number := names[draft.proposal.name]) > 1:
            draft = dataclasses.replace(draft, proposal=dataclasses.replace(draft.proposal, name=f"{draft.proposal.name}-{number}"))
        proposals[id] = draft.proposal
        _write(opened, view, id, draft.proposal, draft.files, models[candidate_number(id) % len(models)], rng)
        if len(view.entries) % 1000 == 0:
            print(f"  {len(view.entries)} entries", file=sys.stderr)
    view.write_index()


def _write(opened: Campaign, view: Any, id: str, proposal: Proposal, files: Any, model: Any, rng: np.random.Generator) -> None:
    folder, failed = opened.candidates / id, rng.random() < 0.1
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    for name, data in (("proposal", proposal.to_json()), ("manifest", {n: hashlib.sha256(t.encode()).hexdigest() for n, t in files.items()}),
                       ("pick", model.pick), ("reflection", model.reflection),
                       ("status", {"id": id, "stage": "archived", "outcome": "candidate_error" if failed else "succeeded",
                                   "cause": "nonfinite-loss" if failed else "", "message": "", "held_from": None, "forgiven": []})):
        (folder / f"{name}.json").write_text(json.dumps(data))
    shift, score = float(rng.normal(0, 5)), model.score
    score = None if failed else score | {"overall": score["overall"] + shift, "by_seed": {s: v + shift for s, v in score["by_seed"].items()},
                                         "benchmarks": {b: v + shift + float(rng.normal()) for b, v in score["benchmarks"].items()}}
    view.add(dataclasses.replace(
        model, id=id, name=proposal.name, parents=proposal.parents, proposal=proposal.to_json(), code=dict(files), score=score,
        outcome="candidate_error" if failed else "succeeded", cause="nonfinite-loss" if failed else "",
        behaviour={k: v + float(rng.normal(0, 0.1)) for k, v in model.behaviour.items()}))


def selection_ms(folder: Path) -> float:
    """One parent selection, median of 9, the first one (imports) left out."""
    view, picks = recording.ArchiveView.load(folder), []
    for number in range(10):
        begun = time.perf_counter()
        choose_parent(view.entries, [("c99999", ("c0003",))], parse({}).search.acquisition, np.random.default_rng(number))
        picks.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(picks[1:])


def status_s(folder: Path) -> float:
    begun = time.perf_counter()
    views.status_text(views.status(Campaign.open(folder)))
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=2, help="training seeds: 1 + seeds jobs a candidate")
    parser.add_argument("--slurm", action="store_true", help="instead: --candidates through a virtual Slurm cluster, see bench_slurm.py")
    parser.add_argument("--peers", default="", help="with --slurm: also shinka=PYTHON,openevolve=PYTHON, interpreters that have these packages")
    parser.add_argument("--peer-candidates", type=int, default=60)
    parser.add_argument("--job-seconds", type=int, default=0, help="with --slurm: how long an evaluation sleeps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="keep the filled campaign in this folder, or use the one that is there")
    arguments = parser.parse_args()
    if arguments.slurm:
        import bench_slurm

        rows = bench_slurm.measure(arguments.candidates, arguments.seeds, dict(peer.split("=", 1) for peer in arguments.peers.split(",") if peer),
                                   arguments.peer_candidates, arguments.job_seconds)
        return print(json.dumps(rows) if arguments.json else bench_slurm.text(rows))
    with tempfile.TemporaryDirectory(prefix="bench-controller-") as scratch:
        folder = arguments.keep or Path(scratch) / "full"
        out: dict[str, Any] = {"empty": run(Path(scratch) / "small", arguments.candidates, arguments.seeds, {}),
                               "empty_base_lab": run(Path(scratch) / "base", arguments.candidates, arguments.seeds, BASE_LAB)}
        if not folder.exists():
            run(folder, 40, arguments.seeds, {})
            fill(folder, arguments.entries)
        out["full"] = run(folder, arguments.candidates, arguments.seeds, {})
        out |= {"selection_ms": round(selection_ms(folder), 1), "status_s": round(status_s(folder), 3), "entries": len(Campaign.open(folder).ids())}
    print(json.dumps(out) if arguments.json else "\n".join(_text(out)))


def _text(out: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("empty", "empty_base_lab", "full"):
        row = out[name]
        split = ", ".join(f"{part} {ms:.1f}" for part, ms in row["split_ms"].items())
        lines.append(f"{name:15} {row['ms_per_candidate']:6.1f} ms per candidate, CPU {row['cpu_ms_per_candidate']:.1f} "
                     f"({split}; {row['candidates']} candidates), start {row['start_ms']:.0f} ms")
    return [*lines, f"parent selection {out['selection_ms']:.1f} ms, status {out['status_s']:.2f} s at {out['entries']} entries"]


if __name__ == "__main__":
    main()
