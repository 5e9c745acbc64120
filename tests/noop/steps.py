"""Work without numbers, in the shape of the real one: steps that take STEP_S seconds, checkpoints, a stop at a step's end.

With OMP_NOOP_GATE no training takes a step before a file of that name is there: a job still runs, for sure, whatever a test does first.
The weights are a chain of hashes over the steps: a step that was lost, doubled or resumed from elsewhere shows at the end.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from helpers_campaign import noop_work

from poise_hpc import files, worker

STEP_S = float(os.environ.get("OMP_NOOP_STEP_S", "0"))  # a worker's environment keeps OMP_*
GATE = os.environ.get("OMP_NOOP_GATE")


def work(job: dict[str, Any], attempt: Path) -> dict[str, Any]:
    weights = train(job, attempt) if job["kind"] == "train" else ""
    shutil.rmtree(attempt / "elements", ignore_errors=True)  # of an earlier life of this attempt
    payload = noop_work(attempt, job)["payload"]
    return payload | {"weights_sha256": weights} if weights else payload


def train(job: dict[str, Any], attempt: Path) -> str:
    steps = round(float(job.get("until", 1)) * job["config"]["train"]["steps"])
    while GATE and not Path(GATE).exists() and not worker.stop_requested():
        time.sleep(0.05)
    done, weights = newest([*map(Path, job["resume"]), attempt])
    for step in range(done, steps):
        if STEP_S:
            time.sleep(STEP_S)
        weights = hashlib.sha256(f"{weights}/{job['candidate']}/{job['seed']}/{step}".encode()).hexdigest()
        folder = attempt / "checkpoints" / f"step-{step + 1:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "weights.json", {"weights": weights})
        worker.progress("train", step + 1, steps)
        if worker.stop_requested() and step + 1 < steps:
            raise worker.Stopped(f"after step {step + 1}")
    return weights


def newest(attempts: list[Path]) -> tuple[int, str]:
    found = [(int(path.parent.name[5:]), files.read_json(path)["weights"]) for a in attempts for path in a.glob("checkpoints/step-*/weights.json")]
    return max(found, default=(0, ""))
