"""What a job is told: `job.json` of an attempt, complete before the attempt is announced, never changed."""
from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

from . import files
from .campaign import Attempt, Campaign, Candidate, load_attempts, reach, seed_of
from .config import Benchmark, Config, Rung
from .evaluation import parts
from .stored import read_status
from .types import BASELINE_ID, START, Outcome, Stage

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


def units(config: Config, stage: Stage, rung: Rung | None = None, start: bool = False) -> list[str]:
    """What a stage is made of, one job each: training seeds, up to the rung if there is one; for evaluation also (point, benchmark),
    or chunks of it, where so configured. `start`: the first seed's evaluation is the start policy's, too."""
    seeds = [f"s{seed}" for seed in config.search.train_seeds][:rung.seeds if rung else None]
    if stage == Stage.EVALUATE and config.jobs.evaluate_by == "train":
        return []
    if stage == Stage.TRAIN or (stage == Stage.EVALUATE and config.jobs.evaluate_by == "seed"):
        return [f"{seed}@{rung.at:g}" for seed in seeds] if rung else seeds
    if stage == Stage.EVALUATE:
        points = [f"{at:g}" for at in config.evaluate.at if rung is None or at <= rung.at]
        first = [(seeds[0], START)] if start else []
        return [f"{seed}@{at}@{name}{part}" for seed, at in [*first, *((s, p) for s in seeds for p in points)]
                for name, benchmark in config.evaluate.benchmarks.items() for part in cut(config, benchmark)]
    return [""]


def cut(config: Config, benchmark: Benchmark) -> list[str]:
    """How a benchmark is spread over jobs, as the end of their units: "" as a whole, or by chunks where it has several."""
    chunks = parts.count(benchmark.problems, benchmark.samples, config.evaluate.chunk_completions) if config.jobs.evaluate_by == "chunk" else 1
    return [f"@{k}" for k in range(chunks)] if chunks > 1 else [""]


def ranks(config: Config, stage: Stage) -> int:
    return config.jobs.ranks if stage == Stage.TRAIN else 1


def attempt_name(stage: Stage, unit: str, number: int) -> str:
    return "-".join(filter(None, (stage, unit, str(number))))


def job_prefix(campaign: Campaign) -> str:
    """Begins the names of this campaign's jobs and of no other's: the creation time tells namesakes apart."""
    return f"poise-{label(campaign.root)}-{int(campaign.meta['created'] * 1000):x}-"


def label(root: Path) -> str:
    """A campaign's name as a part of a job's."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", root.name)[:40]


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
    earlier = before(candidate, stage, unit)
    spec: dict[str, Any] = {
        "kind": str(stage), "campaign": str(campaign.root), "candidate": candidate.id, "seed": seed, "attempt": number,
        "config": campaign.resolved, "avoid": avoid(earlier), "ranks": ranks(config, stage), "threads": config.jobs.threads, "limits": limits(config, stage, earlier)}
    if stage == Stage.PREPARE:
        return spec | {"cache_dir": campaign.meta["cache_dir"], "writable": [campaign.meta["cache_dir"]]}
    spec["manifest"] = files.read_json(candidate.folder / "manifest.json")  # the only code that the job may run
    spec |= {"package": str(candidate.folder), "model": prepared(home)["model"], "data_sha256": prepared(home)["data_sha256"]}
    if stage == Stage.CHECK:
        return spec
    # The control that costs one evaluation: the start policy, where the baseline's first seed is evaluated.
    start = {START: spec["model"]} if candidate.id == BASELINE_ID and seed == config.search.train_seeds[0] else {}
    spec["resume"] = [str(a.folder) for a in earlier]
    _, *part = unit.split("@")
    if stage == Stage.TRAIN:
        spec |= {"until": part[0]} if part else {}
        if config.jobs.evaluate_by == "train":
            spec |= {"purpose": config.evaluate.purpose, "weights": start}
    if stage == Stage.EVALUATE:
        done = trained(candidate, seed)
        assert done is not None and done.result is not None
        spec["weights"] = start | {at: str(done.folder / path) for at, path in done.result["payload"]["snapshots"].items()}
        spec["purpose"] = config.evaluate.purpose
        if len(part) >= 2:
            spec["only"] = [[*part[:2], *map(int, part[2:])]]  # point, benchmark, and of it one chunk
    return spec


def before(candidate: Candidate, stage: Stage, unit: str) -> list[Attempt]:
    """Attempts that one of `unit` goes on from, oldest first: those that took its seed to earlier rungs, and its own predecessors."""
    own = candidate.of(stage, unit)
    if not unit or unit.count("@") >= 2:  # an evaluation element, or a part of one, is whole or not there
        return own
    seed = [a for a in candidate.attempts if a.stage == stage and a.seed == seed_of(unit) and a.version == candidate.version]
    return sorted((a for a in seed if a.reaches < reach(unit)), key=lambda a: (a.reaches, a.number)) + own


def trained(candidate: Candidate, seed: int | None) -> Attempt | None:
    """The furthest training of this seed that has ended well."""
    own = [a for a in candidate.attempts if a.stage == Stage.TRAIN and a.seed == seed and a.version == candidate.version]
    done = [a for a in own if a.outcome is Outcome.SUCCEEDED]
    return max(done, key=lambda a: (a.reaches, a.number), default=None)


def limits(config: Config, stage: Stage, earlier: list[Attempt]) -> dict[str, Any]:
    """Time limit of this attempt: what the earlier ones that it goes on from have left of it. Queue wait is not run time."""
    minutes = {Stage.PREPARE: config.jobs.prepare_min, Stage.CHECK: config.jobs.check_min,
               Stage.TRAIN: config.jobs.train_min, Stage.EVALUATE: config.jobs.evaluate_min}[stage]
    used = sum(a.result.get("run_seconds", 0.0) for a in earlier  # what was killed before it could save is done again
               if a.result and a.outcome in (Outcome.PREEMPTED, Outcome.SUCCEEDED) and a.result.get("cause") != "killed-at-stop")
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
