#!/usr/bin/env python
"""How much time the controller itself takes per candidate, with a no-op evaluation (jobs end at once, in this process).

    .venv/bin/python scripts/bench_controller.py [--candidates 50] [--entries 10000] [--json]

Measures, on an empty archive and on one of --entries records: controller seconds per candidate (proposal, parent
selection, files, submission, results, reflection, HDF5 record; the no-op jobs' own time is taken out), one parent
selection, and `status`. Filling the archive takes about ten milliseconds an entry and is not counted.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np  # noqa: E402
from helpers_campaign import campaign, noop_work  # noqa: E402

from poise_hpc import recording, views  # noqa: E402
from poise_hpc.archive import read  # noqa: E402
from poise_hpc.agent.offline import OfflineProposer  # noqa: E402
from poise_hpc.cluster import InlineCluster  # noqa: E402
from poise_hpc.config import overlay, parse  # noqa: E402
from poise_hpc.controller import Controller  # noqa: E402
from poise_hpc.selection.acquisition import choose_parent  # noqa: E402

BASE_LAB = {"train": {"steps": 48}, "evaluate": {"at": [0.25, 0.5, 1.0], "benchmarks": {
    "easy": {"split": "easy", "problems": 96, "samples": 4, "metrics": {"acc@1": 0.2}},
    "medium": {"split": "medium", "problems": 96, "samples": 4, "metrics": {"acc@1": 0.3}},
    "hard": {"split": "hard", "problems": 48, "samples": 32, "metrics": {"acc@1": 0.3, "pass@32": 0.2}}}}}


class Work:
    """The no-op jobs, with a clock: what they cost is not the controller's."""

    seconds = 0.0

    def __call__(self, attempt, job):
        begun = time.perf_counter()
        result = noop_work(attempt, job)
        self.seconds += time.perf_counter() - begun
        return result


def run(folder: Path, candidates: int, seeds: int) -> dict[str, float]:
    """Controller milliseconds per candidate over `candidates` more of them."""
    opened = campaign(folder, **overlay(BASE_LAB, {"search": {"candidates": candidates, "train_seeds": list(range(seeds))}})) \
        if not folder.exists() else _more(folder, candidates)
    begun, work = time.perf_counter(), Work()
    controller = Controller(opened, InlineCluster(work), OfflineProposer())
    opening, done = time.perf_counter() - begun, len(controller.archive.entries)
    begun, work.seconds = time.perf_counter(), 0.0
    while not controller.finished:
        controller.step()
    made = len(controller.archive.entries) - done
    return {"candidates": made, "ms_per_candidate": 1e3 * (time.perf_counter() - begun - work.seconds) / made, "open_ms": 1e3 * opening}


def _more(folder: Path, candidates: int):
    from poise_hpc.campaign import Campaign

    opened = Campaign.open(folder)
    opened.adopt(parse(overlay(opened.config.dump(), {"search": {"candidates": len(opened.ids()) - 1 + candidates}})))
    return opened


def fill(folder: Path, entries: int) -> None:
    """Copies of the campaign's own candidates under new ids, scores shifted, until there are `entries`."""
    import dataclasses
    import shutil

    from poise_hpc.campaign import Campaign

    opened, rng = Campaign.open(folder), np.random.default_rng(0)
    ids = opened.ids()[1:]
    models = [read(opened.records / f"{id}.h5") for id in ids]
    view = recording.ArchiveView.load(opened.root)
    for number in range(len(ids) + 1, entries):
        id, source = f"c{number:04d}", number % len(ids)
        shift = float(rng.normal(0, 5))
        score = models[source].score | {"overall": models[source].score["overall"] + shift}
        parent = f"c{int(rng.integers(0, number)):04d}"
        proposal = models[source].proposal | {"name": f"N{number}", "parents": [parent]}
        shutil.copytree(opened.candidates / ids[source], opened.candidates / id, ignore=shutil.ignore_patterns("attempts"))
        (opened.candidates / id / "proposal.json").write_text(json.dumps(proposal))
        view.add(dataclasses.replace(models[source], id=id, name=f"N{number}", parents=(parent,), score=score, proposal=proposal))
        if number % 1000 == 0:
            print(f"  {number} entries", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=2, help="training seeds, so 1 + 2 x seeds jobs a candidate")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-controller-") as scratch:
        folder = Path(scratch) / "campaign"
        out = {"empty": run(folder, arguments.candidates, arguments.seeds)}
        fill(folder, arguments.entries)
        out["full"] = run(folder, arguments.candidates, arguments.seeds)
        view = recording.ArchiveView.load(folder)
        picks = []
        for number in range(5):
            begun = time.perf_counter()
            choose_parent(view.entries, [("c99999", ("c0003",))], parse({}).search.acquisition, np.random.default_rng(number))
            picks.append(1e3 * (time.perf_counter() - begun))
        out["selection_ms"] = statistics.median(picks)
        out["status_s"] = _status(folder)
        out["entries"] = len(view.entries)
    if arguments.json:
        print(json.dumps(out))
    else:
        for name in ("empty", "full"):
            print(f"{name:6} {out[name]['ms_per_candidate']:6.1f} ms of controller time per candidate ({out[name]['candidates']} candidates, "
                  f"{arguments.seeds} seeds); opening the campaign {out[name]['open_ms']:.0f} ms")
        print(f"parent selection {out['selection_ms']:.1f} ms, status {out['status_s']:.2f} s at {out['entries']} entries")


def _status(folder: Path) -> float:
    from poise_hpc.campaign import Campaign

    begun = time.perf_counter()
    views.status_text(views.status(Campaign.open(folder)))
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
