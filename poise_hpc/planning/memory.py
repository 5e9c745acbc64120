"""What one rank's memory holds, line by line, before anything runs.

Symbols: N parameters, b bytes of one in the model's type (4 or 2), R ranks, h hidden, I feed-forward width, W width of all heads,
V vocabulary, m tokens of a microbatch (`train.microbatch_tokens`), B its completions, n those of a group, P the longest prompt and C a completion, in
tokens. Each line says in which phases of a training job it is there; the peak is the phase that needs most:

    rollout    the policy samples           backward   the last microbatch of an update: all that autograd keeps is alive
    step       the optimizer, after it      evaluate   saved weights are sampled from, the trainer is gone

How far it is off is measured in docs/PLAN.md. Not covered: models whose layers differ from each other (experts), tensor parallelism.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import Config
from .devices import GIB
from .shape import Shape

PHASES = ("rollout", "backward", "step", "evaluate")
TRAINING = PHASES[:3]
BUCKET = 500_000_000          # DeepSpeed's default reduce_bucket_size, in numbers
LIVE = 1_000_000_000          # and stage3_max_live_parameters
GPU_CONTEXT = 1.5 * GIB       # CUDA and NCCL, kernels loaded. Assumed
CPU_CONTEXT = 0.75 * GIB      # Python with torch, transformers and deepspeed: docs/PLAN.md
SLACK = 0.05                  # of the rest: what the allocator holds and cannot use. Assumed
PADDED = 1.15                 # rows of attention's rectangles over those of completions: docs/TRAINER.md
SAMPLED_AT_ONCE = 1024        # completions in one batch: rollout.hf_engine


@dataclass(frozen=True)
class Lengths:
    """Of the task, in tokens."""

    prompt: int       # the longest
    completion: int   # the longest, max_new_tokens
    mean: float       # completion, on average


@dataclass(frozen=True)
class Line:
    name: str
    arithmetic: str
    bytes: float
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    lines: tuple[Line, ...]
    lacks: str = ""       # why it could not even start

    def phase(self, name: str) -> float:
        return sum(line.bytes for line in self.lines if name in line.phases)

    @property
    def worst(self) -> str:
        return max(PHASES, key=self.phase)

    @property
    def peak(self) -> float:
        """Bytes."""
        return self.phase(self.worst)


def estimate(shape: Shape, config: Config, lengths: Lengths, memory_gb: float | None = None, gpu: bool = True, reference: bool = False) -> Estimate:
    """Of one rank's GPU, which has `memory_gb` GiB, or of its share of the host's memory. `reference`: the algorithm asks for
    reference log-probs."""
    lines = [line for line in (*state(shape, config, gpu, reference), *activations(shape, config, lengths, gpu), *loss(shape, config, lengths),
                               *sampling(shape, config, lengths, memory_gb), *evaluation(shape, config, lengths)) if line.bytes and line.phases]
    context = Line("context", "CUDA, NCCL and kernels; assumed" if gpu else "Python, torch, transformers, deepspeed", GPU_CONTEXT if gpu else
                   CPU_CONTEXT, PHASES)
    slack = [Line("allocator", f"{SLACK:.0%} of the {phase} lines; assumed", SLACK * sum(x.bytes for x in lines if phase in x.phases), (phase,))
             for phase in PHASES] if gpu else []
    return Estimate((*lines, context, *slack), vllm_lacks(shape, config, lengths, memory_gb))


def state(shape: Shape, config: Config, gpu: bool, reference: bool) -> list[Line]:
    """Weights, gradients and optimizer, by ZeRO stage (Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1), with the buffers
    that DeepSpeed 0.19 has beside them."""
    N, b, z, R = shape.parameters, itemsize(config), config.train.zero_stage, config.jobs.ranks
    zero = config.train.deepspeed.get("zero_optimization", {})
    offload, offload_weights = offloaded(zero, "optimizer"), offloaded(zero, "param")
    parts, mixed = (R if z else 1), b < 4
    per = f" / {R}" if z and R > 1 else ""
    bucket = min(float(zero.get("reduce_bucket_size", BUCKET)), BUCKET if gpu else N) * (2 if zero.get("overlap_comm", z == 3) else 1)
    lines = []
    if z < 3:
        lines.append(Line("weights", f"{b} x {N:,}", b * N, TRAINING))
    else:
        lines += [Line("weights, own share", f"{b} x {N:,} / {R}", 0 if offload_weights else b * N / R, TRAINING),
                  Line("weights, gathered", f"{b} x {min(N, LIVE):,} (stage3_max_live_parameters)", b * min(N, LIVE), ("backward",))]
        if config.rollout.engine == "hf":  # vLLM has its own
            lines.append(Line("weights, to sample from", f"{b} x {N:,}: no rank has whole weights under ZeRO-3", b * N, ("rollout",)))
    if not offload:
        if z or mixed:
            lines.append(Line("master weights, float32", f"4 x {N:,}{per}", 4 * N / parts, TRAINING))
        lines.append(Line("Adam's two moments", f"8 x {N:,}{per}", 8 * N / parts, TRAINING))
        if z > 1 or z and not mixed:
            lines.append(Line("gradients, for the optimizer", f"4 x {N:,}{per}", 4 * N / parts, ("step",)))
    share, late = (R if z >= 2 else 1), ("backward", "step")
    if z < 2 or not mixed:
        lines.append(Line("gradients", f"{b} x {N:,}" + (f" / {R}" if share > 1 else ""), 0 if offload and z >= 2 else b * N / share, late))
    if mixed:
        lines.append(Line("gradients, their sum in float32", f"4 x {N:,}" + (f" / {R}" if share > 1 else ""), 0 if offload else 4 * N / share, late))
    if z:
        lines.append(Line("reduction bucket", f"{b} x {bucket:,.0f} (reduce_bucket_size)", b * bucket, ("backward",)))
    elif R > 1:
        lines.append(Line("reduction bucket", f"{b} x {min(N, BUCKET):,}", b * min(N, BUCKET), ("step",)))
    if reference:
        lines.append(Line("reference weights", f"{b} x {N:,}", b * N, TRAINING))
    return [*lines, Line("weights", f"{b} x {N:,}", b * N, ("evaluate",))]


def activations(shape: Shape, config: Config, lengths: Lengths, gpu: bool) -> list[Line]:
    """What autograd keeps for the backward of one microbatch. tests/test_plan_memory.py counts it in real models."""
    b, layers, n, packed = itemsize(config), shape.layers, config.rollout.group_size, config.train.share_prompt
    m = microbatch(config, lengths)
    B = m * n / (lengths.prompt + n * lengths.mean) if packed else m / (lengths.prompt + lengths.mean)
    token, (completion, mask) = b * per_token(shape, b), attention(shape, b, lengths, n, packed, gpu)
    layer, text = m * token + B * completion, f"{m:,} tokens x {token:,.0f} + {B:.1f} completions x {completion:,.0f}"
    if config.train.gradient_checkpointing:
        kept = [Line("layers' inputs", f"{m:,} tokens x {b} x {shape.hidden:,} x {layers} layers", m * b * shape.hidden * layers, ("backward",)),
                Line("one layer, recomputed", text, layer, ("backward",))]
    else:
        kept = [Line("activations", f"({text}) x {layers} layers", layers * layer, ("backward",))]
    ends, flight = shape.hidden * (norm(shape, b) + b), b * (2 * shape.intermediate + 2 * shape.hidden)
    return [*kept, Line("attention masks", f"{B:.1f} completions x {mask:,.0f}, for all layers", B * mask, ("backward",)),
            Line("last norm and hidden states", f"{m:,} tokens x {ends:,}", m * ends, ("backward",)),
            Line("gradients of activations", f"{m:,} tokens x {flight:,}: those of a feed-forward part", m * flight, ("backward",))]


def microbatch(config: Config, lengths: Lengths) -> int:
    """Tokens of the largest microbatch: as many as allowed, or all that one rank has of a minibatch with nothing but longest ones."""
    n = config.rollout.group_size
    group = lengths.prompt + n * lengths.completion if config.train.share_prompt else n * (lengths.prompt + lengths.completion)
    groups = -(-config.rollout.prompts // (config.jobs.ranks * config.train.minibatches))
    return max(min(config.train.microbatch_tokens, groups * group), lengths.prompt + lengths.completion)


def per_token(shape: Shape, b: int) -> float:
    """Numbers of the model's type that one layer keeps of a token, beside attention: two norms; the feed-forward part (gate, its SiLU,
    up and their product; or five steps of GELU); what attention's output projection reads."""
    return 2 * norm(shape, b) * shape.hidden / b + (4 if shape.gated else 5) * shape.intermediate + shape.width


