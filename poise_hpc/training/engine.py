"""DeepSpeed, and nothing else of the project knows it: ZeRO stage, precision, gradient clip, AdamW, the optimizer step.

The losses given to `backward` add up over microbatches and ranks to the J that is minimized: J is normalized by its
owner (`loop.py`), so DeepSpeed's averages over ranks and microbatches are undone here. Ranks must call `backward` equally often.
"""
from __future__ import annotations

import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Train
from ..types import PoiseError
from .process import reproducible
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
    from ..settings import overlay

    return overlay({
        "train_micro_batch_size_per_gpu": 1,        # of DeepSpeed's own data loader, which is not used
        "managed_gradient_accumulation": False,     # microbatches vary from step to step: `step` is the boundary
        "zero_optimization": {"stage": stage(train, dtype)},
        "bf16": {"enabled": dtype == "bfloat16"},
        # In bfloat16, its default, a sum over many microbatches would depend on how many there are (0.8 % of a gradient with 64).
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": train.gradient_clip,
        "steps_per_print": None,
    }, train.deepspeed)


def stage(train: Train, dtype: str) -> int:
    """bfloat16 at stage 0 is run as stage 1, the same arithmetic: float32 weights are kept beside either way, and stage 1 spreads them."""
    return max(train.zero_stage, 1) if dtype == "bfloat16" else train.zero_stage


MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch's AdamW


