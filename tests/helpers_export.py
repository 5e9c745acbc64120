"""The same training twice: our trainer's, recorded, and TRL's on the rollouts that ours recorded. TRL also as a program, for several ranks:

    python tests/helpers_export.py FOLDER RANKS

FOLDER holds what `record` left; the weights go to FOLDER/weights-RANKS.pt.
"""
from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Reduction
from poise_hpc.algorithms.grpo import GRPO
from poise_hpc.algorithms.ops import k3

STEPS, EPOCHS, MICROBATCHES = 3, 2, 4
PROMPTS, SIZE, LENGTH = 4, 4, 6


@dataclass(frozen=True)
class Everything(GRPO):
    """All that an algorithm may ask of a trainer: reference, entropies, components, a state, dropped groups, left-out completions."""

    needs, reduction, zero_advantage_zero_loss = frozenset({"ref_logp", "entropy"}), Reduction.TOKEN_MEAN, False

    def initial_state(self) -> dict[str, Any]:
        return {"mean": 0.1}

    def select(self, rollouts: Any, state: dict[str, Any]) -> Tensor:
        best = torch.zeros(rollouts.groups).scatter_reduce(0, rollouts.group, rollouts.reward, "amax")
        return best > 0

    def advantages(self, rollouts: Any, state: dict[str, Any]) -> Advantages:
        state["mean"] = 0.5 * state["mean"] + 0.5 * float(rollouts.reward.mean())
        A = rollouts.reward - state["mean"] + 0.2 * rollouts.components["correct"] + 0.1 * rollouts.valid - 0.1 * rollouts.progress
        far = (rollouts.logp_old - rollouts.logp_ref) * rollouts.mask + 0.1 * rollouts.entropy * rollouts.mask
        return Advantages(A[:, None] - 0.05 * far, keep=~rollouts.truncated | (rollouts.components["format"] > 0) | (rollouts.reward > 0.2))

    def token_loss(self, batch: Any, state: dict[str, Any]) -> Tensor:
        return super().token_loss(batch, state) + 0.1 * (1 + batch.progress) * k3(batch) - 0.02 * state["mean"] * batch.entropy


ALGORITHMS = {"grpo": GRPO(), "everything": Everything()}


def record(name: str, folder: Path) -> dict[str, Any]:
    """Three training steps of ours: every optimizer step's loss and gradient norm, the weights and the state at the end. The rollouts, and
    the model that both start from, go to `folder`. The sampler's log-probs are made to differ from the trainer's."""
    from helpers_models import tiny_model
    from helpers_training import make_config, make_trainer

    conf = make_config({"epochs": EPOCHS, "minibatches": 1, "steps": STEPS, "learning_rate": 0.003, "betas": [0.9, 0.99]},
                       rollout={"prompts": PROMPTS, "group_size": SIZE})
    trainer, batches, updates = make_trainer(conf, ALGORITHMS[name]), [], []
    sample, update = trainer.sample, trainer.update
    trainer.sampler.exact, trainer.sampler.recall_bytes = False, 0

    def noisy(step: int, *arguments: Any) -> Any:
        batch = sample(step, *arguments)
        noise = torch.randn(batch.rollouts.logp_old.shape, generator=torch.Generator().manual_seed(step))
        batches.append(replace(batch, rollouts=replace(batch.rollouts, logp_rollout=batch.rollouts.logp_old + 0.5 * noise)))
        return batches[-1]

    def noted(*arguments: Any) -> dict[str, Any]:
        updates.append(update(*arguments))
        return updates[-1]

    trainer.sample, trainer.update = noisy, noted
    for step in range(STEPS):
        trainer.step(step)
    model = tiny_model("qwen2")
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    torch.save({"name": name, "batches": [stored(b) for b in batches]}, folder / "batches.pt")
    return {"loss": [u["loss"] for u in updates], "norm": [u["norm"] for u in updates], "state": trainer.state,
            "weights": {k: v.clone() for k, v in trainer.engine.model.state_dict().items()}, "kept": [b.rollouts.groups for b in batches]}


def stored(batch: Any) -> dict[str, Any]:
    r = batch.rollouts
    return {"prompts": [list(batch.prompts[g]) for g in r.group.tolist()], "completions": [t[:n].tolist() for t, n in zip(batch.tokens, r.length)],
            "logprobs": [x[:n].tolist() for x, n in zip(r.logp_rollout, r.length)], "hits": r.reward.tolist(),
            "right": r.components["correct"].tolist(), "format": r.components["format"].tolist()}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, 16)}}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>").save_pretrained(folder)


def make_trl(folder: Path, output: Path, ranks: int = 1, **options: Any) -> Any:
    """TRL's trainer on the recorded rollouts: generation batch k is the recorded step's k."""
    from datasets import Dataset
    from trl import GRPOConfig

    from poise_hpc.export.trl import AlgorithmTrainer

    data = torch.load(folder / "batches.pt")
    algorithm = ALGORITHMS[data["name"]]
    total = PROMPTS * SIZE
    rows = Dataset.from_list([{"prompt": "2"}] * PROMPTS)

    def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        step, first = min(trainer.state.global_step // EPOCHS, STEPS - 1), trainer.accelerator.process_index * total // ranks
        batch, mine = data["batches"][step], range(first, first + total // ranks)
        return {"prompt_ids": [batch["prompts"][i] for i in mine], "completion_ids": [batch["completions"][i] for i in mine],
                "logprobs": [batch["logprobs"][i] for i in mine], "at": [(step, i) for i in mine]}

    def reward(name: str) -> Any:
        def function(completions: Any, at: Any, **others: Any) -> list[float]:
            return [data["batches"][step][name][i] for step, i in at]

        function.__name__ = name
        return function

    settings = dict(
        output_dir=str(output), per_device_eval_batch_size=total // ranks, per_device_train_batch_size=total // MICROBATCHES // ranks, gradient_accumulation_steps=MICROBATCHES,
        num_iterations=EPOCHS, num_generations=SIZE, max_completion_length=LENGTH, max_steps=STEPS * EPOCHS, learning_rate=0.003,
        lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.99, max_grad_norm=1.0, weight_decay=0.0, temperature=1.0,
        reward_weights=[1.0, 0.0, 0.0], beta=0.5 if "ref_logp" in algorithm.needs else 0.0, use_cpu=True, bf16=False, report_to="none",
        logging_steps=1, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True)
    reads = frozenset({"components.correct", "components.format", "valid"}) if data["name"] == "everything" else frozenset()
    return AlgorithmTrainer(
        model=str(folder / "model"), reward_funcs=[reward("hits"), reward("right"), reward("format")], rollout_func=rollouts,
        args=GRPOConfig(**settings | options), train_dataset=rows, eval_dataset=rows, algorithm=algorithm, reads=reads,
        components={"correct": "right"}, valid="format")


def rank(environment: dict[str, str], folder: Path, ranks: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    trainer = make_trl(folder, folder / f"output-{ranks}", ranks)
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / f"weights-{ranks}.pt")


def main(folder: str, ranks: str) -> int:
    """TRL is imported once, for all ranks. The worst exit code."""
    from helpers_training import free_port, rendezvous

    import poise_hpc.export.trl  # noqa: F401

    world, port, fork = int(ranks), free_port(), multiprocessing.get_context("fork")
    running = [fork.Process(target=rank, args=(rendezvous(i, world, port), Path(folder), world)) for i in range(world)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return max(abs(process.exitcode or 0) for process in running)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
