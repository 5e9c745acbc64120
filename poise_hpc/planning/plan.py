"""`poise-hpc plan`: will it fit, and what will it cost? Asked before anything is submitted.

Plain data first (`--json` prints it as it is), then text. The memory of one rank is `memory.py`, seconds are `cost.py`.
"""
from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import config as configuration
from ..campaign import Campaign
from ..config import Config
from ..settings import overlay
from ..site import Site
from ..types import PoiseError, UsageError
from . import cost, devices, measured, memory, shape
from .devices import GIB, Device
from .memory import Estimate, Lengths
from .shape import Shape

LOOKED_AT = 64      # training problems, for the prompts' lengths
ANSWER = 0.4        # mean completion as a share of the limit, until runs have been seen. Assumed
PROMPT = 0.25       # mean prompt as a share of the limit, where the problems are not here. Assumed
TIGHT = 0.9         # of the memory: beyond that, a warning


@dataclass(frozen=True)
class Setting:
    """What is planned, and on what."""

    shape: Shape
    config: Config
    site: Site | None
    device: Device
    gpu: bool
    lengths: Lengths
    tokens: cost.Tokens
    reference: bool = False

    def memory(self, config: Config | None = None) -> Estimate:
        return memory.estimate(self.shape, config or self.config, self.lengths, self.device.memory_gb, self.gpu, self.reference)

    def seconds(self, config: Config | None = None) -> dict[str, float]:
        return cost.predict(self.shape, config or self.config, self.tokens, self.lengths, self.device, self.gpu)

    def fits(self, found: Estimate) -> bool | None:
        return None if self.device.memory_gb is None else not found.lacks and found.peak <= self.device.memory_gb * GIB


def plan(config: Config, site: Site | None = None, campaign: Campaign | None = None, model: Path | None = None) -> dict[str, Any]:
    """Everything that `poise-hpc plan` says."""
    runs = measured.runs(campaign) if campaign else []
    setting, assumed = look(config, site, runs, model)
    return {"model": asdict(setting.shape), "device": asdict(setting.device) | {"gpu": setting.gpu}, "ranks": config.jobs.ranks,
            "lengths": asdict(setting.lengths) | asdict(setting.tokens), "assumed": assumed, "memory": memory_data(setting, setting.memory()),
            "cost": costs(setting, runs, campaign)}


def look(config: Config, site: Site | None, runs: list[measured.Run], model: Path | None) -> tuple[Setting, list[str]]:
    """The setting, and what in it is assumed rather than known."""
    assumed: list[str] = []
    prompt, longest, limit = prompts(config, assumed)
    length, trained = ANSWER * limit, 1.0
    if runs:
        length, trained = fmean(r.length for r in runs), fmean(r.trained for r in runs)
    else:
        assumed.append(f"completions of {length:.0f} tokens on average, {ANSWER:g} of the limit, and none that the update may skip: no run has ended yet")
    gpu = bool(site and site.gpus)
    device = device_of(config, site, assumed)
    return Setting(shape.of_campaign(config, model), config, site, device, gpu, Lengths(longest, limit, length),
                   cost.Tokens(prompt, length, trained), needs_reference(config)), assumed


def prompts(config: Config, assumed: list[str]) -> tuple[float, int, int]:
    """Tokens: the mean prompt and the longest of some training problems, and the completions' limit."""
    from ..tasks.base import load_task

    try:
        task = load_task(config)
        sizes = [len(task.train_problem(0, i).prompt) for i in range(LOOKED_AT)]
        return fmean(sizes), max(sizes), task.max_new_tokens
    except PoiseError as error:
        options = config.task.options
        if "max_new_tokens" not in options:
            raise
        most = options.get("max_prompt_tokens", 1024)
        assumed.append(f"prompts of {PROMPT * most:.0f} tokens, at most {most}: the problems are not here ({str(error).splitlines()[0]})")
        return PROMPT * most, most, options["max_new_tokens"]


def needs_reference(config: Config) -> bool:
    """Does the baseline ask for reference log-probs? A candidate may, where the baseline does not."""
    from ..algorithms.seeds import SEEDS, seed

    return config.search.baseline in SEEDS and "ref_logp" in seed(config.search.baseline).needs


def device_of(config: Config, site: Site | None, assumed: list[str]) -> Device:
    """A site's GPU by its `device`, else by its `type` if that is a known name, else an A100's speed and no known memory."""
    if site is None or site.gpus is None:
        assumed.append("a CPU core's speed: 95 GFLOP/s in large matrix products")
        return devices.cpu(config.jobs.threads, config.jobs.memory_gb)
    gpus = site.gpus
    try:
        found = devices.find(gpus.device or gpus.type or "")
    except UsageError:
        if gpus.device:
            raise
        found = devices.with_memory(devices.GPUS["a100"], None)
        assumed.append("the speed of an A100: the site file does not say which GPU it has (gpus.device)")
    assumed.append(f"{found.update_share:.0%} of the {found.name}'s data sheet in the update, {found.rollout_share:.0%} while sampling")
    return devices.with_memory(found, gpus.memory_gb or found.memory_gb)


