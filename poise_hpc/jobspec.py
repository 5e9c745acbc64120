"""What a job is told: `job.json` of an attempt, complete before the attempt is announced, never changed."""
from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from . import files
from .campaign import Attempt, Campaign, Candidate, load_attempts
from .config import Config
from .types import Outcome, Stage

HOME = "prepare"  # the campaign's own job lives in a folder of this name, shaped like a candidate's


def home(campaign: Campaign) -> Candidate:
    """The campaign's own pseudo-candidate. Its stage goes from PREPARE to ARCHIVED (or HELD)."""
    folder = campaign.root / HOME
    folder.mkdir(exist_ok=True)
    status = files.read_json(folder / "status.json")
    candidate = Candidate(HOME, folder, Stage.PREPARE, attempts=load_attempts(folder))
    if status is not None:
        candidate.stage, candidate.forgiven = Stage(status["stage"]), status["forgiven"]
        candidate.cause, candidate.message = status["cause"], status["message"]
        candidate.held_from = Stage(status["held_from"]) if status["held_from"] else None
    return candidate


def prepared(home: Candidate) -> dict[str, Any]:
    """Payload of the prepare job: model folder and hashes. Call it only after the stage has succeeded."""
    return next(a.result["payload"] for a in reversed(home.attempts) if a.outcome is Outcome.SUCCEEDED and a.result)


def units(config: Config, stage: Stage) -> list[int | None]:
    """What a stage is made of: one job per training seed, or one in all."""
    return list(config.search.train_seeds) if stage in (Stage.TRAIN, Stage.EVALUATE) else [None]


def ranks(config: Config, stage: Stage) -> int:
    return config.jobs.ranks if stage == Stage.TRAIN else 1


def attempt_name(stage: Stage, seed: int | None, number: int) -> str:
    return f"{stage}-{number}" if seed is None else f"{stage}-s{seed}-{number}"


def job_name(campaign: Campaign, attempt: Attempt) -> str:
    """Unique over campaigns of the same name: the folder's creation time tells them apart."""
    label = re.sub(r"[^A-Za-z0-9_.-]", "_", campaign.root.name)[:40]
    token = f"{int(campaign.meta['created'] * 1000):x}"
    return f"poise-{label}-{token}-{attempt.folder.parent.parent.name}-{attempt.name}"


def write_attempt(campaign: Campaign, home: Candidate, candidate: Candidate, seed: int | None, number: int) -> Attempt:
    """Create the attempt's folder whole (job.json, intent.json): from here on a restarted controller knows of it."""
    stage = candidate.stage
    folder = candidate.folder / "attempts" / attempt_name(stage, seed, number)
    temporary = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    attempt = Attempt(folder, stage, seed, number)
    files.write_json(temporary / "job.json", job(campaign, home, candidate, seed, number), sync=False)
    files.write_json(temporary / "intent.json", {"name": job_name(campaign, attempt), "controller": files.process_identity()}, sync=False)
    os.rename(temporary, folder)
    return attempt


def job(campaign: Campaign, home: Candidate, candidate: Candidate, seed: int | None, number: int) -> dict[str, Any]:
    config, stage = campaign.config, candidate.stage
    earlier = candidate.of(stage, seed)
    spec: dict[str, Any] = {
        "kind": str(stage), "campaign": str(campaign.root), "candidate": candidate.id, "seed": seed, "attempt": number,
        "config": config.dump(), "ranks": ranks(config, stage), "threads": config.jobs.threads, "limits": limits(config, stage, earlier)}
    if stage == Stage.PREPARE:
        return spec | {"cache_dir": campaign.meta["cache_dir"], "writable": [campaign.meta["cache_dir"]]}
    spec |= {"package": str(candidate.folder), "model": prepared(home)["model"]}
    if stage == Stage.TRAIN:
        spec["resume"] = [str(a.folder) for a in earlier]
    if stage == Stage.EVALUATE:
        trained = next(a for a in reversed(candidate.of(Stage.TRAIN, seed)) if a.outcome is Outcome.SUCCEEDED)
        assert trained.result is not None
        spec["weights"] = {at: str(trained.folder / path) for at, path in trained.result["payload"]["snapshots"].items()}
        spec["purpose"] = config.evaluate.purpose
        spec["resume"] = [str(a.folder) for a in earlier]
    return spec


def limits(config: Config, stage: Stage, earlier: list[Attempt]) -> dict[str, Any]:
    """Time limit of this attempt: what the stage's earlier attempts have left of it. Queue wait is not run time."""
    minutes = {Stage.PREPARE: config.jobs.prepare_min, Stage.CHECK: config.jobs.check_min,
               Stage.TRAIN: config.jobs.train_min, Stage.EVALUATE: config.jobs.evaluate_min}[stage]
    used = sum(a.result.get("run_seconds", 0.0) for a in earlier if a.result and a.outcome is Outcome.PREEMPTED)
    return {"seconds": max(60 * minutes - used, 1.0), "silent_s": 60 * config.jobs.silent_min, "heartbeat_s": config.jobs.heartbeat_s,
            "memory_gb": config.jobs.memory_gb, "isolation": config.jobs.isolation}


def checkpointed_step(attempt: Path) -> int:
    """The newest training step that an attempt saved, by its folder names (`checkpoints/step-000012`); -1 without one."""
    folder = attempt / "checkpoints"
    steps = [int(m.group(1)) for e in os.scandir(folder) if (m := re.fullmatch(r"step-(\d+)", e.name))] if folder.is_dir() else []
    return max(steps, default=-1)