def norm(shape: Shape, b: int) -> int:
    """Bytes that one norm keeps of a token, per hidden unit: RMSNorm its input in float32, what it normalized, its output; LayerNorm
    input and output."""
    return 4 + 2 * b if shape.gated else 2 * b


def attention(shape: Shape, b: int, lengths: Lengths, n: int, packed: bool, gpu: bool) -> tuple[float, float]:
    """Bytes that attention keeps of an average completion: in one layer, and its mask, which all layers share. W: the queries of all
    heads; K: keys as they are kept, repeated for all of them where a GPU's kernel wants that."""
    from ..training import buckets

    P, W = lengths.prompt, shape.width
    if not packed:
        return 4 * b * W * (P + lengths.completion), 0   # queries, keys, values, output
    C = min(PADDED * lengths.mean, lengths.completion)
    whole = buckets.whole(P, int(C), P + int(C))         # with its prompt's queries, without a mask
    K = W if gpu and (b == 4 or not whole) else shape.kv_heads * shape.head_dim
    queries, keys = (P + C if whole else C) + P / n, P + C + P / n   # the prompt's own once per group
    return 2 * b * (W * queries + K * keys), 0 if whole else b * C * (P + C)


def loss(shape: Shape, config: Config, lengths: Lengths) -> list[Line]:
    """Log-probs of a microbatch, at their backward."""
    from ..training import logprobs

    m, V, h, b = microbatch(config, lengths), shape.vocabulary, shape.hidden, itemsize(config)
    if V >= logprobs.LARGE and m * V > logprobs.AT_ONCE:
        found = logprobs.peak_bytes(m, V, h, b)
        return [Line(f"loss, {name}", f"{logprobs.AT_ONCE:,} logits at a time" if name == "logits" else f"{value / GIB:.2f} GiB", value, ("backward",))
                for name, value in found.items()]
    each = 8 if b == 4 else b + 8
    return [Line("loss, logits", f"{m:,} tokens x {V:,} x {each}", m * V * each, ("backward",))]