# --- what it will cost


def costs(setting: Setting, runs: list[measured.Run], campaign: Campaign | None) -> dict[str, Any]:
    """Seconds by part, corrected by the runs, and what they add up to."""
    config, site = setting.config, setting.site
    predicted = setting.seconds()
    learned = {part: cost.correct([r.seconds[part] / predicted[part] for r in runs if part in r.seconds]) for part in cost.PARTS}
    seconds = {part: predicted[part] * learned[part].factor for part in cost.PARTS}
    by_train, ranks, seeds = config.jobs.evaluate_by == "train", config.jobs.ranks, len(config.search.train_seeds)
    trained = seconds["start"] + seconds["rollout"] + seconds["update"]
    job = trained + (seconds["evaluate"] if by_train else 0.0)
    alone = 0.0 if by_train else seconds["evaluate"]
    again = seconds["start"] * ranks * sum(r.seeds for r in config.screen.rungs)  # who is promoted starts once more
    hours = (seeds * (job * ranks + alone) + again + seconds["check"]) / 3600
    candidates = config.search.candidates + 1
    left = candidates - (len(campaign.archived_ids()) if campaign else 0)
    slots = site.max_submit if site and site.scheduler == "slurm" else config.jobs.max_parallel
    slots = min(seeds * config.search.width(slots), slots)
    limits = {"train": (job, config.jobs.train_min)} | ({} if by_train else {"evaluate": (alone / cost.evaluation_jobs(config), config.jobs.evaluate_min)})
    return {"seconds": {part: {"assumed": predicted[part], "factor": learned[part].factor, "spread": learned[part].spread,
                               "runs": learned[part].runs, "predicted": seconds[part],
                               "measured": fmean(known) if (known := [r.seconds[part] for r in runs if part in r.seconds]) else None}
                        for part in cost.PARTS},
            # As if all parts were off together, each in proportion to its time.
            "spread": math.exp(sum(seconds[p] * math.log(learned[p].spread) for p in cost.PARTS) / sum(seconds.values())),
            "rung_hours": rung_hours(config, seconds), "error": ahead(predicted, runs), "job_minutes": job / 60, "unit": "GPU-hours" if setting.gpu else "core-hours" if config.jobs.threads == 1
            else "rank-hours", "candidate_hours": hours, "candidates": candidates, "campaign_hours": candidates * hours,
            "left": max(left, 0), "left_hours": max(left, 0) * hours, "slots": slots,
            "left_wall_hours": max(left, 0) * seeds * (job + alone) / slots / 3600,
            "over_limit": [f"a {stage} job is predicted to run {value / 60:.0f} min, jobs.{stage}_min allows {minutes:g}"
                           for stage, (value, minutes) in limits.items() if value > 60 * minutes]}


def rung_hours(config: Config, seconds: dict[str, float]) -> list[float]:
    """What a candidate has used when a rung ends it, for each of them. Evaluation is as much at each point."""
    rungs, out = config.screen.rungs, []
    for count in range(1, len(rungs) + 1):
        # at: how far a seed has come
        spent = [(starts, max((r.at for r in rungs[:count] if r.seeds > seed), default=0.0))
                 for seed in range(len(config.search.train_seeds)) if (starts := sum(r.seeds > seed for r in rungs[:count]))]
        evaluated = sum(sum(p <= at for p in config.evaluate.at) / len(config.evaluate.at) for _, at in spent) * seconds["evaluate"]
        trained = sum(starts * seconds["start"] + at * (seconds["rollout"] + seconds["update"]) for starts, at in spent) * config.jobs.ranks
        by_train = config.jobs.evaluate_by == "train"
        out.append((trained + evaluated * (config.jobs.ranks if by_train else 1) + seconds["check"]) / 3600)
    return out


def ahead(predicted: dict[str, float], runs: list[measured.Run]) -> dict[str, float] | None:
    """How far off was each run's prediction that only earlier candidates' runs had corrected? Means of |log(measured / predicted)|
    of the whole run, as factors: before any correction, and with it."""
    plain, corrected = [], []
    for run in runs:
        before = [r for r in runs if r.candidate < run.candidate]
        known = [part for part in run.seconds if part != "check"]
        total = sum(run.seconds[part] for part in known)
        plain.append(abs(math.log(total / sum(predicted[part] for part in known))))
        if before:
            sure = sum(predicted[part] * cost.correct([r.seconds[part] / predicted[part] for r in before if part in r.seconds]).factor for part in known)
            corrected.append(abs(math.log(total / sure)))
    if not corrected:
        return None
    return {"runs": len(corrected), "assumed_factor": math.exp(fmean(plain)), "predicted_factor": math.exp(fmean(corrected))}


