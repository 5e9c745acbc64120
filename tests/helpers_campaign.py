"""A campaign without training: jobs that write, at once, files of the shape that real jobs write.

Scores are a seeded function of (candidate, training seed), so a campaign's numbers are known beforehand.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from poise_hpc import config as configuration
from poise_hpc import files
from poise_hpc.campaign import Campaign
from poise_hpc.evaluation import parts
from poise_hpc.settings import overlay
from poise_hpc.types import Outcome

KEYS = ("reward", "acc", "valid", "truncated", "length", "entropy", "kl_old", "clip_fraction", "gradient_norm", "gradient_norm_max",
        "zero_variance", "advantage_mean", "advantage_std", "advantage_max", "ess", "trained_rows", "loss")


def noop_work(attempt: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What `jobs.run_attempt` would have left in the attempt's folder, and its result."""
    payload: dict[str, Any] = {}
    config = configuration.parse(job["config"])
    if job["kind"] == "prepare":
        payload = {"model": "/nowhere", "model_sha256": "0" * 64, "data_sha256": "1" * 64, "vocabulary": {"symbols": ["a"]}}
    elif job["kind"] == "check":
        files.write_json(attempt / "checks.json", {"checks": [{"name": "shapes", "passed": True, "message": "", "seconds": 0.0}]}, sync=False)
    elif job["kind"] == "train":
        rng = np.random.default_rng([int(job["candidate"][1:]), job["seed"]])
        until = float(job.get("until", 1))
        values = rng.random((config.train.steps, len(KEYS))).round(6)[:round(until * config.train.steps)]
        (attempt / "curves.jsonl").write_text("".join(
            json.dumps({"step": i} | dict(zip(KEYS, row, strict=True))) + "\n" for i, row in enumerate(values.tolist())))
        payload = {"steps": len(values), "snapshots": {f"{at:g}": f"snapshots/{at:g}" for at in config.evaluate.at if at <= until},
                   "weights_sha256": "2" * 64, "timings": {"rollout": 1.0, "update": 2.0}, "versions": {"cpu": "model A", "torch": "9"}}
    if "purpose" in job:
        points = [float(at) for at in {**job.get("weights", {}), **payload.get("snapshots", {})}]
        payload |= {"elements": evaluate(attempt, job, config, points)}
    return {"outcome": Outcome.SUCCEEDED, "cause": "", "message": "", "payload": payload, "walls": {}}


def evaluate(attempt: Path, job: dict[str, Any], config: configuration.Config, points: list[float]) -> list[str]:
    """Elements of these points, or what the job is to do only; those of fewer points are a part of those of more."""
    (attempt / "elements").mkdir()
    names = []
    skill = np.random.default_rng([7, int(job["candidate"][1:])]).uniform(0.1, 0.6)
    rng = np.random.default_rng([int(job["candidate"][1:]), job["seed"]])
    for at in points:
        for name, b in config.evaluate.benchmarks.items():
            correct = rng.binomial(b.samples, skill * at, b.problems) if at else np.eye(b.problems, dtype=int)[0] * b.samples  # START: one problem is solved
            element = {"at": f"{at:g}", "benchmark": name, "split": b.split, "problem_ids": list(range(b.problems)), "n": b.samples,
                       "correct": correct.tolist(), "valid": [b.samples] * b.problems, "truncated": [0] * b.problems,
                       "mean_length": [10.0] * b.problems, "seconds": 0.0}
            asked = job.get("only", [[f"{at:g}", name]])[0]
            if asked[:2] != [f"{at:g}", name]:
                continue
            path = attempt / "elements" / f"{'@'.join(['-'.join(asked[:2]), *map(str, asked[2:])])}.json"
            if asked[2:]:
                element = part(element, parts.cut([0] * b.problems, b.samples, config.evaluate.chunk_completions), asked[2])
            rows = sorted(parts.rows(element))  # each completion is one token, the number of its row
            if at == points[-1]:
                np.savez(path.with_suffix(".npz"), tokens=np.array(rows, np.uint16), offsets=np.arange(len(rows) + 1))
                element["npz_sha256"] = hashlib.sha256(path.with_suffix(".npz").read_bytes()).hexdigest()
            files.write_json(path, element, sync=False)
            names.append(f"elements/{path.name}")
    return names


def part(element: dict[str, Any], cut: list[parts.Chunk], k: int) -> dict[str, Any]:
    """What a job of one chunk writes of it. A problem's first samples are its correct ones."""
    chunk, places = cut[k], sorted(cut[k].problems)
    correct = [min(max(element["correct"][i] - chunk.first, 0), chunk.n) for i in places]
    return {key: element[key] for key in ("at", "benchmark", "split", "n", "seconds")} | {
        "of": len(cut), "places": places, "first": chunk.first, "samples": chunk.n, "problem_ids": [element["problem_ids"][i] for i in places],
        "correct": correct, "valid": [chunk.n] * len(places), "truncated": [0] * len(places), "length": [10 * chunk.n] * len(places), "components": {}}


def campaign(root: Path, **change: Any) -> Campaign:
    """A small campaign with the noop jobs' sizes: `change` is overlaid on the config."""
    small = {"train": {"steps": 4}, "evaluate": {"at": [0.5, 1.0], "benchmarks": {
        "easy": {"split": "easy", "problems": 8, "samples": 2, "metrics": {"acc@1": 0.5}},
        "hard": {"split": "hard", "problems": 6, "samples": 4, "metrics": {"acc@1": 0.3, "pass@4": 0.2}}}}}
    return Campaign.create(root, configuration.parse(overlay(small, change)), cache_dir=str(root.parent / "cache"))