def sampling(shape: Shape, config: Config, lengths: Lengths, memory_gb: float | None) -> list[Line]:
    """Cache and logits of the sampler, in training."""
    n = config.rollout.group_size
    if config.rollout.engine == "vllm":
        share = vllm_share(config)
        return [Line("vLLM, its weights and cache", f"{share:g} of {memory_gb or 0:g} GiB (rollout.vllm.gpu_memory_utilization); it sleeps during the update",
                     share * (memory_gb or 0) * GIB, ("rollout",))]
    mine = -(-config.rollout.prompts // config.jobs.ranks)
    return cache(shape, itemsize(config), lengths, min(mine, sampled_at_once(shape, config, lengths, n)), n, ("rollout",))


def sampled_at_once(shape: Shape, config: Config, lengths: Lengths, n: int, most: int = SAMPLED_AT_ONCE) -> int:
    """Prompts in one batch of the transformers sampler."""
    from ..rollout.kv_cache import prompts_at_once

    return prompts_at_once(most, n, lengths.prompt, lengths.completion, shape.kv_per_token * itemsize(config))


def vllm_lacks(shape: Shape, config: Config, lengths: Lengths, memory_gb: float | None) -> str:
    """Why vLLM would not start in training: its share must hold its part of the weights and the cache of one completion at least."""
    parts, share = config.rollout.tensor_parallel, vllm_share(config)
    if config.rollout.engine != "vllm" or memory_gb is None:
        return ""
    weights, kept = (itemsize(config) * numbers / GIB for numbers in (shape.parameters, shape.kv_per_token * (lengths.prompt + lengths.completion)))
    if (weights + kept) / parts <= share * memory_gb:
        return ""
    return (f"vLLM's share of a GPU is {share * memory_gb:.1f} GiB, its part of the weights {weights / parts:.1f} and one completion's cache "
            f"{kept / parts:.1f}: a larger rollout.vllm.gpu_memory_utilization than {share:g}, or rollout.tensor_parallel: {2 * parts}, was wanted")


def vllm_share(config: Config) -> float:
    from ..training.job import SHARE

    return float(config.rollout.vllm.get("gpu_memory_utilization", SHARE))


def evaluation(shape: Shape, config: Config, lengths: Lengths) -> list[Line]:
    """The largest batch of any benchmark, with the transformers engine; vLLM fits its cache to what there is."""
    if config.evaluation_engine == "vllm":
        return []
    most = config.evaluate.chunk_completions
    batches = [(min(x.problems, sampled_at_once(shape, config, lengths, n, most)), n) for x in config.evaluate.benchmarks.values() for n in [min(x.samples, most)]]
    prompts, n = max(batches, key=lambda batch: batch[0] * (lengths.prompt + batch[1] * lengths.completion))
    return cache(shape, itemsize(config), lengths, prompts, n, ("evaluate",))


def cache(shape: Shape, b: int, lengths: Lengths, prompts: int, n: int, phases: tuple[str, ...]) -> list[Line]:
    kept, rows = shape.kv_per_token, prompts * n
    # Per row: the logits, and in float32 scaled, normalized and as probabilities; their sums in float64.
    each = b + 4 + 4 + 4 + 8
    return [Line("cache of keys and values", f"{kept:,} x {b} x ({rows:,} completions x {lengths.completion:,} + {prompts:,} prompts x {lengths.prompt:,})",
                 kept * b * (rows * lengths.completion + prompts * lengths.prompt), phases),
            Line("logits of the last tokens", f"{rows:,} x {shape.vocabulary:,} x {each}", rows * shape.vocabulary * each, phases)]


def itemsize(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


def offloaded(zero: dict[str, Any], what: str) -> bool:
    """Does DeepSpeed keep the "optimizer" or the "param"eters on the host (or its disk)?"""
    return (zero.get(f"offload_{what}") or {}).get("device", "none") not in (None, "none")
