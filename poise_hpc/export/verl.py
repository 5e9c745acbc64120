"""verl: an algorithm as an advantage estimator and a policy loss of one name. Exports take this file along, as adapter.py.

verl hands an estimator the rewards, the mask and the prompts' ids of a whole training step, and a policy loss one microbatch with the
counts of its mini-batch over all ranks, so Z is exact: for completions if all mini-batches are full. The importance weight is verl's
own rollout correction. What it hands to neither (step, progress, old and reference log-probs for advantages; reward and reference for
the loss), and what it has no place for (a state, completions that leave Z), is refused when the plug-in is exported.

Components of the reward are not handed over either: `components` and `valid` are functions that read them from the total, where
they can be (1.1 = correct and well-formed, 0.1 = well-formed).

Not covered: rejection sampling (`rollout_rs`), bypass mode, several trajectories per prompt and session, Megatron (never run).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss

from poise_hpc.algorithms.base import Algorithm, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.export import step

Read = Callable[[Tensor], Tensor]  # (N,) total reward -> (N,)
HOW = "verl hands over the total reward only: register(components={'correct': lambda reward: ...}, valid=lambda reward: ...)"


def register(name: str, *, algorithm: Algorithm, reads: frozenset[str], components: Mapping[str, Read] | None = None,
             valid: Read | None = None, max_length: int | None = None) -> None:
    """To be called in every process, once. `max_length` is data.max_response_length."""
    components = dict(components or {})
    if algorithm.needs:  # a hyperparameter may have been changed after the export
        raise ValueError(f"the algorithm needs {', '.join(sorted(algorithm.needs))}, which verl hands neither to an estimator nor to a policy loss")
    step.required(reads, components, valid, HOW)
    if "max_length" in reads and max_length is None:
        raise ValueError("the algorithm reads the longest allowed completion: register(max_length=...), data.max_response_length")
    register_adv_est(name)(estimator(algorithm, components, valid, max_length))
    register_policy_loss(name)(policy_loss(algorithm, max_length))


def estimator(algorithm: Algorithm, components: Mapping[str, Read], valid: Read | None, max_length: int | None) -> Callable[..., tuple[Tensor, Tensor]]:
    def advantages(token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config: Any = None,
                   **others: Any) -> tuple[Tensor, Tensor]:
        """(advantages, returns), both A (N, T)."""
        if config is not None and config.get("use_kl_in_reward", False):
            raise ValueError("algorithm.use_kl_in_reward=True changes the rewards that the algorithm was made for; set it to False")
        mask = response_mask.bool()
        live = mask.any(1)  # a batch is padded with empty completions to be dealt out evenly
        reward = token_level_rewards.float().sum(-1)[live]
        group = torch.from_numpy(np.unique(index[live.cpu().numpy()], return_inverse=True)[1]).to(reward.device)
        unknown: Any = None
        rollouts = RolloutBatch(
            reward=reward, components=step.Components({name: read(reward) for name, read in components.items()}),
            valid=unknown if valid is None else valid(reward), truncated=unknown, group=group, mask=mask[live], length=mask[live].sum(1),
            logp_old=unknown, logp_rollout=unknown, step=unknown, progress=unknown, max_length=unknown if max_length is None else max_length)
        A = torch.zeros(mask.shape, device=reward.device)
        A[live], _ = step.advantages(algorithm, rollouts, algorithm.initial_state())
        return A, A

    return advantages


def policy_loss(algorithm: Algorithm, max_length: int | None) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    def loss(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean",
             config: Any = None, rollout_is_weights: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """This microbatch's share of J, and metrics."""
        check(config, algorithm, loss_agg_mode)
        mask, known = response_mask.bool(), dict(config.global_batch_info)
        unknown: Any = None
        batch = PolicyBatch(logp=log_prob, logp_old=old_log_prob, advantage=advantages, mask=mask, length=mask.sum(1), reward=unknown,
                            progress=unknown, max_length=unknown if max_length is None else max_length)
        token_loss = torch.where(mask, algorithm.token_loss(batch, algorithm.initial_state()), 0.0)
        if rollout_is_weights is not None:
            token_loss = token_loss * rollout_is_weights
        if algorithm.reduction == Reduction.SEQ_MEAN_TOKEN_SUM_NORM:
            known["loss_scale_factor"] = max_length
        J = agg_loss(loss_mat=token_loss, loss_mask=mask, loss_agg_mode=loss_agg_mode, **known)
        drift = torch.where(mask, old_log_prob - log_prob.detach(), 0.0).sum() / mask.sum().clamp(min=1)
        return J, {"actor/ppo_kl": drift.item()}

    return loss


def check(config: Any, algorithm: Algorithm, loss_agg_mode: str) -> None:
    """ValueError for settings under which J would not be the algorithm's."""
    if loss_agg_mode != str(algorithm.reduction):
        raise ValueError(f"actor.loss_agg_mode={loss_agg_mode}; the algorithm's reduction is {algorithm.reduction}: set it to that")
    if config.entropy_coeff != 0 or config.use_kl_loss:
        raise ValueError(f"actor.entropy_coeff={config.entropy_coeff}, actor.use_kl_loss={config.use_kl_loss}: terms of the loss are the "
                         "algorithm's; set them to 0 and False")