class Engine:
    """A policy and its optimizer, spread over the ranks."""

    def __init__(self, policy: nn.Module, train: Train, dtype: str, ranks: Ranks, sampled: bool = True):
        """`sampled`: somebody samples from the model itself. ZeRO-3 leaves no rank with whole weights, so that takes a second model, which
        has weights between `full_model` and `rest`."""
        self.ranks, self._norm = ranks, None
        self._spread = train.zero_stage == 3
        whole = hollow(policy.model) if self._spread and sampled else None
        self._plain = stage(train, dtype) == 0  # weights and moments are whole on every rank
        self._optimizer = optimizer = torch.optim.AdamW(policy.parameters(), lr=train.learning_rate, betas=train.betas,
                                      weight_decay=train.weight_decay, fused=True)
        config = deepspeed_config(train, dtype)
        if self._plain:
            # DeepSpeed clips here without telling the norm. This hook runs after the reduction over ranks.
            config["gradient_clipping"] = 0.0
            optimizer.register_step_pre_hook(lambda *_: self._clip(train.gradient_clip))
        self._engine, *_ = _quiet_import().initialize(model=policy, optimizer=optimizer, config=config)
        self.device = self._engine.device
        self._copy = None if whole is None else whole.to(self.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with reproducible():
            return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this microbatch's share of J."""
        with reproducible():
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

    @property
    def model(self) -> nn.Module:
        """The transformers model that is trained. Under ZeRO-3 its parameters are spread over the ranks: see `whole`."""
        return self._engine.module.model

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside, these parameters hold all their values on every rank. Collective under ZeRO-3."""
        return _quiet_import().zero.GatheredParameters(parameters) if self._spread else nullcontext()

    def full_model(self) -> nn.Module:
        """The transformers model with whole weights, to sample from, until `rest`. Collective under ZeRO-3."""
        if not self._spread:
            return self.model
        assert self._copy is not None, "made with sampled=False"
        for p, q in zip(self.model.parameters(), self._copy.parameters(), strict=True):
            with self.whole([p]):
                q.data = p.detach().clone()
        return self._copy

    def rest(self) -> None:
        """Nothing is sampled until the next `full_model`: an update does without whole weights."""
        for q in () if self._copy is None else self._copy.parameters():
            q.data = q.data.new_empty(0)

    def weights(self) -> dict[str, Tensor]:
        """Whole weights by name, to save; under ZeRO-3, where this is collective, in rank 0's host memory, one parameter after another."""
        if not self._spread:
            return self.model.state_dict()
        here: dict[Tensor, Tensor] = {}
        for p in self.model.parameters():
            with self.whole([p]):
                if self.ranks.rank == 0:
                    here[p] = p.detach().to("cpu", copy=True)
        return {name: here.get(value, value) for name, value in self.model.state_dict(keep_vars=True).items()}

    def save(self, folder: Path) -> None:
        """Whole weights and moments in float32, and the number of updates. Collective: the parameters are dealt out to the
        ranks, each writes a file. Neither the number of ranks nor the ZeRO stage shows in what is written."""
        from safetensors.torch import save_file

        if not self._optimizer.state:
            self._make_moments()
        updates = int(next(iter(self._optimizer.state.values()))["step"])
        mine, load = {}, [0] * self.ranks.world
        for name, p in self._parameters():
            owner = load.index(min(load))
            whole = {key: self._whole(p, key) for key in ("weight", *MOMENTS)}
            load[owner] += whole["weight"].numel()
            if owner == self.ranks.rank:
                mine |= {f"{name}/{key}": value.detach().cpu().contiguous() for key, value in whole.items()}
        (folder / "engine").mkdir(exist_ok=True)
        save_file(mine, folder / "engine" / f"part-{self.ranks.rank}.safetensors", metadata={"updates": str(updates)})

    def load(self, folder: Path) -> None:
        """Go on from what any number of ranks has saved."""
        from safetensors import safe_open

        parameters, found = dict(self._parameters()), set()
        self._make_moments()
        for path in sorted((folder / "engine").glob("part-*.safetensors")):
            with safe_open(path, "pt") as part:
                updates = float(part.metadata()["updates"])
                for key in part.keys():
                    name, _, kind = key.rpartition("/")
                    found.add((name, kind))
                    if name in parameters:
                        self._set_whole(parameters[name], kind, part.get_tensor(key))
        if found != {(name, kind) for name in parameters for kind in ("weight", *MOMENTS)}:
            raise PoiseError(f"{folder / 'engine'} holds {len(found)} tensors of another model: {3 * len(parameters)} were wanted")
        if not self._plain and not hasattr(next(iter(parameters.values())), "ds_id"):
            self._engine.optimizer.update_lp_params()
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)

    def close(self) -> None:
        """No more steps. DeepSpeed's gradient hooks hold weights and optimizer otherwise, where the garbage collector cannot see it;
        under ZeRO-3 they still do, of this rank's share."""
        self._engine.destroy()

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._engine.module.named_parameters())

    def _make_moments(self) -> None:
        """DeepSpeed makes them in its first step: one without gradient, at learning rate 0, that is not counted."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        logp, _ = self([[0]], one[0], one, one[0] + 1)
        self.backward(0.0 * logp.sum())
        self.step(0.0)
        for state in self._optimizer.state.values():
            state["step"].zero_()

    def _whole(self, p: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._plain:
            return p if kind == "weight" else self._optimizer.state[p][kind]
        return safe_get_full_fp32_param(p) if kind == "weight" else safe_get_full_optimizer_state(p, kind)

    def _set_whole(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        with torch.no_grad():
            if self._plain:
                self._whole(p, kind).copy_(value)
            elif hasattr(p, "ds_id"):
                # ZeRO-3. Its setter of whole values fails where the ranks do not divide the number of elements.
                size = p.ds_tensor.numel()
                padded = torch.nn.functional.pad(value.flatten(), (0, size * self.ranks.world - value.numel()))
                part = padded.narrow(0, size * self.ranks.rank, size)
                if kind == "weight":
                    utils.safe_set_local_fp32_param(p, part)
                    with _quiet_import().zero.GatheredParameters([p], modifier_rank=0):
                        p.copy_(value)
                else:
                    utils.safe_set_local_optimizer_state(p, part, kind)
            elif kind == "weight":
                utils.safe_set_full_fp32_param(p, value)
            else:
                utils.safe_set_full_optimizer_state(p, value, kind)


def hollow(model: nn.Module) -> nn.Module:
    """A copy without the weights: parameters of no elements, buffers whole. Tied parameters stay tied."""
    import copy

    empty = {id(p): nn.Parameter(p.data.new_empty(0), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, empty)
