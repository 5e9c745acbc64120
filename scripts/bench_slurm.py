"""`bench_controller.py --slurm`: no-op candidates through the virtual cluster, real daemons, jobs, supervisors and files.

A candidate is one check and an array of one training job a seed; their work takes no time, what is left is everything else.
`submit_ms`: one sbatch through submitit, by array or job. `queue_s`: from its return to the job's claim. `queries_in_a_minute`:
squeue and sacct in the busiest minute, at the site's poll_s; `sbatch_per_min` are submissions.
"""
from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
NOOP = f"{REPO / 'tests' / 'noop'}:{REPO / 'tests'}"
sys.path[:0] = NOOP.split(":")

from helpers_campaign import campaign  # noqa: E402
from helpers_slurm import virtual_cluster  # noqa: E402

from poise_hpc import files, scheduler, site  # noqa: E402
from poise_hpc.agent.offline import OfflineProposer  # noqa: E402
from poise_hpc.cluster import SlurmCluster  # noqa: E402
from poise_hpc.controller import Controller  # noqa: E402
from poise_hpc.jobspec import job_prefix  # noqa: E402

SITE = {"partitions": ["main"], "mem_gb_per_rank": 0.5, "max_submit": 32, "max_parallel": 32, "poll_s": 30, "result_lag_s": 60}


class Timed(SlurmCluster):
    """Notes how long each submission takes."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.submit_s: list[float] = []

    def submit(self, *arguments: Any) -> list[dict[str, Any]] | None:
        begun = time.perf_counter()
        answers = super().submit(*arguments)
        self.submit_s.append(time.perf_counter() - begun)
        return answers


def measure(candidates: int, seeds: int) -> dict[str, Any]:
    queries: list[float] = []

    def call(arguments: list[str]) -> str:
        queries.append(time.monotonic())
        return scheduler.run(arguments)

    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as scratch, virtual_cluster(nodes=4) as virtual:
        os.environ.update(SLURM_CONF=str(virtual.conf), PYTHONPATH=NOOP, OMP_NUM_THREADS="1")
        opened = campaign(Path(scratch) / "campaign", search={"candidates": candidates, "train_seeds": list(range(seeds)), "window": 16})
        cluster = Timed(site.parse(SITE), job_prefix(opened), call)
        controller = Controller(opened, cluster, OfflineProposer())
        begun, cpu = time.perf_counter(), time.process_time()
        while not controller.finished:
            if not controller.step():
                time.sleep(0.1)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        waits = [files.read_json(a / "claim-0.json")["time"] - files.read_json(a / "submitted.json")["time"] for a in opened.root.glob("*/**/attempts/*")
                 if (a / "claim-0.json").exists()]
        done = len(controller.archive.entries)
    return {"candidates": done, "jobs": len(waits), "seconds": round(wall, 1), "candidates_per_min": round(60 * done / wall, 1),
            "controller_cpu_ms_per_candidate": round(1e3 * cpu / done, 1), "submit_ms": _spread([1e3 * s for s in cluster.submit_s]),
            "queue_s": _spread(waits), "queries_in_a_minute": max(sum(t <= u < t + 60 for u in queries) for t in queries), "sbatch_per_min": round(60 * len(cluster.submit_s) / wall, 1)}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": round(ordered[9], 2), "p95": round(ordered[18], 2)}
