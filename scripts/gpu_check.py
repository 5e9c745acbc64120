#!/usr/bin/env python3
"""The trainer on one GPU: ZeRO-2 and bfloat16 on a model of 1.5B parameters with random weights, written here from its config.

    scripts/gpu_check.sh [--size 1.5b] [--out docs/gpu] [--work DIR] [--steps 4]
    scripts/gpu_check.sh --size tiny --device cpu --out DIR     the same path in a minute, without a GPU

In processes of their own, one after another:
  whole    a training job, undisturbed: transformers rollouts of fixed length, updates; tokens/s, MFU, peak memory against the estimate
  killed   the same job, ended with SIGKILL right after its first checkpoint
  resumed  goes on from there: its curves and final weights must be those of `whole`, bit by bit
  trl      TRL's GRPOTrainer on the same model, lengths and batches, where it is installed (its model and its optimizer in bfloat16)
Writes gpu_check-<size>-<device>.json and .md to --out. MFU is forward and backward arithmetic (planning/cost.py) over the seconds of the update and
the device's data sheet (planning/devices.py). The first step warms up and does not count. Disk: 15 bytes a parameter below --work.

Not covered: several GPUs, vLLM, natural lengths (every completion runs to the limit; nothing is skipped).
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise_hpc.tasks.base import Grade, Problem

GROUP, MINIBATCHES = 8, 2
UPDATE = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Size:
    model: dict[str, Any]   # arguments of a Qwen2 config
    prompts: int            # a step
    prompt: int             # tokens
    completion: int
    groups_at_once: int     # in a microbatch


SIZES = {
    # Qwen2.5-Math-1.5B's architecture (its config.json): 1,543,714,304 parameters.
    "1.5b": Size({"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                  "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True}, 16, 128, 512, 2),
    "tiny": Size({"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}, 4, 4, 8, 1),
}


class Fixed:
    """Prompts of one length; no end token, so that every completion has all its tokens; a reward that is a hash of them."""

    name, pad_id, splits = "fixed", 0, ("fixed",)

    def __init__(self, options: dict[str, Any], model: dict[str, Any]):
        self.size = SIZES[options["size"]]
        self.max_new_tokens, self.eos_id = self.size.completion, self.size.model["vocab_size"]  # one past the last symbol

    def train_problem(self, seed: int, index: int) -> Problem:
        words = hashlib.sha256(f"{seed} {index}".encode()).digest() * self.size.prompt
        prompt = tuple(1 + (a * 256 + b) % (self.eos_id - 1) for a, b in zip(words[:self.size.prompt], words[self.size.prompt:]))
        return Problem(str(index), prompt, "", "train")

    def grade(self, problems: Any, completions: Any, truncated: Any) -> list[Grade]:
        return [Grade(reward(c), {"correct": 0.0, "format": 1.0}, True, False) for c in completions]


TASK = Fixed


def reward(tokens: Any) -> float:
    return hashlib.sha256(repr(list(map(int, tokens))).encode()).digest()[0] / 255


def settings(name: str, steps: int, every: int, recompute: bool) -> dict[str, Any]:
    size = SIZES[name]
    return {"task": {"name": "gpu_check:Fixed", "options": {"size": name}}, "model": {"source": "path", "path": "/", "dtype": "bfloat16"},
            "rollout": {"prompts": size.prompts, "group_size": GROUP},
            "train": {"steps": steps, "epochs": 1, "minibatches": MINIBATCHES, "zero_stage": 2, "learning_rate": 1e-6, "checkpoint_every": every,
                      "gradient_checkpointing": recompute, "microbatch_tokens": size.groups_at_once * (size.prompt + GROUP * size.completion)},
            "evaluate": {"at": [1.0], "benchmarks": {"fixed": {"split": "fixed", "problems": 1, "samples": 1, "metrics": {"acc@1": 1.0}}}}}


# --- in processes of their own


def make(name: str, folder: Path, device: str) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES[name].model, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    from poise_hpc.algorithms.seeds import source

    (folder / "package").mkdir(exist_ok=True)
    (folder / "package" / "algorithm.py").write_text(source("grpo"))
    return {"parameters": sum(p.numel() for p in model.parameters())}


def train(attempt: Path, kill: bool, device: str) -> dict[str, Any]:
    """A training job in `attempt`, whose job.json says what; with `kill` until its first checkpoint is whole."""
    from poise_hpc.training import checkpoint, job

    if kill:
        save = checkpoint.save

        def last(*arguments: Any) -> None:
            save(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save = last
    payload = job.run(json.loads((attempt / "job.json").read_text()), attempt)
    return {"weights_sha256": payload["weights_sha256"], "memory": peak_memory(device), "versions": payload["versions"]}


def peak_memory(device: str) -> dict[str, Any]:
    """Bytes: what tensors took at most, what the allocator held, and what the process holds beside it now."""
    if device == "cpu":
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return {"resident": int(line.split()[1]) * 1024}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "total": total,
            "context": total - free - torch.cuda.memory_reserved()}


def trl(name: str, folder: Path, steps: int, device: str, recompute: bool) -> dict[str, Any]:
    """Seconds of each training step of TRL's trainer, at its fastest: no KL term, no logging, everything in bfloat16."""
    import datasets
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    size, task = SIZES[name], Fixed({"size": name}, {})
    symbols = [f"t{i}" for i in range(task.eos_id + 1)]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=symbols[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=symbols[task.eos_id], pad_token=symbols[0], padding_side="left")
    data = datasets.Dataset.from_dict({"prompt": [" ".join(symbols[t] for t in task.train_problem(0, i).prompt) for i in range(size.prompts * steps)]})
    rows = size.groups_at_once * GROUP
    batches = size.prompts * GROUP // rows
    marks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % MINIBATCHES == 0:
                marks.append(now())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.append(now())

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def score(prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
        return [reward(ids) for ids in completion_ids]

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=device == "cpu", bf16=device == "cuda", per_device_train_batch_size=rows, num_generations=GROUP,
        steps_per_generation=batches, num_iterations=1, gradient_accumulation_steps=batches // MINIBATCHES, max_completion_length=size.completion,
        temperature=1.0, beta=0.0, epsilon=0.2, loss_type="grpo", scale_rewards="group", learning_rate=1e-6, lr_scheduler_type="constant",
        adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", gradient_checkpointing=recompute,
        shuffle_dataset=False, max_steps=steps * MINIBATCHES, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_num_workers=0, disable_dropout=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    sampled, generate = [0.0], model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return generate(*args, **kwargs)
        finally:
            sampled[0] += now() - start

    model.generate = timed
    GRPOTrainer(model, score, args=arguments, train_dataset=data, processing_class=fast, callbacks=[Clock()]).train()
    walls = [b - a for a, b in itertools.pairwise(marks)]
    from importlib.metadata import version

    return {"walls": walls, "rollout": sampled[0] / len(walls), "memory": peak_memory(device), "version": version("trl")}


# --- the check


def child(what: str, arguments: argparse.Namespace, folder: Path, attempt: Path | None = None) -> dict[str, Any]:
    """Run one part in a process of its own; what it found, with its exit code."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answer = folder / f"{what}.json"
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                                "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    order = json.dumps({"what": what, "size": arguments.size, "device": arguments.device, "steps": arguments.steps, "recompute": arguments.recompute,
                        "folder": str(folder), "attempt": str(attempt), "answer": str(answer)})
    print(f"{what} ...", file=sys.stderr, flush=True)
    log = folder / f"{what}.log"
    with open(log, "w") as out:
        code = subprocess.run([sys.executable, __file__, "--part", order], check=False, env=environment, stdout=out, stderr=out).returncode
    found = json.loads(answer.read_text()) if answer.exists() else {"error": log.read_text()[-3000:]}
    return {"exit": code, **found}


def part(order: dict[str, Any]) -> None:
    folder, attempt, device = Path(order["folder"]), Path(order["attempt"]), order["device"]
    match order["what"]:
        case "make":
            found = make(order["size"], folder, device)
        case "trl":
            found = trl(order["size"], folder, order["steps"], device, order["recompute"])
        case what:
            found = train(attempt, what == "killed", device)
    Path(order["answer"]).write_text(json.dumps(found))


def write_job(folder: Path, name: str, config: dict[str, Any], threads: int, resume: list[Path]) -> Path:
    from poise_hpc import config as configuration

    attempt = folder / name
    attempt.mkdir()
    (attempt / "job.json").write_text(json.dumps({
        "kind": "train", "config": configuration.parse(config).dump(), "seed": 0, "threads": threads, "model": str(folder / "model"),
        "package": str(folder / "package"), "resume": [str(p) for p in resume]}))
    return attempt


def check(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    half = arguments.steps // 2
    found: dict[str, Any] = {"size": arguments.size, "device": arguments.device, "steps": arguments.steps, "machine": machine(arguments.device)}
    found["make"] = child("make", arguments, folder)
    if found["make"]["exit"]:
        raise SystemExit(f"the model cannot be made:\n{found['make']['error']}")
    calm, stormy = (settings(arguments.size, arguments.steps, every, arguments.recompute) for every in (arguments.steps, half))
    whole = write_job(folder, "attempt-whole", calm, arguments.threads, [])
    found["whole"] = child("whole", arguments, folder, whole)
    killed = write_job(folder, "attempt-killed", stormy, arguments.threads, [])
    found["killed"] = child("killed", arguments, folder, killed)
    resumed = write_job(folder, "attempt-resumed", stormy, arguments.threads, [killed])
    found["resumed"] = child("resumed", arguments, folder, resumed)
    found["resume"] = {"killed_by_signal": -found["killed"]["exit"], "after_step": half, "curves_equal": same(whole, resumed, "curves.jsonl"),
                       "weights_equal": None not in (found["whole"].get("weights_sha256"), found["resumed"].get("weights_sha256"))
                       and found["whole"]["weights_sha256"] == found["resumed"]["weights_sha256"]}
    found["speed"] = speed(arguments, whole)
    found["estimate"] = estimate(arguments, found["whole"].get("memory", {}))
    if arguments.trl and importlib.util.find_spec("trl"):
        found["trl"] = child("trl", arguments, folder)
    return found


def machine(device: str) -> dict[str, Any]:
    import torch

    return {"host": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "name": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"}


def same(one: Path, other: Path, name: str) -> bool:
    return (one / name).exists() and (other / name).exists() and (one / name).read_bytes() == (other / name).read_bytes()


def speed(arguments: argparse.Namespace, attempt: Path) -> dict[str, Any]:
    """Medians over the steps but the first."""
    from poise_hpc import config as configuration
    from poise_hpc.planning import cost, devices, shape
    from poise_hpc.types import UsageError

    if not (attempt / "timings.jsonl").exists():
        return {}
    size, config = SIZES[arguments.size], configuration.parse(settings(arguments.size, arguments.steps, 1, arguments.recompute))
    steps = [json.loads(line) for line in (attempt / "timings.jsonl").read_text().splitlines()][1:]
    median = {key: statistics.median(step.get(key, 0.0) for step in steps) for key in ("rollout", "score", *UPDATE, "wall")}
    update = statistics.median(sum(step[key] for key in UPDATE) for step in steps)
    flops = cost.update_flops(shape.read(attempt.parent / "model"), config, cost.Tokens(size.prompt, size.completion))
    sampled = size.prompts * GROUP * size.completion
    try:
        peak = devices.find(machine(arguments.device)["name"]).flops if arguments.device == "cuda" else None
    except UsageError:
        peak = None
    return {"seconds": median, "update_seconds": update, "update_teraflops": flops / update / 1e12, "peak_teraflops": peak and peak / 1e12,
            "mfu": peak and flops / update / peak, "sampled_tokens_per_second": sampled / median["rollout"],
            "update_tokens_per_second": (sampled + size.prompts * size.prompt) / update, "step_tokens_per_second": sampled / median["wall"]}


def estimate(arguments: argparse.Namespace, measured: dict[str, Any]) -> dict[str, Any]:
    """Of tensors alone (the lines for context and allocator left out), against what the allocator counted."""
    from poise_hpc import config as configuration
    from poise_hpc.planning import memory, shape

    size, config = SIZES[arguments.size], configuration.parse(settings(arguments.size, arguments.steps, 1, arguments.recompute))
    sizes = shape.read(Path(arguments.work) / "model")
    found = memory.estimate(sizes, config, memory.Lengths(size.prompt, size.completion, size.completion), gpu=arguments.device == "cuda")
    tensors = {phase: sum(x.bytes for x in found.lines if phase in x.phases and x.name not in ("context", "allocator")) for phase in memory.TRAINING}
    peak = max(tensors.values())
    return {"phases": tensors, "tensors": peak, "measured": measured, "ratio": peak / measured["allocated"] if measured.get("allocated") else None}


def text(found: dict[str, Any]) -> str:
    def gib(x: float | None) -> str:
        return "-" if x is None else f"{x / 2**30:.1f} GiB" if x > 2**28 else f"{x / 2**20:.1f} MiB"

    s, e, r, m = found["speed"], found["estimate"], found["resume"], found["machine"]
    lines = [f"# {found['size']} on {m['name']}", "",
             f"torch {m['torch']}, CUDA {m['cuda']}, {found['make']['parameters']:,} parameters, bfloat16, ZeRO-2, one rank, {found['steps']} steps.", "", "| | |", "|---|---|"]
    if s:
        mfu = f"{s['mfu']:.1%} of {s['peak_teraflops']:.0f} TFLOP/s" if s["mfu"] else "no data sheet for this device"
        lines += [f"| update | {s['update_seconds']:.2f} s a step, {s['update_tokens_per_second']:,.0f} tokens/s, {s['update_teraflops']:.2f} TFLOP/s |", f"| MFU in the update | {mfu} |",
                  f"| rollout, transformers engine | {s['seconds']['rollout']:.2f} s a step, {s['sampled_tokens_per_second']:,.0f} tokens/s |",
                  f"| whole step | {s['seconds']['wall']:.2f} s, {s['step_tokens_per_second']:,.0f} sampled tokens/s |"]
    else:
        lines.append(f"| training | failed: `{found['whole'].get('error', '').strip().splitlines()[-1:]}` |")
    peak = e["measured"].get("allocated")
    lines += [f"| peak memory of tensors | estimated {gib(e['tensors'])}, measured {gib(peak)}" + (f", ratio {e['ratio']:.2f}" if e["ratio"] else " (on a GPU only)") + " |",
              f"| resume after SIGKILL | curves {'equal' if r['curves_equal'] else 'DIFFER'}, weights {'equal' if r['weights_equal'] else 'DIFFER'}, bit by bit |"]
    if "trl" not in found:
        lines.append("| TRL | not installed |")
    elif found["trl"]["exit"]:
        lines.append(f"| TRL | failed: `{found['trl'].get('error', '').strip().splitlines()[-1:]}` |")
    else:
        t = found["trl"]
        wall = statistics.median(t["walls"][1:] or t["walls"])
        lines.append(f"| TRL {t['version']} | {wall:.2f} s a step (rollout {t['rollout']:.2f}), peak {gib(t['memory'].get('allocated'))}; "
                     + (f"this trainer is {wall / s['seconds']['wall']:.2f} times as fast |" if s else "|"))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"))
    parser.add_argument("--work", type=Path, help="scratch folder; a temporary one by default")
    parser.add_argument("--steps", type=int, default=4, help="at least 2")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, for GPUs with less memory")
    parser.add_argument("--no-trl", dest="trl", action="store_false")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return part(json.loads(arguments.part))
    if arguments.steps < 2:
        parser.error("--steps: at least 2 were wanted, the first one warms up")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: torch sees no GPU here; --size tiny --device cpu tries the same path without one\n")
    with tempfile.TemporaryDirectory(prefix="poise-gpu-check-", dir=arguments.work) as scratch:
        arguments.work = Path(scratch)
        found = check(arguments, Path(scratch))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.out / f"gpu_check-{arguments.size}-{arguments.device}"
    name.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    name.with_suffix(".md").write_text(text(found))
    print(text(found), end="")
    sys.exit(0 if found["resume"]["curves_equal"] and found["resume"]["weights_equal"] else 1)


if __name__ == "__main__":
    main()
