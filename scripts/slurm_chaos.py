#!/usr/bin/env python3
"""A campaign on the virtual cluster while things go wrong at random instants, compared with the same campaign undisturbed.

    .venv/bin/python scripts/slurm_chaos.py [--candidates 12] [--instants 20] [--seed 0] [--json] [--keep DIR]

At each instant, a seeded choice of: preemption by the partition `high`, `scontrol requeue`, the walltime signal, a node's
slurmd killed (back within or after SlurmdTimeout), slurmctld killed and restarted, the controller killed. At the end:
candidates lost, units done twice, jobs left over, and records that differ from the undisturbed campaign. Exit code 0: none.

The jobs' work is tests/noop/steps.py (hash chains in place of weights); scheduler, supervisors, controller, archive are real.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
NOOP = f"{REPO / 'tests' / 'noop'}:{REPO / 'tests'}"
sys.path[:0] = NOOP.split(":")

import numpy as np  # noqa: E402
import steps  # noqa: E402
from helpers_slurm import VirtualCluster, processes, virtual_cluster  # noqa: E402

from poise_hpc import archive, config  # noqa: E402
from poise_hpc.agent.offline import OfflineProposer  # noqa: E402
from poise_hpc.campaign import Campaign  # noqa: E402
from poise_hpc.cluster.inline import InlineCluster  # noqa: E402
from poise_hpc.controller import Controller  # noqa: E402
from poise_hpc.settings import overlay  # noqa: E402
from poise_hpc.types import Outcome  # noqa: E402

CONFIG = {"train": {"steps": 8}, "evaluate": {"at": [0.5, 1.0], "benchmarks": {
    "easy": {"split": "easy", "problems": 8, "samples": 2, "metrics": {"acc@1": 0.5}},
    "hard": {"split": "hard", "problems": 6, "samples": 4, "metrics": {"acc@1": 0.3, "pass@4": 0.2}}}},
    "search": {"train_seeds": [0, 1], "window": 6}, "jobs": {"heartbeat_s": 0.5, "infra_retries": 6, "evaluate_by": "seed"}}
SITE = {"partitions": ["low"], "nodes": 2, "ranks_per_node": 2, "mem_gb_per_rank": 1, "max_parallel": 16, "max_submit": 16, "poll_s": 1,
        "result_lag_s": 2, "signal_lead_s": 60, "stages": {"check": {"time_min": 10, "partitions": ["main"]}}}


def settings(candidates: int) -> dict[str, Any]:
    return overlay(CONFIG, {"search": {"candidates": candidates}})


def undisturbed(folder: Path, candidates: int) -> dict[str, Any]:
    """The records of the same campaign with its jobs run at once, in this process."""
    opened = Campaign.create(folder, config.parse(settings(candidates)), cache_dir=str(folder.parent / "cache"))

    def work(attempt: Path, job: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": Outcome.SUCCEEDED, "cause": "", "message": "", "payload": steps.work(job, attempt), "walls": {}}

    controller = Controller(opened, InlineCluster(work), OfflineProposer())
    while not controller.finished:
        controller.step()
    return facts(folder)


def facts(folder: Path) -> dict[str, Any]:
    """What must not depend on how a campaign went: everything of its records but times and attempts."""
    out = {}
    for path in sorted((folder / "records").glob("c*.h5")):
        e = archive.read(path)
        out[e.id] = json.loads(json.dumps({
            "name": e.name, "parents": e.parents, "code": e.code, "outcome": e.outcome, "score": e.score, "hashes": e.hashes,
            "reflection": e.reflection, "curves": np.asarray(e.curve_values).tolist(), "seeds": e.seeds, "pick": e.pick}, default=str))
    return out


class Controlled:
    """The controller as a process of its own, `poise-hpc run`."""

    def __init__(self, cluster: VirtualCluster, folder: Path, candidates: int, site: dict[str, Any]):
        self.folder = folder
        for name, data in {"config.json": settings(candidates), "site.json": site}.items():
            (folder.parent / name).write_text(json.dumps(data))
        self.env = cluster.env | {"PYTHONPATH": NOOP, "OMP_NOOP_STEP_S": "1", "OMP_NUM_THREADS": "1", "POISE_CACHE_DIR": str(folder.parent / "cache")}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.folder.parent / "controller.log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "poise_hpc.cli", "run", str(self.folder), "--config", str(self.folder.parent / "config.json"),
                                             "--site", str(self.folder.parent / "site.json")], env=self.env, stdout=log, stderr=log)

    def ended(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Disturbance:
    """What can go wrong. Each returns what it did, or "" if there was nothing to do it to."""

    def __init__(self, cluster: VirtualCluster, controlled: Controlled, rng: random.Random):
        self.cluster, self.controlled, self.rng = cluster, controlled, rng
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.most_running = 0

    def kinds(self) -> dict[str, Callable[[], str]]:
        return {"preempted": self.preempt, "requeued": self.requeue, "warned": self.warn, "slurmd killed": self.slurmd,
                "slurmctld killed": self.slurmctld, "controller killed": self.controller}

    def running(self) -> list[str]:
        try:
            jobs = self.cluster.run("squeue", "--noheader", "--array", "--states=RUNNING", "--partition=low", "--format=%i").split()
        except (AssertionError, subprocess.TimeoutExpired):
            return []  # slurmctld is away
        self.most_running = max(self.most_running, len(jobs))
        return jobs

    def on_a_job(self, *command: str) -> str:
        if not (jobs := self.running()):
            return ""
        job = self.rng.choice(jobs)
        subprocess.run([*command, job], env=self.cluster.env, capture_output=True, timeout=60)
        return f"job {job}"

    def requeue(self) -> str:
        return self.on_a_job("scontrol", "requeue")

    def warn(self) -> str:
        return self.on_a_job("scancel", "--signal=USR2")

    def preempt(self) -> str:
        node = self.rng.choice(self.nodes())
        subprocess.run(["sbatch", "--partition=high", f"--nodelist={node}", "--cpus-per-task=8", "--time=1", "--output=/dev/null", "--wrap=sleep 2"],
                       env=self.cluster.env, capture_output=True, timeout=60, cwd=self.cluster.folder)
        return f"on node {node}"

    def nodes(self) -> list[str]:
        return sorted(path.name for path in (self.cluster.folder / "spool").iterdir())

    def slurmd(self) -> str:
        node, away = self.rng.choice(self.nodes()), self.rng.choice([2.0, 14.0])
        return f"{node}, back after {away:g} s" if self.daemon(f"slurmd.{node}", signal.SIGKILL, away) else ""

    def slurmctld(self) -> str:
        number = self.rng.choice([signal.SIGTERM, signal.SIGKILL])
        return f"signal {number:d}, back after 3 s" if self.daemon("slurmctld", number, 3.0) else ""

    def daemon(self, name: str, number: int, away_s: float) -> bool:
        try:
            os.kill(self.cluster.pid(name), number)
        except (OSError, ValueError):
            return False  # it is away already
        self.later.append((time.monotonic() + away_s, self.administrator))
        return True

    def administrator(self) -> None:
        """Starts what is down, and gives drained nodes back (Slurm drains one that it could not launch a job on)."""
        self.cluster.script("start")
        subprocess.run(["scontrol", "update", f"nodename={','.join(self.nodes())}", "state=resume"], env=self.cluster.env, capture_output=True, timeout=60)

    def controller(self) -> str:
        if self.controlled.ended() is not None:
            return ""
        self.controlled.kill()
        self.later.append((time.monotonic() + self.rng.uniform(0, 3), self.controlled.start))
        return "kill -9"

    def tidy(self) -> None:
        """Bring back what is due."""
        due = [act for when, act in self.later if when <= time.monotonic()]
        self.later = [(when, act) for when, act in self.later if when > time.monotonic()]
        for act in due:
            act()


def disturbed(cluster: VirtualCluster, folder: Path, candidates: int, instants: int, seed: int, limit_s: float, say: Callable[[str], None]) -> Counter[str]:
    """Run the campaign to its end through `instants` disturbances. Returns how often each was done."""
    rng, done = random.Random(seed), Counter[str]()
    controlled = Controlled(cluster, folder, candidates, SITE)
    wrong = Disturbance(cluster, controlled, rng)
    controlled.start()
    begun = time.monotonic()
    next_s = begun + 8
    try:
        while time.monotonic() - begun < limit_s:
            time.sleep(0.2)
            wrong.tidy()
            if controlled.ended() is not None and not wrong.later:
                if controlled.ended() == 0:
                    break
                controlled.start()  # a scheduler that is away while the controller starts, say: a person, or cron, starts it again
                done["controller ended"] += 1
            if sum(done.values()) - done["controller ended"] < instants and time.monotonic() >= next_s:
                wrong.running()
                name, act = rng.choice(sorted(wrong.kinds().items()))
                if what := act():
                    done[name] += 1
                    say(f"{time.monotonic() - begun:6.1f} s  {name}: {what}")
                    next_s = time.monotonic() + rng.uniform(2, 6)
        else:
            say(f"not done after {limit_s:g} s")
        while wrong.later:
            wrong.tidy()
            time.sleep(0.2)
    finally:
        if controlled.ended() is None:
            controlled.kill()
    say(f"at most {wrong.most_running} jobs ran at a time")
    return done


def judge(cluster: VirtualCluster, folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Lost, doubled, orphaned, different."""
    found, opened, ended = facts(folder), Campaign.open(folder), time.monotonic()

    def queued() -> list[str]:
        return cluster.run("squeue", "--noheader", "--array", "--partition=low,main", "--format=%i %T %j").splitlines()

    # A slurmctld that was killed may have missed the end of a job, and notices when the node registers again: here within
    # a minute or so. Such a job has no process. One that Slurm starts again finds its attempt ended, and ends.
    while queued() and time.monotonic() - ended < 150:
        time.sleep(1)
    # A unit is done twice if two attempts at it succeeded: the second should not have been submitted.
    succeeded = Counter((id, a.stage, a.unit) for id in opened.ids() for a in opened.load(id).attempts if a.outcome is Outcome.SUCCEEDED)
    archived = Counter(line.split()[1] for line in (folder / "events.log").read_text().splitlines() if line.split()[2] == "archived")
    results = [a.result for id in opened.ids() for a in opened.load(id).attempts if a.result]
    emptied_s = round(time.monotonic() - ended, 1)
    return {"lost": sorted(wanted.keys() - found.keys()), "doubled": [str(k) for k, n in succeeded.items() if n > 1] + [id for id, n in archived.items() if n > 1],
            "orphaned": queued() + [line for line in processes(cluster.conf) if str(folder) in line],
            "different": sorted(id for id in wanted.keys() & found.keys() if wanted[id] != found[id]) + sorted(found.keys() - wanted.keys()),
            "queue_empty_after_s": emptied_s, "records": len(found), "attempts": len(results), "restarted": sum(r.get("restart", 0) > 0 for r in results),
            "outcomes": dict(Counter(" ".join(filter(None, (r["outcome"], r["cause"]))) for r in results))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--instants", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1500.0)
    parser.add_argument("--keep", type=Path, help="folder for the campaign, kept; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, virtual_cluster(nodes=4) as cluster:
        folder = (given.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        wanted = undisturbed(folder / "undisturbed", given.candidates)
        begun = time.monotonic()
        done = disturbed(cluster, folder / "disturbed", given.candidates, given.instants, given.seed, given.limit_s,
                         lambda line: print(line, file=sys.stderr, flush=True))
        verdict = {"disturbances": dict(done), "seconds": round(time.monotonic() - begun, 1), **judge(cluster, folder / "disturbed", wanted)}
    bad = sum(len(verdict[key]) for key in ("lost", "doubled", "orphaned", "different"))
    print(json.dumps(verdict) if given.json else "\n".join(f"{key:13} {value if not isinstance(value, list) else value or 0}" for key, value in verdict.items()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
