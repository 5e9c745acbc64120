#!/usr/bin/env python3
"""`bench_controller.py --slurm`: no-op candidates through a virtual Slurm cluster, this product's and, in the same run, its peers'.

Everything but the work is real: daemons, jobs, supervisors, files, archive. A candidate of ours is two jobs, one after the
other (check, then training and evaluation, one array of `--seeds` jobs); ShinkaEvolve's is one job. All get IN_FLIGHT candidates at
a time and the same cluster; the peers' language model is a server in this process that answers at once, ours is the offline proposer.

    candidates_per_min      between the first and the last finished candidate, the baseline or initial program left out
    per_min, sbatch_ms      scheduler commands, counted and timed by wrappers that stand first on PATH (2 ms of CPU each)
    orchestrator_cpu_ms     CPU of the orchestrating process (OpenEvolve: and its pool) per candidate, without those commands
    submit_ms, queue_s      ours: one submission through submitit; from its return to the job's claim
"""
from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO / "tests"), str(REPO / "scripts" / "prepared")]

import prepared  # noqa: E402
from helpers_campaign import campaign, noop_work  # noqa: E402
from helpers_slurm import virtual_cluster  # noqa: E402
from llm_server import Answer, LLMServer  # noqa: E402

from poise_hpc import files, site  # noqa: E402
from poise_hpc.agent.offline import OfflineProposer  # noqa: E402
from poise_hpc.campaign import Campaign  # noqa: E402
from poise_hpc.cluster.slurm import SlurmCluster  # noqa: E402
from poise_hpc.controller import Controller  # noqa: E402
from poise_hpc.jobspec import job_prefix  # noqa: E402

IN_FLIGHT = 16
SITE = {"partitions": ["main"], "mem_gb_per_rank": 0.5, "max_submit": 32, "max_parallel": 32, "poll_s": 30, "result_lag_s": 60}
COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo")
COUNTER = """#!/bin/bash
begun=$EPOCHREALTIME
{command} "$@"
code=$?
printf '%s %s %s\\n' {name} $begun $EPOCHREALTIME >>{log}
exit $code
"""


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


def measure(candidates: int, seeds: int, peers: dict[str, str], peer_candidates: int, job_seconds: int) -> list[dict[str, Any]]:
    """One row a system. `peers`: name -> an interpreter that has its package."""
    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as scratch, virtual_cluster(nodes=4) as virtual, LLMServer(_edits()) as llm:
        os.environ.update(SLURM_CONF=str(virtual.conf), OMP_NUM_THREADS="1")
        rows = [_row("poise-hpc", "slurm", Path(scratch, "poise"), lambda folder: ours(folder, candidates, seeds, job_seconds))]
        if python := peers.get("shinka"):
            # As it is, and told of more cores: it has no more jobs on a cluster than cores on the machine where it runs itself.
            for name, cores in (("shinka", 0), ("shinka-32-cores", 32)):
                rows.append(_row(name, "slurm", Path(scratch, name), lambda folder, cores=cores: peer(
                    python, "run_shinka.py", folder, llm.url, peer_candidates, IN_FLIGHT, job_seconds, cores)))
        if python := peers.get("openevolve"):
            rows.append(_row("openevolve", "processes", Path(scratch, "openevolve"), lambda folder: peer(
                python, "run_openevolve.py", folder, llm.url, peer_candidates, IN_FLIGHT, job_seconds)))
    return rows


def _row(name: str, executor: str, folder: Path, run: Any) -> dict[str, Any]:
    print(f"{name} ...", file=sys.stderr)
    folder.mkdir()
    with counted(folder) as log:
        found = run(folder)
        calls = [(command, float(begun), float(ended)) for command, begun, ended in map(str.split, log.read_text().splitlines())]
    times, seconds, cpu = found.pop("times"), found.pop("seconds"), found.pop("cpu_s")
    counts, queries = Counter(command for command, _, _ in calls), [begun for command, begun, _ in calls if command in ("squeue", "sacct")]
    return {"system": name, "executor": executor, **found, "candidates": len(times), "seconds": round(seconds, 1),
            "candidates_per_min": round(60 * (len(times) - 1) / (times[-1] - times[0]), 1),
            "per_min": {command: round(60 * n / seconds, 1) for command, n in counts.items()},
            "queries_in_a_minute": max((sum(t <= u < t + 60 for u in queries) for t in queries), default=0),
            "sbatch_ms": _spread([1e3 * (ended - begun) for command, begun, ended in calls if command == "sbatch"]),
            "orchestrator_cpu_ms": round(1e3 * cpu / len(times), 1)}


