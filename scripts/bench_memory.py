#!/usr/bin/env python3
"""What the loss over a large vocabulary takes: log-probs from the head, piece by piece, against plain log_softmax.

    python scripts/bench_memory.py [--tokens 2048] [--vocabulary 151936] [--hidden 256] [--dtype float32] [--json]

Forward and backward of sum(log p) from given hidden states, each way in a process of its own, with one thread:
`peak` is the most resident memory beyond what was there before (hidden states, head and libraries), as the kernel counts
it (VmHWM); on a GPU it is what the allocator gave out at most. `estimate` is the formula's: for ours
`poise_hpc.training.logprobs.peak_bytes`, for plain log_softmax the logits and their gradient in the model's type and two
float32 copies. The last line is the formula at 32k tokens x 152k symbols, hidden size 1536 (Qwen2.5-Math-1.5B).
"""
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GIB = 1 << 30
PAPER = {"tokens": 32768, "vocabulary": 151936, "hidden": 1536, "dtype": "bfloat16"}


def estimate(way: str, size: dict[str, Any]) -> int:
    from poise_hpc.training import logprobs

    tokens, vocabulary, hidden, itemsize = size["tokens"], size["vocabulary"], size["hidden"], {"float32": 4, "bfloat16": 2}[size["dtype"]]
    if way == "pieces":
        return sum(logprobs.peak_bytes(tokens, vocabulary, hidden, itemsize).values())
    # Logits stay alive as the input of the cast; at the worst moment log p and its gradient are there, too.
    cast = tokens * vocabulary * itemsize if itemsize < 4 else 0
    return cast + tokens * vocabulary * 4 * 3 if itemsize == 4 else cast + tokens * vocabulary * 4 * 2


def measure(way: str, size: dict[str, Any]) -> dict[str, float]:
    """In this process: bytes beyond the inputs at the worst moment, CPU seconds, and the gradient's norm as a witness."""
    import torch

    from poise_hpc.training.logprobs import Form, Head

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, size["dtype"])
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(size["tokens"], size["hidden"], generator=g).to(device, dtype).requires_grad_()
    linear = torch.nn.Linear(size["hidden"], size["vocabulary"], bias=False, device=device, dtype=dtype)
    target = torch.randint(size["vocabulary"], (size["tokens"],), generator=g).to(device)
    source = torch.arange(size["tokens"], device=device)
    # Libraries make their workspaces once.
    torch.log_softmax(linear(hidden[:2]).float(), -1).sum().backward()
    hidden.grad = linear.weight.grad = None
    reset_peak(device)
    before, began = memory(device, "VmRSS"), time.process_time()
    if way == "pieces":
        logp, = Head(linear, Form())(hidden, source, target, 1.0, False)
    else:
        logp = torch.log_softmax(linear(hidden).float(), -1).gather(1, target[:, None]).squeeze(1)
    logp.sum().backward()
    seconds = time.process_time() - began
    return {"peak": memory(device, "VmHWM") - before, "cpu_s": seconds, "loss": float(logp.detach().double().sum()),
            "norm": float(hidden.grad.double().norm())}


def memory(device: str, line: str) -> int:
    """Bytes now (VmRSS) or at most since `reset_peak` (VmHWM)."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() if line == "VmHWM" else torch.cuda.memory_allocated()
    found = re.search(rf"^{line}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return 1024 * int(found.group(1))


def reset_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=("pieces", "plain"), help=argparse.SUPPRESS)  # measure in this process
    given = parser.parse_args()
    size = {name: getattr(given, name) for name in PAPER}
    if given.way:
        print(json.dumps(measure(given.way, size)))
        return
    result: dict[str, Any] = {"size": size, "ways": {}, "paper": {"size": PAPER, "estimate": {w: estimate(w, PAPER) for w in ("pieces", "plain")}}}
    for way in ("pieces", "plain"):
        options = [f"--{name}={value}" for name, value in size.items()]
        done = subprocess.run([sys.executable, __file__, "--way", way, *options], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{way}: exit code {done.returncode} (-9: out of memory; take fewer --tokens)\n{done.stderr[-2000:]}")
        result["ways"][way] = {"estimate": estimate(way, size), **json.loads(done.stdout)}
    if given.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{size['tokens']} tokens x {size['vocabulary']} symbols, hidden size {size['hidden']}, {size['dtype']}")
    for way, found in result["ways"].items():
        print(f"{way:8} peak {found['peak'] / GIB:6.2f} GiB   estimate {found['estimate'] / GIB:6.2f} GiB   CPU {found['cpu_s']:6.1f} s   "
              f"loss {found['loss']:.2f}   |gradient| {found['norm']:.5f}")
    print(f"estimate for {PAPER['tokens']} x {PAPER['vocabulary']}, hidden size {PAPER['hidden']}: "
          + ", ".join(f"{way} {value / GIB:.1f} GiB" for way, value in result["paper"]["estimate"].items()))


if __name__ == "__main__":
    main()
