#!/usr/bin/env python3
"""The memory estimate of `poise-hpc plan` against what training takes: random models on the CPU, rank by rank.

    python scripts/bench_plan.py [--model gpt2-1m qwen2-1m gpt2-20m qwen2-20m qwen2-100m] [--zero 0 1 2 3] [--ranks 1 2] [--json]

Measured is the peak of resident memory of rank 0 (VmHWM, reset before each phase) over what the process held before the model was made, once
a tiny one had gone the same way; the estimate is without its line for the interpreter. Two microbatches, then the optimizer's step, twice; completions as long as they may be.
On a GPU the same comparison is a part of scripts/gpu_check.sh.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT, COMPLETION, GROUP, PROMPTS = 16, 48, 8, 2
# kind, width, layers, heads, symbols
MODELS = {"gpt2-1m": ("gpt2", 128, 5, 4, 512), "qwen2-1m": ("qwen2", 128, 5, 4, 512), "gpt2-20m": ("gpt2", 512, 6, 8, 2048),
          "qwen2-20m": ("qwen2", 512, 6, 8, 2048), "qwen2-100m": ("qwen2", 768, 12, 12, 8192)}


def make(kind: str, width: int, layers: int, heads: int, symbols: int) -> Any:
    import torch
    import transformers as tf

    torch.manual_seed(0)
    common = {"vocab_size": symbols, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=256, **common))
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=heads,
                                              num_key_value_heads=heads // 2, max_position_embeddings=256, tie_word_embeddings=True, **common))


def settings(zero: int, ranks: int, recompute: bool) -> Any:
    from poise_hpc import config

    return config.parse({"rollout": {"prompts": PROMPTS * ranks, "group_size": GROUP}, "jobs": {"ranks": ranks}, "train": {
        "minibatches": 1, "zero_stage": zero, "gradient_checkpointing": recompute, "microbatch_tokens": PROMPTS // 2 * (PROMPT + GROUP * COMPLETION)}})


def held(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def rank(names: list[str], stages: list[int], ranks: int, recompute: bool) -> None:
    """One rank: print a line for each model and stage."""
    import torch
    import transformers

    from poise_hpc.planning import memory, shape
    from poise_hpc.training import engine

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    here = engine.start()
    for name in names:
        for zero in stages:
            config = settings(zero, ranks, recompute)
            update(MODELS[name][0], (32, 1, 2, 512), config, here)  # what libraries load and keep is not the model's
            gc.collect()
            before = held("VmRSS")
            model, peaks = update(MODELS[name][0], MODELS[name][1:], config, here)
            sizes = shape.of_model(model)
            found = memory.estimate(sizes, config, memory.Lengths(PROMPT, COMPLETION, COMPLETION), gpu=False)
            estimates = {phase: found.phase(phase) - memory.CPU_CONTEXT for phase in peaks}
            measured = {phase: peak - before for phase, peak in peaks.items()}
            if here.rank == 0:
                print(json.dumps({"model": name, "parameters": sizes.parameters, "zero": zero, "ranks": ranks, "recompute": recompute,
                                  "context": before, "measured": measured, "estimated": estimates,
                                  "ratio": max(estimates.values()) / max(measured.values())}), flush=True)
            del model


def update(kind: str, size: tuple[int, ...], config: Any, here: Any) -> tuple[Any, dict[str, int]]:
    """The model after two updates, and the peaks of resident memory in the phases of the second."""
    import torch

    from poise_hpc.training import engine
    from poise_hpc.training.policy import Policy

    policy = Policy(make(kind, *size), 1.0, True, config.train.gradient_checkpointing)
    learner = engine.Engine(policy, config.train, "float32", here)
    prompts = [[1 + i] * PROMPT for i in range(PROMPTS // 2)]
    group = torch.arange(PROMPTS // 2).repeat_interleave(GROUP)
    tokens = torch.randint(1, 500, (len(group), COMPLETION))
    peaks: dict[str, int] = {}
    for _ in range(2):
        for phase in ("backward", "step"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            if phase == "step":
                learner.step(1e-4)
            for _ in range(2 if phase == "backward" else 0):
                logp, _ = learner(prompts, group, tokens, torch.full((len(group),), COMPLETION))
                learner.backward(logp.sum() / logp.numel())
                del logp
            peaks[phase] = held("VmHWM")
    return policy.model, peaks


def measure(names: list[str], stages: list[int], ranks: int, recompute: bool) -> Iterator[dict[str, Any]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Freed blocks go back to the system at once: what counts is what is in use.
    environment = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                                "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    order = json.dumps([names, stages, ranks, recompute])
    running = [subprocess.Popen([sys.executable, __file__, "--rank", order], env=environment | {"RANK": str(i), "LOCAL_RANK": str(i)},
                                stdout=subprocess.PIPE, text=True) for i in range(ranks)]
    try:
        yield from (json.loads(line) for line in running[0].stdout if line.startswith("{"))
        if any(process.wait() for process in running):
            raise SystemExit(f"{ranks} rank(s) failed; the error stands above")
    finally:
        for process in running:
            process.kill()


def row(r: dict[str, Any]) -> str:
    mib = {key: {phase: f"{value / 2**20:.0f}" for phase, value in r[key].items()} for key in ("measured", "estimated")}
    return (f"| {r['model']}{', recomputed' if r['recompute'] else ''} | {r['parameters'] / 1e6:.1f} | {r['zero']} | {r['ranks']} | "
            + " | ".join(f"{mib['estimated'][phase]} / {mib['measured'][phase]}" for phase in ("backward", "step")) + f" | {r['ratio']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["gpt2-1m", "qwen2-1m", "gpt2-20m", "qwen2-20m", "qwen2-100m"])
    parser.add_argument("--zero", nargs="+", type=int, choices=range(4), default=[0, 1, 2])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--recompute", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        return rank(*json.loads(arguments.rank))
    results = []
    if not arguments.json:
        print("| model | M parameters | ZeRO | ranks | backward: estimated / measured, MiB | step: estimated / measured, MiB | ratio of the peaks |\n" + "|---" * 7 + "|")
    for ranks in arguments.ranks:
        for result in measure(arguments.model, arguments.zero, ranks, arguments.recompute):
            results.append(result)
            if not arguments.json:
                print(row(result), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
