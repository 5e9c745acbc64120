"""What a job is told: `job.json` of an attempt, complete before the attempt is announced, never changed."""
from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

from . import files
from .campaign import Attempt, Campaign, Candidate, load_attempts, seed_of
from .config import Config
from .stored import read_status
from .types import Outcome, Stage

HOME = "prepare"  # the campaign's own job lives in a folder of this name, shaped like a candidate's


def home(campaign: Campaign) -> Candidate:
    """The campaign's own pseudo-candidate. Its stage goes from PREPARE to ARCHIVED (or HELD)."""
    folder = campaign.root / HOME
    folder.mkdir(exist_ok=True)
    status = read_status(folder)
    candidate = Candidate(HOME, folder, Stage.PREPARE, attempts=load_attempts(folder))
    if status is not None:
        candidate.stage, candidate.forgiven = Stage(status["stage"]), status["forgiven"]
        candidate.cause, candidate.message = status["cause"], status["message"]
        candidate.held_from = Stage(status["held_from"]) if status["held_from"] else None
    return candidate


def prepared(home: Candidate) -> dict[str, Any]:
    """Payload of the prepare job: model folder and hashes. Call it only after the stage has succeeded."""
    return next(a.result["payload"] for a in reversed(home.attempts) if a.outcome is Outcome.SUCCEEDED and a.result)


def units(config: Config, stage: Stage) -> list[str]:
    """What a stage is made of, one job each: training seeds; for evaluation also (point, benchmark) where so configured."""
    seeds = [f"s{seed}" for seed in config.search.train_seeds]
    if stage == Stage.EVALUATE and config.jobs.evaluate_by == "train":
        return []
    if stage == Stage.TRAIN or (stage == Stage.EVALUATE and config.jobs.evaluate_by == "seed"):
        return seeds
    if stage == Stage.EVALUATE:
        return [f"{seed}@{at:g}@{name}" for seed in seeds for at in config.evaluate.at for name in config.evaluate.benchmarks]
    return [""]


def ranks(config: Config, stage: Stage) -> int:
    return config.jobs.ranks if stage == Stage.TRAIN else 1


def attempt_name(stage: Stage, unit: str, number: int) -> str:
    return "-".join(filter(None, (stage, unit, str(number))))


def job_prefix(campaign: Campaign) -> str:
    """Begins the names of this campaign's jobs and of no other's: the creation time tells namesakes apart."""
    label = re.sub(r"[^A-Za-z0-9_.-]", "_", campaign.root.name)[:40]
    return f"poise-{label}-{int(campaign.meta['created'] * 1000):x}-"


def ended_attempt(campaign: Campaign, name: str, index: int | None, job_id: str) -> Path | None:
    """The attempt that a job of this campaign was submitted for, if it has its result. None, too, if `job_id` is another job
    than the one submitted for it: somebody's own, of the same name."""
    owner = name.removeprefix(job_prefix(campaign)).partition("-")[0]
    folder = campaign.root / HOME if owner == HOME else campaign.candidates / owner
    for path in folder.glob("attempts/*/intent.json"):
        intent, submitted = files.read_json(path), files.read_json(path.with_name("submitted.json"))
        if (intent["name"], intent["index"]) == (name, index) and (submitted is None or submitted["job_id"] == job_id):
            return path.parent if path.with_name("result.json").exists() else None
    return None


def announce(campaign: Campaign, home: Candidate, wanted: list[tuple[Candidate, str]]) -> list[Attempt]:
    """Create the attempts' folders whole (job.json, intent.json), one job name for all: from here on a restarted
    controller knows of them. More than one is an array, in this order."""
    attempts: list[Attempt] = []
    for index, (candidate, unit) in enumerate(wanted):
        stage = candidate.stage
        number = 1 + sum(a.stage == stage and a.unit == unit for a in candidate.attempts)  # of all versions
        folder = candidate.folder / "attempts" / attempt_name(stage, unit, number)
        if not attempts:
            name = f"{job_prefix(campaign)}{candidate.id}-{folder.name}"
        intent = {"name": name, "index": index if len(wanted) > 1 else None, "of": len(wanted), "version": candidate.version,
                  "controller": files.process_identity()}
        temporary = folder.parent / f".{folder.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files.write_json(temporary / "job.json", job(campaign, home, candidate, unit, number), sync=False)
        files.write_json(temporary / "intent.json", intent, sync=False)
        os.rename(temporary, folder)
        attempts.append(Attempt(folder, stage, unit, number, intent))
    return attempts


