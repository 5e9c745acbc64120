"""What a training run will take: arithmetic from token counts, seconds from what a device is assumed to reach, and both
corrected by what the campaign's own runs took.

Parts of a run: `start` (processes, weights), `rollout`, `update` (forward, backward, optimizer, what scores log-probs), `evaluate`; and the
`check` before it. Seconds are of the whole job, whose ranks work side by side.

Not covered: communication between nodes (assumed 100 GB/s a rank), queues, preemption.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import jobspec
from ..config import Config
from ..types import Stage
from .devices import Device
from .memory import SAMPLED_AT_ONCE, Lengths, itemsize, microbatch, offloaded, sampled_at_once
from .shape import Shape

PARTS = ("start", "rollout", "update", "evaluate", "check")
START_S, START_GPU_S, CHECK_S = 6.0, 60.0, 12.0  # assumed
LINK = 100e9     # bytes per second between ranks, assumed
HOST = 20e9      # and between a GPU and its host, whose cores do Adam's arithmetic
VLLM_LAYER = 0.1  # of `Device.layer_s`: its decoding steps are recorded graphs
PRIOR_SD = math.log(3)   # of the log of (measured / predicted) before anything is measured: a factor of 3 either way is no surprise
NOISE_SD = 0.35          # between runs of one campaign, until four of them are known: candidates differ in length and in what they skip


@dataclass(frozen=True)
class Tokens:
    """On average, in tokens."""

    prompt: float
    completion: float
    trained: float = 1.0   # share of the completions that the update computes; the others have zero advantage


def forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """Of `tokens` tokens that each look at `context` others: 2 a weight, and 4 a hidden unit of attention."""
    return tokens * (2 * (shape.parameters - shape.looked_up) + 4 * shape.layers * shape.width * context)


def update_flops(shape: Shape, config: Config, tokens: Tokens) -> float:
    """Of one training step over all ranks, forward and backward: 3 forwards. What gradient checkpointing computes again is
    not in it, so that time over these is the usual MFU."""
    rollout, train = config.rollout, config.train
    sequences = rollout.prompts * rollout.group_size * tokens.trained
    prompts = rollout.prompts * tokens.prompt if train.share_prompt else sequences * tokens.prompt
    once = (forward_flops(shape, prompts, tokens.prompt / 2)
            + forward_flops(shape, sequences * tokens.completion, tokens.prompt + tokens.completion / 2))
    return 3 * once * train.epochs


def predict(shape: Shape, config: Config, tokens: Tokens, lengths: Lengths, device: Device, gpu: bool) -> dict[str, float]:
    """Seconds of each part of one training run, uncorrected."""
    ranks = config.jobs.ranks
    mine = -(-config.rollout.prompts // ranks)
    steps = config.train.steps
    rollout = decode(shape, config, device, tokens, lengths, mine, config.rollout.group_size, SAMPLED_AT_ONCE, config.rollout.engine) * config.rollout.max_rounds
    evaluate = sum(decode(shape, config, device, tokens, lengths, b.problems, b.samples, config.evaluate.chunk_completions, config.evaluation_engine)
                   for b in config.evaluate.benchmarks.values())
    start = START_GPU_S if gpu else START_S
    return {"start": start, "rollout": steps * rollout, "update": steps * update(shape, config, tokens, lengths, device),
            "evaluate": evaluate * len(config.evaluate.at) + evaluation_jobs(config) * start, "check": CHECK_S}


def evaluation_jobs(config: Config) -> int:
    """Jobs that evaluate one seed's training; 0: the training job does."""
    return len(jobspec.units(config, Stage.EVALUATE)) // len(config.search.train_seeds)


def update(shape: Shape, config: Config, tokens: Tokens, lengths: Lengths, device: Device) -> float:
    """Seconds of the update of one step."""
    train, ranks, b, N = config.train, config.jobs.ranks, itemsize(config), shape.parameters
    flops = update_flops(shape, config, tokens)
    scored = 0 if config.rollout.engine == "hf" and b == 4 else 1        # a forward for the log-probs of pi_old
    passes = 3 + train.gradient_checkpointing + scored / train.epochs
    sequences = config.rollout.prompts * config.rollout.group_size * tokens.trained / ranks
    total = sequences * tokens.completion + config.rollout.prompts * tokens.prompt / ranks
    forwards = train.epochs * max(train.minibatches, total / microbatch(config, lengths))
    optimizer = train.epochs * train.minibatches
    zero = train.deepspeed.get("zero_optimization", {})
    parts = ranks if train.zero_stage else 1
    moved = optimizer * 2 * b * N if ranks > 1 else 0.0                 # gradients reduced, weights gathered
    moved += forwards * 3 * b * N if train.zero_stage == 3 and ranks > 1 else 0.0
    host = optimizer * 16 * N / parts if offloaded(zero, "optimizer") else 0.0
    host += forwards * 3 * b * N if offloaded(zero, "param") else 0.0
    return (flops * passes / 3 / ranks / (device.flops * device.update_share) + forwards * 3 * shape.layers * device.layer_s
            + moved / LINK + host / HOST + optimizer * 16 * N / parts / device.bandwidth)


def decode(shape: Shape, config: Config, device: Device, tokens: Tokens, lengths: Lengths, prompts: int, n: int, at_once: int,
           engine: str) -> float:
    """Seconds to sample n completions of each prompt on one rank: arithmetic, or reading weights and cache, whichever takes
    longer; and what every step costs however small it is."""
    b, rows = itemsize(config), prompts * n
    batches = -(-prompts // sampled_at_once(shape, config, lengths, n, at_once)) if engine == "hf" else 1
    steps = batches * lengths.completion                        # somebody always runs to the end
    context = tokens.prompt + tokens.completion / 2
    flops = forward_flops(shape, prompts * tokens.prompt, tokens.prompt / 2) + forward_flops(shape, rows * tokens.completion, context)
    read = steps * b * shape.parameters + rows * tokens.completion * context * shape.kv_per_token * b
    layer_s = device.layer_s * (VLLM_LAYER if engine == "vllm" else 1.0)
    return (max(flops / device.flops, read / device.bandwidth) / device.rollout_share) + steps * shape.layers * layer_s


# --- learning from what was measured


@dataclass(frozen=True)
class Correction:
    """Of one part: measured over predicted seconds, as a log-normal posterior."""

    runs: int
    factor: float = 1.0
    spread: float = math.exp(1.645 * math.hypot(PRIOR_SD, NOISE_SD))  # 90 % of runs are within factor / spread .. factor * spread


def correct(ratios: Sequence[float]) -> Correction:
    """From (measured / predicted) of some runs. With x = log ratio ~ Normal(mu, NOISE_SD^2) and mu ~ Normal(0, PRIOR_SD^2), the
    posterior mean of mu is the sum of x, shrunk to 0 as if 1 / PRIOR_SD^2 stood against n / NOISE_SD^2."""
    x = [math.log(r) for r in ratios if r > 0]
    if not x:
        return Correction(0)
    mean = sum(x) / len(x)
    noise = max(0.05, math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1))) if len(x) >= 4 else NOISE_SD
    precision = 1 / PRIOR_SD**2 + len(x) / noise**2
    sd = math.sqrt(1 / precision + noise**2)
    return Correction(len(x), math.exp(sum(x) / noise**2 / precision), math.exp(1.645 * sd))
