"""A small task, algorithms and trainers for the training tests, and the ranks of a training job as processes:

    spawn(world, "ranks", OUT)            steps with ZeRO 0-3 on all ranks, results of rank 0 to OUT (torch.save)
    spawn(world, "lean", OUT)             one update in each memory-lean setting, whole gradients to OUT
    spawn(world, "job", ATTEMPT, [KILL])  one training job; KILL "function:n" is SIGKILL in the n-th call of it
"""
from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers_models import tiny_model

from poise_hpc import config
from poise_hpc.algorithms.base import Algorithm
from poise_hpc.algorithms.grpo import GRPO
from poise_hpc.settings import overlay
from poise_hpc.tasks.base import Grade, Problem


class Echo:
    """Say a symbol of the prompt: rewarded by the share of the completion that does."""

    name, eos_id, pad_id, max_new_tokens, splits = "echo", 1, 0, 6, ("easy",)

    def __init__(self, options: dict[str, Any], model: dict[str, Any]):
        pass

    def train_problem(self, seed: int, index: int) -> Problem:
        a, b = 3 + (7 * index + seed) % 13, 3 + (5 * index) % 13
        return Problem(f"{a} {b} {index}", (2, a, b) if index % 3 else (2, a), str(a), "train")

    def grade(self, problems: Any, completions: Any, truncated: Any) -> list[Grade]:
        hits = [sum(t == int(p.answer) for t in c) / len(c) for p, c in zip(problems, completions)]
        return [Grade(h, {"correct": float(h > 0), "format": float(not cut)}, not cut, h > 0) for h, cut in zip(hits, truncated)]


TASK = Echo
SPLIT = {"easy": {"split": "easy", "problems": 1, "samples": 1, "metrics": {"acc@1": 1.0}}}


def make_config(train: dict[str, Any] | None = None, **sections: dict[str, Any]) -> config.Config:
    data = {"task": {"name": "helpers_training:Echo"}, "rollout": {"prompts": 6, "group_size": 4}, "evaluate": {"benchmarks": SPLIT},
            "train": {"steps": 6, "epochs": 2, "minibatches": 2, "learning_rate": 0.01, "checkpoint_every": 2} | (train or {})}
    return config.parse(overlay(data, sections))


def make_trainer(conf: config.Config, algorithm: Algorithm | None = None, kind: str = "qwen2", ranks: Any = None, seed: int = 0) -> Any:
    """In this process; needs `start_alone` or a real process group."""
    from poise_hpc.training.engine import Engine
    from poise_hpc.training.job import sampler_of
    from poise_hpc.training.loop import Trainer
    from poise_hpc.training.policy import Policy
    from poise_hpc.training.ranks import Ranks

    ranks, algorithm = ranks or Ranks(), algorithm or GRPO()
    dtype = conf.model.dtype
    policy = Policy(tiny_model(kind).to(getattr(torch, dtype)), conf.rollout.temperature, conf.train.share_prompt,
                    conf.train.gradient_checkpointing)
    engine = Engine(policy, conf.train, dtype, ranks)
    reference = Policy(tiny_model(kind), 1.0) if "ref_logp" in algorithm.needs else None
    return Trainer(conf, seed, Echo({}, {}), algorithm, engine, sampler_of(engine, conf, Path()), reference, ranks, algorithm.initial_state())


def start_alone() -> None:
    from poise_hpc.training import engine

    os.environ.update(rendezvous(0, 1, free_port()))
    torch.set_num_threads(1)
    engine.start()


def rendezvous(rank: int, world: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# A fork server that has imported the heavy packages once: each process starts in a moment.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["deepspeed", "transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2",
                                 "transformers.models.qwen2.modeling_qwen2", "poise_hpc.training.loop"])


def spawn(world: int, *arguments: str) -> list[tuple[Any, Path]]:
    """One process per rank, and where its output goes."""
    port, running = free_port(), []
    for rank in range(world):
        output = Path(tempfile.mkstemp(suffix=f"-rank-{rank}.out")[1])
        process = _context.Process(target=_main, args=(rendezvous(rank, world, port), str(output), *arguments))
        process.start()
        running.append((process, output))
    return running


def _main(environment: dict[str, str], output: str, what: str, *arguments: str) -> None:
    os.environ.update(environment)
    fd = os.open(output, os.O_WRONLY)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    {"ranks": main_ranks, "lean": main_lean, "job": main_job}[what](*arguments)


def finish(running: list[tuple[Any, Path]], wanted: int | None = 0) -> str:
    """Wait for all; the output of rank 0. `wanted` is the exit code, -9 for SIGKILL; None: whatever it is."""
    outputs = []
    for process, output in running:
        process.join(timeout=240)
        outputs.append(output.read_text())
        output.unlink()
        assert wanted is None or process.exitcode == wanted, f"exit code {process.exitcode}, {wanted} wanted:\n{outputs[-1]}"
    return outputs[0]


