"""The training job: one run of one algorithm with one seed, an SPMD program of `ranks` processes.

Writes curves.jsonl (a row per step, reproducible to the bit), timings.jsonl, checkpoints/ and snapshots/ into its attempt
folder; resumes from the newest whole checkpoint of this or an earlier attempt.
"""
from __future__ import annotations

import platform
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import config as configuration
from .. import files, worker
from ..config import Config
from ..types import PoiseError

SHARE = 0.4  # of the GPU's memory, for vLLM's weights and cache while it samples; the update has it otherwise


def run(job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    from . import engine, process

    config = configuration.parse(job["config"])
    worker.progress("load", 0, end_of(config, job))
    process.set_up(job["threads"])
    trainer = make_trainer(config, job, engine.start())
    payload = run_steps(trainer, job, attempt_dir)
    trainer.engine.close()  # whoever evaluates now has the memory
    del trainer
    process.collect()
    return payload


def run_steps(trainer: Any, job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    """All steps from the newest checkpoint on, and what they leave behind; the payload."""
    from . import checkpoint

    config, ranks, total = trainer.config, trainer.ranks, trainer.config.train.steps
    points, end = snapshot_steps(config), end_of(config, job)
    recipe = recipe_of(config, job, ranks.world)
    done = checkpoint.resume(attempt_dir, [Path(p) for p in job["resume"]], recipe, trainer.engine, ranks)
    trainer.state = done.state if done.steps else trainer.state
    rows, snapshots, first = list(done.rows), dict(done.snapshots), ranks.rank == 0
    evaluates = "purpose" in job  # afterwards, this job: who is stopped in that must not train again
    if first:  # rows of steps that a killed process finished after its last checkpoint are made again
        files.write_atomic(attempt_dir / "curves.jsonl", "".join(files.dumps(row) + "\n" for row in rows))

    for step in range(done.steps, end):
        began, finished = time.perf_counter(), step + 1
        row, seconds = trainer.step(step)
        rows.append(row)
        if first:
            wall = time.perf_counter() - began
            files.append_line(attempt_dir / "curves.jsonl", row)
            files.append_line(attempt_dir / "timings.jsonl", timing(row, seconds, wall, config))
        worker.progress("train", finished, end, reward=row["reward"], acc=row["acc"])
        if finished in points.values():
            weights = trainer.engine.weights()
            saved = checkpoint.snapshot(attempt_dir, finished, trainer.engine.model, weights, Path(job["model"])) if first else None
            name, sha256 = ranks.gather(saved)[0]
            snapshots[name] = sha256
        stop = ranks.any(worker.stop_requested())
        due = stop or finished == end or finished % config.train.checkpoint_every == 0
        if due and (finished < total or evaluates):
            checkpoint.save(attempt_dir, checkpoint.Progress(finished, recipe, trainer.state, rows, snapshots), trainer.engine, ranks)
        if finished < end and stop:
            raise worker.Stopped(f"after step {finished} of {end}")
    if first and end == total and not evaluates:
        shutil.rmtree(attempt_dir / "checkpoints", ignore_errors=True)  # the last snapshot is the result
    names = {at: f"step-{steps:06d}" for at, steps in points.items() if steps <= end}
    return {"steps": end, "snapshots": {at: f"snapshots/{name}" for at, name in names.items()},
            "weights_sha256": snapshots[f"step-{end:06d}"], "timings": total_timing(attempt_dir), "versions": versions()}


def end_of(config: Config, job: dict[str, Any]) -> int:
    """The step to stop at: the last, or a rung's; whoever goes on from there resumes from its checkpoint."""
    return snapshot_steps(config)[job["until"]] if "until" in job else config.train.steps


def make_trainer(config: Config, job: dict[str, Any], ranks: Any) -> Any:
    """The step function with everything it needs, from the start weights."""
    import torch
    import transformers

    from ..algorithms.load import load
    from ..tasks.base import load_task
    from .engine import Engine
    from .loop import Trainer
    from .policy import Policy

    def policy(recompute: bool) -> Policy:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=getattr(torch, config.model.dtype), output_loading_info=True)
        if info["missing_keys"]:  # transformers would go on with random values
            raise PoiseError(f"the model {job['model']} lacks {', '.join(sorted(info['missing_keys'])[:5])}: it is not whole")
        return Policy(model, config.rollout.temperature, config.train.share_prompt, recompute)

    algorithm = load(Path(job["package"]), job.get("manifest"))
    engine = Engine(policy(config.train.gradient_checkpointing), config.train, config.model.dtype, ranks, sampled=config.rollout.engine == "hf")
    reference = policy(False).requires_grad_(False) if "ref_logp" in algorithm.needs else None
    task = load_task(config, job.get("data_sha256"))
    return Trainer(config, job["seed"], task, algorithm, engine, sampler_of(engine, config, Path(job["model"])), reference, ranks,
                   state=algorithm.initial_state())


def sampler_of(engine: Any, config: Config, start_model: Path) -> Any:
    """vLLM or the trained module itself. With one rank, which trains on what it has sampled, that module keeps the products for
    the first update."""
    if config.rollout.engine == "vllm":
        from ..rollout import vllm_engine

        return vllm_engine.engine(start_model, config.model.dtype, config.rollout.tensor_parallel, config.rollout.vllm, SHARE)
    from ..rollout import recall
    from ..rollout.hf_engine import HFEngine

    train = config.train
    keep = (engine.ranks.world == 1 and train.zero_stage < 3 and config.model.dtype == "float32" and train.share_prompt
            and not train.gradient_checkpointing)
    sampler = HFEngine(engine.full_model(), recall_bytes=recall.LIMIT if keep else 0)
    engine.rest()
    return sampler


def recipe_of(config: Config, job: dict[str, Any], world: int) -> dict[str, Any]:
    """What a run's numbers depend on."""
    from ..algorithms.load import manifest
    from ..tasks.base import weights_sha256

    sections = config.dump()
    sections["train"].pop("checkpoint_every")
    return {"seed": job["seed"], "ranks": world, "threads": job["threads"], "package": manifest(Path(job["package"])),
            "model": weights_sha256(Path(job["model"])), "evaluation points": list(config.evaluate.at),
            **{name: sections[name] for name in ("task", "rollout", "train")}}


def snapshot_steps(config: Config) -> dict[str, int]:
    """Training fraction ("0.25") -> finished steps, at least 1."""
    return {f"{at:g}": max(1, round(at * config.train.steps)) for at in config.evaluate.at}


def timing(row: dict[str, Any], seconds: dict[str, float], wall: float, config: Config) -> dict[str, float]:
    """Seconds of one step on rank 0, by part, and what all ranks sampled per second of the whole step."""
    tokens = row["length"] * row["groups_sampled"] * config.rollout.group_size
    parts = {name: round(value, 6) for name, value in seconds.items()}
    return {"step": row["step"], **parts, "rest": round(wall - sum(seconds.values()), 6), "wall": round(wall, 6),
            "tokens": round(tokens), "tokens_per_second": round(tokens / wall, 1)}


def total_timing(attempt: Path) -> dict[str, float]:
    """Sums over the steps this attempt has computed (repeated ones included)."""
    total: dict[str, float] = {}
    for line in files.read_lines(attempt / "timings.jsonl"):
        for name, value in line.items():
            if name not in ("step", "tokens_per_second"):
                total[name] = round(total.get(name, 0.0) + value, 6)
    return total


def versions() -> dict[str, str]:
    """Of software and machine: another CPU rounds differently, by its vector width and number of threads."""
    import torch

    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {"python": platform.python_version(), **{name: version(name) for name in ("poise_hpc", "torch", "transformers", "deepspeed")},
            "cpu": cpu[1] if cpu else platform.machine(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}
