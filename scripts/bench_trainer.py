#!/usr/bin/env python3
"""This trainer against TRL's GRPOTrainer: same model, prompts, group size, lengths and number of updates, on the CPU.

    pip install -c constraints.txt -e .[bench]
    python scripts/bench_trainer.py [--workload lab fixed-1m natural-1m ...] [--rounds 5] [--threads 1 2] [--json]

Each side is a process of its own; they take turns, one training step (rollouts and all their updates) a turn, so that
whatever else the machine does hits both. `ratio` is TRL's seconds over ours, median over rounds: above 1, ours is
faster. It is given in wall time and in CPU time; the first round (warm-up) does not count.

    lab         the embedded lab: chain task, warm-started model, natural end of sequence, 2 epochs x 2 minibatches
    fixed-*     48 tokens each, prompt of 16, random rewards (no group without variance: nothing to skip), one update a step
    natural-*   the same, but a completion ends by itself (one of 32 symbols is the end token: about 26 tokens in the mean, at most
                48), and all completions of every second prompt get the same reward, as where it is too easy or too hard

`goal` is what this project wants to reach. TRL runs at its best here: no gradient checkpointing, fused AdamW, no KL term, no logging. Its `forward` holds the
log-probs of the old policy, which it computes where a batch is used for more than one update.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS, GROUP = 16, 8
PARTS = ("rollout", "forward", "backward", "rest")


@dataclass(frozen=True)
class Workload:
    goal: float                               # ratio of wall time
    epochs: int
    minibatches: int
    size: tuple[int, int, int] | None = None  # width, layers, heads of a random model; None: the lab's own
    prompt: int = 16                          # tokens
    completion: int = 48
    vocabulary: int = 512
    learning_rate: float = 1e-8               # random rewards teach nothing, but would drift the lengths apart
    natural: bool = False                     # completions end by themselves; every second prompt's are rewarded alike


SIZES = {"1m": (128, 5, 4), "5m": (256, 6, 8), "20m": (512, 6, 8)}  # width, layers, heads
WORKLOADS = {"lab": Workload(2.0, 2, 2, learning_rate=3e-4),
             **{f"fixed-{name}": Workload(1.3, 1, 1, size) for name, size in SIZES.items()},
             **{f"natural-{name}": Workload(2.0, 1, 1, size, vocabulary=32, natural=True) for name, size in SIZES.items()}}


class Synthetic:
    """Random prompts and rewards. Without natural ends no symbol is the end token: every completion has all its tokens."""

    name, pad_id, splits = "synthetic", 0, ("easy", "medium", "hard")

    def __init__(self, workload: Workload):
        self.workload, self.max_new_tokens = workload, workload.completion
        self.eos_id = 1 if workload.natural else workload.vocabulary  # one past the last symbol
        self.random = random.Random(0)

    def train_problem(self, seed: int, index: int) -> Any:
        from poise_hpc.tasks.base import Problem

        rng = random.Random(index)
        prompt = tuple(rng.randrange(2, self.workload.vocabulary) for _ in range(self.workload.prompt))
        return Problem(str(index), prompt, "", "train")

    def grade(self, problems: Any, completions: Any, truncated: Any) -> list[Any]:
        from poise_hpc.tasks.base import Grade

        alike = [self.workload.natural and int(p.id) % 2 == 0 for p in problems]
        return [Grade(0.0 if same else self.random.random(), {"correct": 0.0, "format": 1.0}, True, False) for same in alike]


def prepare(name: str, cache: Path) -> tuple[Any, Path]:
    """The task and the folder of the start model."""
    workload = WORKLOADS[name]
    if workload.size is None:
        from poise_hpc import config
        from poise_hpc.tasks.base import load_task
        from poise_hpc.tasks.cache import prepared_model

        task = load_task(config.parse({}))
        return task, prepared_model(task, cache, lambda *a, **k: None)
    import torch
    import transformers

    d, layers, heads = workload.size
    folder = cache / name
    if not folder.exists():
        torch.manual_seed(0)
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=workload.vocabulary, hidden_size=d, intermediate_size=d * 11 // 4, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
            pad_token_id=0)).save_pretrained(folder)
    return Synthetic(workload), folder


# --- the two sides: a generator that makes one training step per `next` and yields the seconds of its parts


def ours(name: str, task: Any, folder: Path, threads: int) -> Any:
    import torch
    import transformers

    from poise_hpc import config as configuration
    from poise_hpc.algorithms.grpo import GRPO
    from poise_hpc.training import engine, process
    from poise_hpc.training.job import sampler_of
    from poise_hpc.training.loop import Trainer
    from poise_hpc.training.policy import Policy

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000))
    workload = WORKLOADS[name]
    config = configuration.parse({"rollout": {"prompts": PROMPTS, "group_size": GROUP}, "train": {
        "steps": 1000, "epochs": workload.epochs, "minibatches": workload.minibatches, "learning_rate": workload.learning_rate}})
    process.set_up(threads)
    ranks = engine.start()
    policy = Policy(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 1.0)
    learner = engine.Engine(policy, config.train, "float32", ranks)
    trainer = Trainer(config, 0, task, GRPO(), learner, sampler_of(learner, config, folder), None, ranks, {})
    for step in range(1000):
        row, seconds = trainer.step(step)
        yield {part: seconds[part] for part in PARTS[:3]} | {"tokens": row["length"] * PROMPTS * GROUP, "reward": row["reward"]}


def trl(name: str, task: Any, folder: Path, threads: int) -> Any:
    """GRPOTrainer runs in a thread of its own and is let on for one training step at a time."""
    import threading

    import torch
    import transformers

    torch.set_num_threads(threads)
    turn, done, parts = threading.Semaphore(0), threading.Semaphore(0), {}
    workload = WORKLOADS[name]
    updates = workload.epochs * workload.minibatches

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % updates == 0:
                if state.global_step:
                    done.release()
                turn.acquire()

    trainer = make_trl(name, task, folder, Turns(), parts)
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()
    while True:
        parts.clear()
        turn.release()
        while not done.acquire(timeout=1.0):
            if not thread.is_alive():
                raise RuntimeError("TRL's trainer has ended; see its error above")
        yield dict(parts)


def make_trl(name: str, task: Any, folder: Path, callback: Any, parts: dict[str, float]) -> Any:
    import datasets
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    workload = WORKLOADS[name]
    symbols = [f"t{i}" for i in range(workload.vocabulary + 1 if workload.size else 64)]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=symbols[task.pad_id]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=symbols[task.eos_id],
                                                pad_token=symbols[task.pad_id], padding_side="left")
    problems = [task.train_problem(0, i) for i in range(PROMPTS * 100)]
    data = datasets.Dataset.from_dict({"prompt": [" ".join(symbols[t] for t in p.prompt) for p in problems], "index": list(range(len(problems)))})

    def reward(prompts: Any, completions: Any, completion_ids: Any, index: Any, **kwargs: Any) -> list[float]:
        truncated = [ids[-1] != task.eos_id for ids in completion_ids]
        grades = task.grade([problems[i] for i in index], completion_ids, truncated)
        parts["tokens"], parts["reward"] = sum(map(len, completion_ids)), statistics.fmean(g.reward for g in grades)
        return [g.reward for g in grades]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, per_device_train_batch_size=PROMPTS * GROUP // workload.minibatches,
        num_generations=GROUP, steps_per_generation=workload.minibatches, num_iterations=workload.epochs, gradient_accumulation_steps=1,
        max_completion_length=task.max_new_tokens, temperature=1.0, beta=0.0, epsilon=0.2, loss_type="grpo", scale_rewards="group",
        learning_rate=workload.learning_rate, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", gradient_checkpointing=False, shuffle_dataset=False, max_steps=100_000, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_num_workers=0, disable_dropout=True)
    trainer = GRPOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=fast, callbacks=[callback])

    def timed(owner: Any, method: str, part: str) -> None:
        original = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                parts[part] = parts.get(part, 0.0) + time.perf_counter() - start
        setattr(owner, method, wrapper)

    timed(model, "generate", "rollout")
    timed(trainer, "_get_per_token_logps_and_entropies", "forward")
    timed(trainer.accelerator, "backward", "backward")
    return trainer


# --- taking turns


def work(side: str, name: str, cache: Path, threads: int) -> None:
    """A side as a process: one training step for each line on stdin, its figures as a line on the real stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    steps = {"ours": ours, "trl": trl}[side](name, *prepare(name, cache), threads)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        parts = next(steps)
        parts |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        parts["rest"] = parts["wall"] - sum(parts[p] for p in PARTS[:3])
        print(json.dumps(parts), file=answers, flush=True)