# --- when it does not fit


def ways_out(setting: Setting) -> list[dict[str, Any]]:
    """Up to three sets of changes that fit, the cheapest in time first; none that contains another."""
    found: list[tuple[float, frozenset[str], Config]] = []
    for names, config in variants(setting.config):
        if (smaller := fitting(setting, config)) is not None:
            cut = set() if smaller is config else {f"train.microbatch_tokens: {smaller.train.microbatch_tokens}"}
            seconds = setting.seconds(smaller)
            found.append((seconds["rollout"] + seconds["update"], frozenset({*names} | cut), smaller))
    least = [way for way in found if not any(other[1] < way[1] for other in found)]
    return [{"change": ", ".join(sorted(changes)), "peak": setting.memory(config).peak, "run_seconds": seconds}
            for seconds, changes, config in sorted(least, key=lambda way: (way[0], len(way[1])))[:3]]


def variants(config: Config) -> Iterator[tuple[list[str], Config]]:
    """The config with up to two of the usual changes, none of which changes what is learned."""
    zero = config.train.zero_stage
    moves: list[tuple[str, dict[str, Any]]] = [("train.gradient_checkpointing: true", {"train": {"gradient_checkpointing": True}})]
    moves += [(f"train.zero_stage: {z}", {"train": {"zero_stage": z}}) for z in range(zero + 1, 4)] if config.jobs.ranks > 1 else []
    moves += [("train.deepspeed: {zero_optimization: {offload_optimizer: {device: cpu}}}" + ("" if zero else ", train.zero_stage: 1"),
               {"train": {"zero_stage": max(zero, 1), "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}})]
    for count in range(3):
        for chosen in combinations(moves, count):
            names = [name for name, _ in chosen]
            if sum("zero_stage" in name for name in names) > 1:
                continue
            data = config.dump()
            for _, change in chosen:
                data = overlay(data, change)
            yield names, configuration.parse(data)


def fitting(setting: Setting, config: Config) -> Config | None:
    """This config, with smaller microbatches if need be; None if nothing helps."""
    if setting.fits(setting.memory(config)):
        return config
    tokens = config.train.microbatch_tokens
    while tokens > setting.lengths.prompt + setting.lengths.completion:
        tokens //= 2
        smaller = configuration.parse(overlay(config.dump(), {"train": {"microbatch_tokens": tokens}}))
        if setting.fits(setting.memory(smaller)):
            return smaller
    return None


def check(config: Config, site: Site, force: bool = False) -> str:
    """Before the first submission: UsageError if a training job cannot fit the GPUs that the site file describes; a warning, or ""."""
    if site.gpus is None or not (site.gpus.memory_gb or site.gpus.device):
        return ""
    if importlib.util.find_spec("torch") is None:
        return "memory is not checked: this host has no torch; `poise-hpc plan` elsewhere tells whether a training job fits"
    setting, _ = look(config, site, [], None)
    found = setting.memory()
    fits = setting.fits(found)
    if fits is False and not force:
        raise UsageError(refusal(memory_data(setting, found)) + "\n`poise-hpc plan` shows every line; --force submits nevertheless")
    limit = setting.device.memory_gb or 0.0
    return "" if found.peak <= TIGHT * limit * GIB else f"warning: the {found.worst} needs about {found.peak / GIB:.1f} of a GPU's {limit:g} GiB"


def memory_data(setting: Setting, found: Estimate) -> dict[str, Any]:
    fits, limit = setting.fits(found), setting.device.memory_gb
    return {"lines": [asdict(line) for line in found.lines], "phases": {p: found.phase(p) for p in memory.PHASES}, "peak": found.peak,
            "worst": found.worst, "lacks": found.lacks, "limit_gb": limit, "fits": fits, "tight": bool(fits) and found.peak > TIGHT * (limit or 0) * GIB,
            "ways_out": [] if fits is not False else ways_out(setting)}


def refusal(data: dict[str, Any]) -> str:
    if data["lacks"]:
        return f"does not fit: {data['lacks']}"
    lines = [f"does not fit: {data['worst']} needs {data['peak'] / GIB:.1f} GiB a rank, there are {data['limit_gb']:g}"]
    lines += [f"  {line['bytes'] / GIB:8.2f}  {line['name']}" for line in
              sorted((x for x in data["lines"] if data["worst"] in x["phases"]), key=lambda x: -x["bytes"])[:5]]
    if data["worst"] == "evaluate":
        lines.append("a smaller evaluate.chunk_completions needs less")
    lines += ["ways out, the fastest first:" if data["ways_out"] else "no change of train.* fits: more ranks, GPUs with more memory, rollout.engine "
              "vllm, or a smaller model would"]
    lines += [f"  {way['peak'] / GIB:8.2f}  {way['change']}" for way in data["ways_out"]]
    return "\n".join(lines)
