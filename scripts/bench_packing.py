#!/usr/bin/env python3
"""What length buckets save: attention of a microbatch in few rectangles (poise_hpc/training/buckets.py) against one as wide as the longest.

    python scripts/bench_packing.py --cells                      # counted, nothing is computed
    python scripts/bench_packing.py [--rounds 5] [--longest 1024] [--json]

--cells: 256 groups of 8, log-normal completions (mean 640 tokens, up to 3,072), prompts of 60 to 399, dealt to microbatches as in
training. `needed` are the cells that tokens may look at, `computed` those of the rectangles, whole tiles of causal kernels included; a
rectangle with a mask computes both of its halves.

Else: forward and backward of one microbatch, 4 groups of 8, log-normal completions (median 180 tokens, up to --longest), a random Qwen2 of
1M parameters with grouped-query attention, float32. Each way is a process of its own, and they take turns, a round a turn: milliseconds of CPU time,
medians; and the most resident memory beyond what was there before (VmHWM). One rectangle
is made by prices beyond all bounds.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ("buckets", "one rectangle")


def dealt(ranks: int, microbatch_tokens: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Microbatches of all ranks: prompt lengths (G,), fed tokens of the completions (B,), their groups (B,)."""
    import torch

    from poise_hpc.training.batch import deal

    rng = np.random.default_rng(0)
    prompt, group = torch.tensor(rng.integers(60, 400, 256)), torch.arange(256).repeat_interleave(8)
    length = torch.tensor(np.clip(rng.lognormal(6.3, 0.6, 2048), 20, 3072).astype(int))
    found = []
    for rows in (rows for rank in deal(torch.arange(2048), group, length, prompt, ranks, microbatch_tokens) for rows in rank if len(rows)):
        groups, index = torch.unique(group[rows], return_inverse=True)
        found.append((prompt[groups].numpy(), length[rows].numpy() - 1, index.numpy()))
    return found


def count(ranks: int, microbatch_tokens: int) -> dict[str, float]:
    from poise_hpc.training import buckets

    needed = before = computed = rows = own = number = 0
    microbatches = dealt(ranks, microbatch_tokens)
    for size, rest, group in microbatches:
        p = size[group]
        found = buckets.of_microbatch(size, rest, group)
        needed += int((size * (size + 1)).sum() // 2 + (rest * p + rest * (rest + 1) // 2).sum())
        before += int(len(size) * size.max() ** 2 + len(rest) * rest.max() * (p.max() + rest.max()))
        computed += sum(b.cells for part in found for b in part)
        rows += sum(len(b.members) * b.keys for part in found for b in part)
        own += int(size.sum() + (p + rest).sum())
        number += sum(map(len, found))
    return {"ranks": ranks, "microbatch_tokens": microbatch_tokens, "microbatches": len(microbatches), "needed": needed,
            "one rectangle": before / needed, "buckets": computed / needed, "buckets per microbatch": number / len(microbatches), "padded rows": rows / own}


def microbatch(longest: int) -> tuple[Any, ...]:
    import torch

    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 512, n).tolist() for n in rng.integers(60, 200, 4)]
    length = torch.tensor(np.clip(rng.lognormal(5.2, 0.7, 32), 20, longest).astype(int))
    length[0] = longest
    return prompts, torch.arange(4).repeat_interleave(8), torch.tensor(rng.integers(2, 512, (32, longest))), length


def work(way: str, longest: int) -> None:
    """A way as a process: one forward and backward for each line on stdin, its figures as a line on stdout."""
    import torch
    import transformers as tf

    from poise_hpc.training import buckets
    from poise_hpc.training.policy import Policy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if way == "one rectangle":
        buckets.TILE = buckets.FLOOR = 1 << 40
    policy = Policy(tf.Qwen2ForCausalLM(tf.Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)), 1.0)
    batch = microbatch(longest)
    small = [batch[0], *(x[:1] for x in batch[1:3]), batch[3][:1] * 0 + 2]
    policy(*small)[0].sum().backward()  # libraries make their workspaces once
    for _ in sys.stdin:
        policy.zero_grad()
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
        before, began = resident("VmRSS"), time.process_time()
        logp = policy(*batch)[0]
        middle = time.process_time()
        logp.sum().backward()
        ended = time.process_time()
        print(json.dumps({"forward": 1000 * (middle - began), "backward": 1000 * (ended - middle), "peak": resident("VmHWM") - before,
                          "logp": float(logp.detach().sum()), "norm": float(sum(float(p.grad.square().sum()) for p in policy.parameters()) ** 0.5)}), flush=True)
        del logp


def resident(line: str) -> int:
    """Bytes now (VmRSS) or at most since the last reset (VmHWM)."""
    found = re.search(rf"^{line}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return 1024 * int(found.group(1))


def compare(rounds: int, longest: int) -> dict[str, dict[str, float]]:
    # Freed blocks go back to the system at once: what counts is what is in use.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    sides = {way: subprocess.Popen([sys.executable, __file__, "--way", way, f"--longest={longest}"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, env=environment) for way in WAYS}
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for _ in range(rounds):
            for way, process in sides.items():
                print("go", file=process.stdin, flush=True)
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{way} ended; its error stands above")
                figures[way].append(json.loads(line))
    finally:
        for process in sides.values():
            process.kill()
    return {way: {key: statistics.median(f[key] for f in found) for key in found[0]} for way, found in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", action="store_true", help="count, compute nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # measure in this process
    given = parser.parse_args()
    if given.way:
        return work(given.way, given.longest)
    if given.cells:
        counted = [count(ranks, tokens) for ranks, tokens in ((1, 32768), (8, 32768), (1, 8192))]
        for r in [] if given.json else counted:
            print(f"{r['ranks']} rank(s), microbatches of {r['microbatch_tokens']:,} tokens ({r['microbatches']}): computed / needed cells {r['one rectangle']:.2f} in "
                  f"one rectangle, {r['buckets']:.2f} in {r['buckets per microbatch']:.1f} buckets; rows {r['padded rows']:.3f}")
    else:
        counted = compare(given.rounds, given.longest)
        for way, r in [] if given.json else counted.items():
            print(f"{way:14} forward {r['forward']:6.0f} ms   backward {r['backward']:6.0f} ms   peak {r['peak'] / 2**20:5.0f} MiB   "
                  f"sum of log p {r['logp']:.2f}   |gradient| {r['norm']:.4f}")
    if given.json:
        print(json.dumps(counted, indent=1))


if __name__ == "__main__":
    main()