def compare(name: str, rounds: int, cache: Path, threads: int) -> dict[str, Any]:
    prepare(name, cache)  # once, before both sides look for it
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    sides = {side: subprocess.Popen([sys.executable, __file__, "--side", side, "--workload", name, "--cache", str(cache), "--threads",
                                     str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
             for side in ("ours", "trl")}
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    try:
        for turn in range(rounds + 1):
            for side, process in sides.items():
                print("go", file=process.stdin, flush=True)
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{side} ended on workload {name}; its error stands above")
                if turn:
                    figures[side].append(json.loads(line))
    finally:
        for process in sides.values():
            process.kill()

    def median(side: str, key: str) -> float:
        return statistics.median(f[key] for f in figures[side])

    def ratio(key: str) -> float:
        return round(statistics.median(t[key] / o[key] for t, o in zip(figures["trl"], figures["ours"])), 3)

    return {"workload": name, "rounds": rounds, "threads": threads, "goal": WORKLOADS[name].goal, "ratio": ratio("wall"), "ratio_cpu": ratio("cpu"), **{
        side: {key: round(median(side, key), 4) for key in ("wall", "cpu", *PARTS, "tokens", "reward")}
        | {"tokens_per_second": round(median(side, "tokens") / median(side, "wall"))} for side in sides}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "poise-hpc", help="start models are kept here")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return work(arguments.side, arguments.workload[0], arguments.cache, arguments.threads[0])
    results = []
    for name in arguments.workload:
        for threads in arguments.threads:
            results.append(compare(name, arguments.rounds, arguments.cache, threads))
            if not arguments.json:
                print(table(results[-1]), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))


def table(result: dict[str, Any]) -> str:
    lines = ["{workload}, {threads} thread(s): ratio {ratio} (goal {goal}; CPU time {ratio_cpu}), medians of {rounds} rounds".format(**result)]
    for side in ("ours", "trl"):
        r = result[side]
        lines.append(f"  {side:5}" + "".join(f"{part} {1000 * r[part]:7.0f} ms  " for part in (*PARTS, "wall"))
                     + f"{r['tokens_per_second']:6d} tok/s  reward {r['reward']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