def ours(folder: Path, candidates: int, seeds: int, job_seconds: int) -> dict[str, Any]:
    opened = campaign(folder / "campaign", search={"candidates": candidates, "train_seeds": list(range(seeds)), "window": IN_FLIGHT})
    ready = prepare(opened, folder / "prepared", job_seconds)
    os.environ["PYTHONPATH"] = str(ready)  # of the jobs
    cluster = Timed(site.parse(SITE), job_prefix(opened))
    controller = Controller(opened, cluster, OfflineProposer())
    begun, cpu = time.perf_counter(), time.process_time()
    while not controller.finished:
        if not controller.step():
            time.sleep(cluster.idle_s)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    del os.environ["PYTHONPATH"]
    failed = [e.id for e in controller.archive.entries if e.outcome != "succeeded"]
    if failed:
        raise SystemExit(f"no-op candidates that did not succeed: {failed}")
    waits = [files.read_json(a / "claim-0.json")["time"] - files.read_json(a / "submitted.json")["time"] for a in opened.root.glob("*/**/attempts/*")]
    return {"times": sorted(record.stat().st_mtime for record in opened.records.glob("c*.h5"))[1:], "seconds": seconds, "cpu_s": cpu, "jobs": len(waits),
            "in_flight": IN_FLIGHT, "submit_ms": _spread([1e3 * s for s in cluster.submit_s]), "queue_s": _spread(waits)}


def prepare(opened: Campaign, folder: Path, job_seconds: int) -> Path:
    """A folder for the jobs' PYTHONPATH with results of each kind of job."""
    shutil.copytree(REPO / "scripts" / "prepared", folder)
    (folder / "seconds").write_text(str(job_seconds))
    for kind, number in [("prepare", 0), ("check", 0), *(("train", n) for n in range(prepared.VARIANTS))]:
        job = {"kind": kind, "candidate": f"c{number:04d}", "seed": 0, "config": opened.config.dump()} | ({"purpose": "selection"} if kind == "train" else {})
        ready = folder / prepared.folder(job).name
        (ready / "files").mkdir(parents=True)
        files.write_json(ready / "payload.json", noop_work(ready / "files", job)["payload"])
    return folder


def peer(python: str, script: str, folder: Path, url: str, *numbers: int) -> dict[str, Any]:
    """Run a script of peers/ and read what it measured; its jobs find `python` beside the interpreter."""
    environment = os.environ | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    done = subprocess.run([python, str(REPO / "scripts" / "peers" / script), str(folder), url, *map(str, numbers)], env=environment, cwd=folder,
                          text=True, capture_output=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{script} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def counted(folder: Path) -> Iterator[Path]:
    """Puts wrappers around Slurm's commands that write (name, begun, ended) to a log."""
    log, wrappers, path = folder / "calls.log", folder / "commands", os.environ["PATH"]
    wrappers.mkdir()
    log.touch()
    for name in COMMANDS:
        wrapper = wrappers / name
        wrapper.write_text(COUNTER.format(command=shutil.which(name), name=name, log=log))
        wrapper.chmod(0o755)
    os.environ["PATH"] = f"{wrappers}:{path}"
    try:
        yield log
    finally:
        os.environ["PATH"] = path


def _edits() -> Any:
    """Answers with a whole program, another one each time, in the words that both peers look for."""
    number = itertools.count(1)

    def answer(request: dict[str, Any]) -> Answer:
        n = next(number)
        program = f"# EVOLVE-BLOCK-START\ndef answer():\n    return {' + '.join(['1'] * (n % 50))} + {n}\n# EVOLVE-BLOCK-END"
        return Answer(f"<NAME>\nedit_{n}\n</NAME>\n<DESCRIPTION>\nAnother sum.\n</DESCRIPTION>\n<CODE>\n```python\n{program}\n```\n</CODE>\n")

    return answer


def _spread(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    ordered = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": round(ordered[9], 2), "p95": round(ordered[18], 2)}


def text(rows: list[dict[str, Any]]) -> str:
    """A table, one system a column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[name, *(_cell(row.get(name)) for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    return "" if value is None else str(value)
