#!/usr/bin/env python3
"""Regenerates tests/golden/*.json: losses, gradients and advantages computed by the peers' own code.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install torch==2.13.0 numpy
    /tmp/peers/bin/pip install --no-deps verl==0.9.1 trl==1.16.0 tensordict orjson importlib_metadata zipp pyvers
    /tmp/peers/bin/pip install transformers==5.23.0 ray omegaconf pandas accelerate codetiming cloudpickle datasets
    /tmp/peers/bin/python scripts/make_golden.py verl trl

Needs no poise_hpc. The tests compare with the stored vectors only, so that no peer is a dependency.
Settings differ from the peers' defaults where these hide the algorithm: verl's dual clip is off (clip_ratio_c = 1e9).
"""
from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
GROUPS, SIZE, TOKENS, MAX_LENGTH = 3, 4, 7, 9


def inputs() -> dict[str, Tensor]:
    """Three groups of four: mixed, one success, all equal. Log-ratios of about 0.4, so that clips bind on both sides."""
    random = torch.Generator().manual_seed(20240207)
    N = GROUPS * SIZE
    logp_old = -2.5 * torch.rand(N, TOKENS, generator=random) - 0.05
    found = {
        "reward": torch.tensor([1.1, 0.0, 0.1, 1.1, 0.1, 0.1, 1.1, 0.0, 1.1, 1.1, 1.1, 1.1]),
        "length": torch.randint(1, TOKENS + 1, (N,), generator=random),
        "logp_old": logp_old,
        "logp": logp_old + 0.4 * torch.randn(N, TOKENS, generator=random),
        "logp_ref": logp_old + 0.3 * torch.randn(N, TOKENS, generator=random),
        "advantage": torch.randn(N, generator=random),
    }
    found["advantage"][3] = 0.0
    return {k: x if k == "length" else (x * 1e4).round() / 1e4 for k, x in found.items()}


def differentiate(loss_of: Callable[[Tensor], Tensor], logp: Tensor) -> dict[str, Any]:
    leaf = logp.clone().requires_grad_()
    loss = loss_of(leaf)
    (grad,) = torch.autograd.grad(loss, leaf)
    return {"loss": float(loss.detach()), "grad": numbers(grad)}


def numbers(x: Tensor) -> Any:
    return [numbers(row) for row in x] if x.ndim > 1 else [float(f"{v:.9g}") for v in x.tolist()]


# -- verl --------------------------------------------------------------------------------------------------------------

VERL = {  # case -> (policy loss, aggregation, settings)
    "grpo": ("vanilla", "seq-mean-token-mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
    "dr_grpo": ("vanilla", "seq-mean-token-sum-norm", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
    "rloo": ("vanilla", "seq-mean-token-sum", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
    "dapo": ("vanilla", "token-mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "gspo": ("gspo", "seq-mean-token-mean", {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04}),
    "gmpo": ("geo_mean", "seq-mean-token-mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
    "sapo": ("sapo", "seq-mean-token-mean", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "cispo": ("cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0}),
    "gpg": ("gpg", "token-mean", {}),
}


def verl(x: dict[str, Tensor]) -> dict[str, Any]:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    mask = (torch.arange(TOKENS) < x["length"].unsqueeze(-1)).float()
    A = x["advantage"].unsqueeze(-1) * mask
    common = {"strategy": "fsdp", "rollout_n": SIZE, "ppo_micro_batch_size_per_gpu": 1, "clip_ratio_c": 1e9}

    def loss(name: str, mode: str, settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        config = ActorConfig(**common, **settings)
        config.global_batch_info["loss_scale_factor"] = MAX_LENGTH
        return lambda logp: core_algos.get_policy_loss_fn(name)(x["logp_old"], logp, A, mask, mode, config)[0]

    index = numpy.repeat(numpy.arange(GROUPS), SIZE)
    token_rewards = torch.zeros(len(A), TOKENS)
    token_rewards[torch.arange(len(A)), x["length"] - 1] = x["reward"]
    estimators: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "grpo": lambda: core_algos.compute_grpo_outcome_advantage(token_rewards, mask, index),
        "dr_grpo": lambda: core_algos.compute_grpo_outcome_advantage(token_rewards, mask, index, norm_adv_by_std_in_grpo=False),
        "rloo": lambda: core_algos.compute_rloo_outcome_advantage(token_rewards, mask, index),
        "gpg": lambda: core_algos.compute_gpg_outcome_advantage(token_rewards, mask, index),
        "reinforce_pp_baseline": lambda: core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(token_rewards, mask, index),
        "reinforce_pp": lambda: core_algos.compute_reinforce_plus_plus_outcome_advantage(
            token_rewards, mask, config=SimpleNamespace(gamma=1.0)),
    }
    return {
        "losses": {case: {"settings": s} | differentiate(loss(name, mode, s), x["logp"]) for case, (name, mode, s) in VERL.items()},
        "advantages": {case: numbers(estimate()[0]) for case, estimate in estimators.items()},
        "kl": {k: numbers(core_algos.kl_penalty_forward(x["logp"], x["logp_ref"], k)) for k in ("k1", "k2", "k3")},
    }


# -- TRL ---------------------------------------------------------------------------------------------------------------

TRL = {  # case -> settings; epsilon_high of cispo is the largest weight itself
    "grpo": {"loss_type": "grpo"},
    "grpo_kl": {"loss_type": "grpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
}


def trl(x: dict[str, Tensor]) -> dict[str, Any]:
    from trl import GRPOTrainer

    mask = (torch.arange(TOKENS) < x["length"].unsqueeze(-1)).long()
    empty = torch.zeros(len(mask), 1, dtype=torch.long)

    def loss(settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        def of(logp: Tensor) -> Tensor:
            accelerator = SimpleNamespace(num_processes=1, reduce=lambda v, reduction: v, gather=lambda v: v)
            args = SimpleNamespace(delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                                   steps_per_generation=1)
            trainer = SimpleNamespace(**({
                "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token",
                "max_completion_length": MAX_LENGTH, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
                "aux_loss_enabled": False, "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1, "args": args,
                "accelerator": accelerator, "model": SimpleNamespace(training=True), "_metrics": defaultdict(lambda: defaultdict(list)),
                "_get_per_token_logps_and_entropies": lambda *a, **k: (logp, torch.zeros_like(logp), None)} | settings))
            batch = {"prompt_ids": empty, "prompt_mask": empty, "completion_ids": mask, "completion_mask": mask,
                     "advantages": x["advantage"], "old_per_token_logps": x["logp_old"], "ref_per_token_logps": x["logp_ref"],
                     "num_items_in_batch": mask.sum()}
            return GRPOTrainer._compute_loss(trainer, None, batch)
        return of

    return {"losses": {case: {"settings": s} | differentiate(loss(s), x["logp"]) for case, s in TRL.items()}}


PEERS = {"verl": verl, "trl": trl}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    x = inputs()
    for name in names or list(PEERS):
        data = {"peer": f"{name} {version(name)}", "torch": torch.__version__, "groups": GROUPS, "max_length": MAX_LENGTH,
                "inputs": {k: v.tolist() if k == "length" else numbers(v) for k, v in x.items()}} | PEERS[name](x)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(data, sort_keys=True).replace('], "', '],\n"').replace('}, "', '},\n"') + "\n")
        print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
