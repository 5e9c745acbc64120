"""TRL: a GRPOTrainer whose advantages and loss are an algorithm's. Exports take this file along, as adapter.py.

TRL samples, rewards, shuffles and splits. The rest is the algorithm's and poise_hpc's: advantages over the whole generation
batch of all processes; J = 1/Z sum m w l(A) with Z over all microbatches and processes of an optimizer step; w the truncated
importance weight where the sampler gives log-probs (vLLM); old log-probs always from the trained model.

Options of GRPOConfig that would choose a loss or an advantage must stay at their defaults. `beta` only says whether TRL holds a
reference model; the weight of a KL term is the algorithm's own hyperparameter.

Not as in poise_hpc's trainer: groups that `select` drops are not sampled again, as with `rollout.max_rounds: 1`, and if it drops all
of them the optimizer still steps, by momentum; minibatches are shuffled completions, not groups; dropout is on where a
model has it (`disable_dropout=True`). Exact resumption wants `save_steps` to be a multiple of the updates per generation.

Not covered: images, tools and environments, the load-balancing loss of mixtures of experts, None as a completion's reward.
"""
from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from poise_hpc.algorithms import ops
from poise_hpc.algorithms.base import Algorithm, PolicyBatch, RolloutBatch
from poise_hpc.export import step

OWNED = ("loss_type", "scale_rewards", "multi_objective_aggregation", "importance_sampling_level", "epsilon", "epsilon_high", "delta",
         "mask_truncated_completions", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "off_policy_mask_threshold",
         "use_bias_correction_kl", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
         "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min")  # what the algorithm decides here
FOREIGN = ("pixel_values", "tool_mask")
STATE = "algorithm_state.json"