def job(campaign: Campaign, home: Candidate, candidate: Candidate, unit: str, number: int) -> dict[str, Any]:
    config, stage, seed = campaign.config, candidate.stage, seed_of(unit)
    earlier = candidate.of(stage, unit)
    spec: dict[str, Any] = {
        "kind": str(stage), "campaign": str(campaign.root), "candidate": candidate.id, "seed": seed, "attempt": number,
        "config": campaign.resolved, "avoid": avoid(earlier), "ranks": ranks(config, stage), "threads": config.jobs.threads, "limits": limits(config, stage, earlier)}
    if stage == Stage.PREPARE:
        return spec | {"cache_dir": campaign.meta["cache_dir"], "writable": [campaign.meta["cache_dir"]]}
    spec["manifest"] = files.read_json(candidate.folder / "manifest.json")  # the only code that the job may run
    spec |= {"package": str(candidate.folder), "model": prepared(home)["model"], "data_sha256": prepared(home)["data_sha256"]}
    if stage == Stage.TRAIN:
        spec["resume"] = [str(a.folder) for a in earlier]
        if config.jobs.evaluate_by == "train":
            spec["purpose"] = config.evaluate.purpose
    if stage == Stage.EVALUATE:
        trained = next(a for a in reversed(candidate.of(Stage.TRAIN, f"s{seed}")) if a.outcome is Outcome.SUCCEEDED)
        assert trained.result is not None
        spec["weights"] = {at: str(trained.folder / path) for at, path in trained.result["payload"]["snapshots"].items()}
        spec["purpose"] = config.evaluate.purpose
        spec["resume"] = [str(a.folder) for a in earlier]
        if "@" in unit:
            _, at, benchmark = unit.split("@")
            spec["only"] = [[at, benchmark]]
    return spec


def limits(config: Config, stage: Stage, earlier: list[Attempt]) -> dict[str, Any]:
    """Time limit of this attempt: what the stage's earlier attempts have left of it. Queue wait is not run time."""
    minutes = {Stage.PREPARE: config.jobs.prepare_min, Stage.CHECK: config.jobs.check_min,
               Stage.TRAIN: config.jobs.train_min, Stage.EVALUATE: config.jobs.evaluate_min}[stage]
    used = sum(a.result.get("run_seconds", 0.0) for a in earlier  # what was killed before it could save is done again
               if a.result and a.outcome is Outcome.PREEMPTED and a.result["cause"] != "killed-at-stop")
    return {"seconds": max(60 * minutes - used, 1.0), "silent_s": 60 * config.jobs.silent_min, "heartbeat_s": config.jobs.heartbeat_s,
            "memory_gb": config.jobs.memory_gb, "isolation": config.jobs.isolation}


def avoid(earlier: list[Attempt]) -> list[str]:
    """Nodes on which the attempts just before failed, through no fault of the candidate: a retry asks for others."""
    failed = itertools.takewhile(lambda a: a.outcome is Outcome.INFRA_ERROR, reversed(earlier))
    return sorted({node for a in failed if a.result for node in a.result.get("suspects", ())})


def checkpointed_step(attempt: Path) -> int:
    """The newest training step that an attempt saved, by its folder names (`checkpoints/step-000012`); -1 without one."""
    folder = attempt / "checkpoints"
    steps = [int(m.group(1)) for e in os.scandir(folder) if (m := re.fullmatch(r"step-(\d+)", e.name))] if folder.is_dir() else []
    return max(steps, default=-1)