PACKAGE = '''
from dataclasses import dataclass
import torch
from poise_hpc.algorithms.base import Advantages
from poise_hpc.algorithms.grpo import GRPO

@dataclass(frozen=True)
class Mine(GRPO):
    """GRPO against a moving average of the reward: its state must survive a kill."""
    zero_advantage_zero_loss = False

    def initial_state(self):
        return {"mean": 0.0}

    def advantages(self, rollouts, state):
        state["mean"] = 0.9 * state["mean"] + 0.1 * float(rollouts.reward.mean())
        return Advantages(rollouts.reward - state["mean"] + 0.01 * torch.randn(len(rollouts.reward)))

ALGORITHM = Mine()
'''


def write_job(folder: Path, conf: config.Config, name: str = "train-s0-1", resume: list[Path] | None = None, **more: Any) -> Path:
    """An attempt folder with its job.json; model and package next to it."""
    model, package, attempt = folder / "model", folder / "package", folder / name
    if not model.exists():
        tiny_model("gpt2").save_pretrained(model)
        package.mkdir()
        (package / "algorithm.py").write_text(PACKAGE)
    attempt.mkdir()
    job = {"kind": "train", "config": conf.dump(), "seed": 3, "threads": 1, "model": str(model), "package": str(package),
           "resume": [str(p) for p in resume or []], **more}
    (attempt / "job.json").write_text(json.dumps(job))
    return attempt


# --- in processes of their own


def main_ranks(out: str) -> None:
    from poise_hpc.training import engine, process

    process.set_up(1)
    ranks, results = engine.start(), {}
    for stage in range(4):
        # One rank: everything in one microbatch. Two ranks: pieces of at most 20 tokens, cut inside groups.
        conf = make_config({"zero_stage": stage, "microbatch_tokens": 65536 if ranks.world == 1 else 20})
        trainer, gradients = make_trainer(conf, ranks=ranks), []
        if stage == 0:
            optimizer, module = trainer.engine._engine.optimizer, trainer.engine._engine.module
            optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in module.parameters()]))
        rows = [trainer.step(step)[0] for step in range(2)]
        model = trainer.engine.full_model()
        x = torch.tensor([[2, 3, 4, 5, 6, 7, 8]])
        with torch.no_grad():
            logits = model(input_ids=x).logits
        results[stage] = {"rows": rows, "gradients": gradients, "logits": logits}
    if ranks.rank == 0:
        torch.save(results, out)


@dataclass(frozen=True)
class Curious(GRPO):
    """Its loss has an entropy term."""

    needs, zero_advantage_zero_loss = frozenset({"entropy"}), False

    def token_loss(self, batch: Any, state: dict[str, Any]) -> torch.Tensor:
        return super().token_loss(batch, state) - 0.1 * batch.entropy


def main_lean(out: str) -> None:
    from poise_hpc.training import engine, logprobs, process

    process.set_up(1)
    ranks, results = engine.start(), {}
    for kind, dtype in (("gpt2", "float32"), ("qwen2", "float32"), ("qwen2", "bfloat16")):  # GPT-2's head is its embedding
        for stage in (None, 0, 1, 2, 3):  # None: the plain way, without any of it
            lean = stage is not None
            logprobs.AT_ONCE, logprobs.LARGE = (48, 1) if lean else (1 << 27, 4096)  # three rows of logits
            train = {"epochs": 1, "minibatches": 1, "zero_stage": stage or 0, "gradient_checkpointing": lean,
                     "microbatch_tokens": 40 if lean else 65536}
            trainer = make_trainer(make_config(train, model={"dtype": dtype}), Curious(), kind, ranks)
            assert (trainer.engine._engine.module.head is not None) == lean
            row, _ = trainer.step(0)
            # AdamW's first moment after one update is 0.1 g
            gradient = {name: 10 * trainer.engine._whole(p, "exp_avg").clone() for name, p in trainer.engine._parameters()}
            results[kind, dtype, stage] = {"row": row, "gradient": gradient}
    if ranks.rank == 0:
        torch.save(results, out)


def main_job(attempt: str, kill: str = "") -> None:
    from poise_hpc.training import checkpoint, job, loop

    if kill:
        name, _, count = kill.partition(":")
        owner = {"update": loop.Trainer}.get(name, checkpoint)
        original, calls = getattr(owner, name), []

        def killer(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, killer)
    folder = Path(attempt)
    payload = job.run(json.loads((folder / "job.json").read_text()), folder)
    if os.environ["RANK"] == "0":
        (folder / "payload.json").write_text(json.dumps(payload))