class AlgorithmTrainer(GRPOTrainer):
    """`components` maps the algorithm's names of reward components to reward functions ({"correct": "exact_match"}; its own name is
    the default), `valid` names the reward function that is above 0 where an answer could be parsed."""

    def __init__(self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, *arguments: Any, algorithm: Algorithm,
                 reads: frozenset[str], components: Mapping[str, str] | None = None, valid: str | None = None,
                 weight_cap: float = 2.0, **options: Any):
        args = args or GRPOConfig()
        check(args, algorithm)
        super().__init__(model, reward_funcs, args, *arguments, **options)
        if self.aux_loss_enabled:
            raise ValueError("the load-balancing loss of mixtures of experts is not covered; router_aux_loss_coef=0.0 turns it off")
        self.algorithm, self.algorithm_state = algorithm, algorithm.initial_state()
        self.components = {name: name for name in self.reward_func_names} | dict(components or {})
        self.valid, self.weight_cap = valid, weight_cap
        named = [*self.components.values(), *([valid] if valid else [])]
        if unknown := sorted(set(named) - set(self.reward_func_names)):
            raise ValueError(f"no reward function {unknown[0]!r}; there are {', '.join(self.reward_func_names)}")
        step.required(reads, self.components, valid, "name the reward functions that give it: components={'correct': ...}, valid=...")
        self._rewards = torch.zeros(0)  # (N, reward functions) of the last generation, of all processes

    # --- once a generation batch

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*arguments)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        if found := [name for name in FOREIGN if name in out]:
            raise ValueError(f"{found[0]} in the batch: images, tools and environments are not covered")
        training, B = self.model.training, len(out["completion_ids"])
        out |= self._scored(out, "old_per_token_logps" not in out)
        rollouts = self._rollouts(out)
        state = self.algorithm_state if training else copy.deepcopy(self.algorithm_state)
        A, keep = step.advantages(self.algorithm, rollouts, state)
        self.algorithm_state = step.plain(state) if training else self.algorithm_state
        self._log_advantages(A, keep, rollouts)
        mine, T = slice(self.accelerator.process_index * B, (self.accelerator.process_index + 1) * B), out["completion_ids"].shape[1]
        mask, old = out["completion_mask"].bool(), out["old_per_token_logps"]
        weight = step.importance_weights(mask, old, out.get("sampling_per_token_logps", old), self.weight_cap)
        return out | {"advantages": A[mine, :T], "keep": keep[mine], "total_reward": rollouts.reward[mine], "importance_weight": weight}

    def _scored(self, out: dict[str, Any], old: bool) -> dict[str, Any]:
        """Log-probs (unless TRL has computed them) and entropies under the policy before the update."""
        entropy = "entropy" in self.algorithm.needs
        if not (old or entropy):
            return {}
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        with torch.no_grad():
            logp, H, _ = self._forward(self.model, out, batch_size=size, compute_entropy=entropy)
        return {"old_per_token_logps": logp} | ({"old_entropy": H} if entropy else {})

    def _forward(self, model: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        return self._get_per_token_logps_and_entropies(model, tokens, mask, batch["completion_ids"].shape[1], **options)

    def _rollouts(self, out: dict[str, Any]) -> RolloutBatch:
        """The whole generation batch, of all processes in their order: completions of a group are adjacent."""
        if (empty := self._rewards.isnan().all(1)).any():
            raise ValueError(f"every reward function returned None for completion {int(empty.nonzero()[0])} of the batch; return a number")
        parts = self._rewards.nan_to_num(0.0)
        named = step.Components({name: parts[:, self.reward_func_names.index(f)] for name, f in self.components.items()})
        length = self.accelerator.gather(out["completion_mask"].sum(1))
        logp = {name: self._everywhere(out[key]) for name, key in (
            ("logp_old", "old_per_token_logps"), ("logp_rollout", "sampling_per_token_logps"), ("logp_ref", "ref_per_token_logps"),
            ("entropy", "old_entropy")) if key in out}
        logp["logp_rollout"] = torch.where((given := logp.get("logp_rollout", logp["logp_old"])).isnan(), logp["logp_old"], given)
        size = self.num_generations if self.model.training else self.num_generations_eval
        now, steps = self._progress()
        return RolloutBatch(
            reward=(parts * self.reward_weights.to(parts.device)).sum(1), components=named,
            valid=None if self.valid is None else named_column(parts, self.reward_func_names, self.valid) > 0,
            truncated=self._truncated(out), group=torch.arange(len(parts), device=parts.device) // size,
            mask=torch.arange(logp["logp_old"].shape[1], device=parts.device) < length[:, None], length=length, step=now,
            progress=min(now / steps, 1.0), max_length=self.max_completion_length, **logp)

    def _everywhere(self, x: Tensor) -> Tensor:
        """(B, T) of this process -> (N, T) of all, padded to the widest."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    def _truncated(self, out: dict[str, Any]) -> Tensor:
        last = out["completion_ids"].gather(1, (out["completion_mask"].sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
        return self.accelerator.gather(~torch.isin(last, ends))

    def _progress(self) -> tuple[int, int]:
        """Training steps done and in all: one is a generation batch with all its updates."""
        updates = self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps
        return self.state.global_step // updates, max(1, math.ceil(self.state.max_steps / updates))

    def _log_advantages(self, A: Tensor, keep: Tensor, rollouts: RolloutBatch) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        live = A[rollouts.mask & keep[:, None]]
        metrics["algorithm/kept"].append(float(keep.float().mean()))
        metrics["algorithm/advantage_std"].append(float(live.std(correction=0)) if len(live) else 0.0)
        table = self._logs["advantages"]  # TRL has put its own there
        for _ in range(min(len(A), len(table))):
            table.pop()
        table.extend((A.sum(1) / rollouts.length.clamp(min=1)).tolist())

    # --- once an optimizer step: m / Z

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            self._normalize([inputs])
        elif self._buffered_inputs is not before:
            size = self.args.gradient_accumulation_steps
            for first in range(0, len(self._buffered_inputs), size):
                self._normalize(self._buffered_inputs[first:first + size])
        return inputs

    def _normalize(self, microbatches: list[dict[str, Any]]) -> None:
        """Adds m w / Z to each. Times the number of processes, because gradients are averaged over them."""
        parts = [ops.token_weights(self.algorithm.reduction, b["completion_mask"].bool(), b["completion_mask"].sum(1), b["keep"],
                                   self.max_completion_length) for b in microbatches]
        Z = self.accelerator.reduce(torch.stack([z for _, z in parts]).sum(), "sum")
        for b, (m, _) in zip(microbatches, parts, strict=True):
            b["token_weight"] = torch.where(m > 0, m * b["importance_weight"], 0.0) * self.accelerator.num_processes / Z.clamp(min=1e-9)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask, (now, steps) = inputs["completion_mask"].bool(), self._progress()
        logp, entropy, _ = self._forward(model, inputs, compute_entropy="entropy" in self.algorithm.needs)
        batch = PolicyBatch(
            logp=logp, logp_old=inputs["old_per_token_logps"], advantage=inputs["advantages"], mask=mask, length=mask.sum(1),
            reward=inputs["total_reward"], progress=min(now / steps, 1.0), max_length=self.max_completion_length,
            logp_ref=inputs.get("ref_per_token_logps"), entropy=entropy)
        loss = torch.where(mask, self.algorithm.token_loss(batch, self.algorithm_state), 0.0)
        J = (loss * inputs["token_weight"]).sum()
        if not J.isfinite():
            raise FloatingPointError(f"{type(self.algorithm).__name__}.token_loss is NaN or infinite")
        return J

    # --- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            (self._checkpoint(trial) / STATE).write_text(json.dumps(self.algorithm_state))

    def _checkpoint(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / STATE
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: {checkpoint} was not written by AlgorithmTrainer")
            self.algorithm_state = json.loads(path.read_text())


def named_column(parts: Tensor, names: list[str], name: str) -> Tensor:
    return parts[:, names.index(name)]


def check(args: GRPOConfig, algorithm: Algorithm) -> None:
    """ValueError for settings that would be ignored, or under which an optimizer step is not of one generation batch."""
    for name in OWNED:
        default = GRPOConfig.__dataclass_fields__[name].default
        if getattr(args, name) != default:
            raise ValueError(f"{name}={getattr(args, name)!r}: the algorithm decides this; leave it at {default!r}")
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ValueError(f"steps_per_generation={args.steps_per_generation} is no multiple of gradient_accumulation_steps="
                         f"{args.gradient_accumulation_steps}: an optimizer step would mix generation batches")
    if "ref_logp" in algorithm.needs and args.beta == 0.0:
        raise ValueError("the algorithm needs the reference model: set beta to any other number than 0, TRL loads it only then")
    if "ref_logp" not in algorithm.needs and args.beta != 0.0:
        raise ValueError(f"beta={args.beta}: the algorithm has no use for a reference model; leave it at 0.0")
