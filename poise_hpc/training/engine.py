"""DeepSpeed, and nothing else of the project knows it: ZeRO stage, precision, gradient clip, AdamW, the optimizer step.

The losses given to `backward` add up over microbatches and ranks to the J that is minimized: J is normalized by its
owner (`loop.py`), so DeepSpeed's averages over ranks and microbatches are undone here. Ranks must call `backward` equally often.
"""
from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Train
from ..types import PoiseError
from .ranks import Ranks


def start() -> Ranks:
    """Join the ranks of this job, as RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:  # DeepSpeed would look for MPI
        raise PoiseError(f"{', '.join(missing)} not set: the job's supervisor sets them; for one process by hand: RANK=0 LOCAL_RANK=0 "
                         "WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500")
    _quiet_import().init_distributed(verbose=False)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _quiet_import() -> Any:
    # DeepSpeed logs dozens of lines at INFO and warns of the accelerator that it chose.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch.distributed\.\w+` is deprecated")
    # Otherwise the first `initialize` on a CPU compiles a communication op for a minute, and needs g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(train: Train, dtype: str) -> dict[str, Any]:
    """The generated configuration; `train.deepspeed` is merged over it, section by section."""
    from ..config import overlay

    return overlay({
        "train_micro_batch_size_per_gpu": 1,        # of DeepSpeed's own data loader, which is not used
        "managed_gradient_accumulation": False,     # microbatches vary from step to step: `step` is the boundary
        "zero_optimization": {"stage": train.zero_stage},
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": train.gradient_clip,
        "steps_per_print": None,
    }, train.deepspeed)


class Engine:
    """A policy and its optimizer, spread over the ranks."""

    def __init__(self, policy: nn.Module, train: Train, dtype: str, ranks: Ranks):
        import copy

        self.ranks, self._norm = ranks, None
        # ZeRO-3 leaves no rank with whole weights: what samples and saves needs a copy of its own.
        self._copy = copy.deepcopy(policy.model) if train.zero_stage == 3 else None
        optimizer = torch.optim.AdamW(policy.parameters(), lr=train.learning_rate, betas=train.betas,
                                      weight_decay=train.weight_decay, fused=True)
        config = deepspeed_config(train, dtype)
        if train.zero_stage == 0 and dtype == "float32":
            # DeepSpeed clips here without telling the norm. This hook runs after the reduction over ranks.
            config["gradient_clipping"] = 0.0
            optimizer.register_step_pre_hook(lambda *_: self._clip(train.gradient_clip))
        self._engine, *_ = _quiet_import().initialize(model=policy, optimizer=optimizer, config=config)
        self.device = self._engine.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this microbatch's share of J."""
        self._engine.backward(loss * self.ranks.world)

    def step(self, learning_rate: float) -> float:
        """One update with the gradient of J, clipped; returns its norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._norm is None else self._norm
        return float(norm)

    def _clip(self, limit: float) -> None:
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        self._norm = torch.nn.utils.clip_grad_norm_(parameters, limit)

    def full_model(self) -> nn.Module:
        """The transformers model with whole weights: to sample from, to save. Collective under ZeRO-3."""
        model = self._engine.module.model
        if self._copy is None:
            return model
        zero = _quiet_import().zero
        for p, q in zip(model.parameters(), self._copy.parameters(), strict=True):
            with zero.GatheredParameters([p]), torch.no_grad():
                q.copy_(p)
        return self._copy

    def save(self, folder: Path) -> None:
        """Weights and optimizer state, by all ranks into one folder."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if loaded is None:
            raise PoiseError(f"DeepSpeed finds no checkpoint in {folder / 'engine'}")
