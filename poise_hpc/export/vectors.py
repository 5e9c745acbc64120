"""The export job: what an algorithm reads, and what it gives on three steps' batches, by the trainer's own code.

    vectors.npz     the batches, advantages, losses and gradients; `meta` is JSON
    payload         what decides whether a foreign trainer can host it: see `facts`

Candidate code runs here, so this is a job like any other. J of any subset S of a batch's completions, in a microbatch or an
optimizer step of their own, follows from what is stored: sum(loss[S]) sum(z) / sum(z[S]); so do the gradients.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..algorithms import gate, ops, probes
from ..algorithms.base import Algorithm, PolicyBatch, RolloutBatch
from ..algorithms.load import load
from ..training import candidate
from ..training.batch import StepBatch, take_groups
from ..training.loop import importance_weights, token_weights
from ..types import CandidateError

GROUPS, SIZE, TOKENS = 4, 6, 8
STEPS, TOTAL = (0, 40, 80), 100  # training steps of the three batches, of how many
FILE = "vectors.npz"


def run(job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    package = Path(job["package"])
    if findings := gate.check_package(package):
        raise CandidateError("gate", "\n".join(str(f) for f in findings))
    algorithm = load(package)
    arrays, states = {}, []
    state = algorithm.initial_state()
    for number, step in enumerate(STEPS):
        found, state = case(algorithm, step, state, job["weight_cap"])
        arrays |= {f"{number}/{name}": x.numpy() for name, x in found.items()}
        states.append(candidate.plain_state(state))  # the next step changes it in place
    meta = {"steps": STEPS, "total": TOTAL, "group_size": SIZE, "max_length": TOKENS, "weight_cap": job["weight_cap"], "states": states}
    with open(attempt_dir / FILE, "wb") as f:
        np.savez_compressed(f, meta=np.frombuffer(files.dumps(meta).encode(), np.uint8), **arrays)
    return {"facts": facts(algorithm), "versions": {"torch": torch.__version__, "numpy": np.__version__}}


def case(algorithm: Algorithm, step: int, state: dict[str, Any], cap: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(inputs and outputs of one training step, the state after it)."""
    r, logp, entropy = sampled(algorithm, step)
    A, keep, state = learnt(algorithm, r, state)
    rows = torch.arange(len(r.reward))
    W = token_weights(algorithm, r, keep, rows) * importance_weights(r, cap, exact=False)
    batch = PolicyBatch(logp, r.logp_old, A, r.mask, r.length, r.reward, r.progress, r.max_length, r.logp_ref, entropy)
    whole = candidate.loss_gradient(algorithm, batch, W, state)
    loss = [candidate.loss_gradient(algorithm, probes.rows(batch, i), W[i], state).loss for i in rows.split(1)]
    z = [ops.token_weights(algorithm.reduction, r.mask[i], r.length[i], keep[i], r.max_length)[1] for i in rows.split(1)]
    out = {"advantage": A, "keep": keep, "loss": torch.tensor(loss, dtype=torch.float64), "gradient": whole.logp, "z": torch.stack(z)}
    given = {name: getattr(r, name) for name in ("reward", "valid", "truncated", "length", "logp_old", "logp_rollout", "logp_ref")}
    given |= {"correct": r.components["correct"], "format": r.components["format"], "logp": logp, "entropy_old": r.entropy,
              "entropy": entropy, "entropy_gradient": whole.entropy}
    return {name: x.detach() for name, x in (given | out).items() if x is not None}, state


def learnt(algorithm: Algorithm, r: RolloutBatch, state: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A (N, T), keep (N,) and the state after; groups that `select` drops are left out and not sampled again."""
    chosen = candidate.select(algorithm, r, state)
    A, keep, rows = torch.zeros(r.mask.shape), torch.zeros(len(r.reward), dtype=torch.bool), chosen[r.group]
    if chosen.any():
        whole = StepBatch(((),) * r.groups, torch.zeros(r.mask.shape, dtype=torch.long), r.valid, r)
        A[rows], keep[rows] = candidate.advantages(algorithm, take_groups(whole, chosen).rollouts, state)
        state = candidate.plain_state(state)
    return A, keep, state


def sampled(algorithm: Algorithm, step: int) -> tuple[RolloutBatch, Tensor, Tensor | None]:
    """A step's completions, and log-probs and entropies of a policy that has moved. Ragged; truncated at the limit; importance weights
    on both sides of the cap. Steps differ in the rewards: mixed, one right, all right and all wrong groups; mixed; all right."""
    random = torch.Generator().manual_seed(1000 + step)
    mixed = torch.rand(GROUPS, SIZE, generator=random) < 0.5
    mixed[:, 0], mixed[:, 1] = True, False
    correct = mixed.clone()
    if step == STEPS[0]:
        correct[1], correct[2], correct[3] = torch.arange(SIZE) == 2, True, False
    elif step == STEPS[2]:
        correct[:] = True
    valid = correct | (torch.rand(GROUPS, SIZE, generator=random) < 0.5)
    r = probes.rollouts(algorithm, correct, tokens=TOKENS, seed=step, valid=valid)
    noise = torch.randn(r.logp_old.shape, generator=random)
    r = replace(r, truncated=r.length == TOKENS, logp_rollout=r.logp_old + 0.6 * torch.randn(noise.shape, generator=random),
                step=step, progress=step / TOTAL)
    policy = probes.policy_batch(r, r.logp_old, 0.3, seed=step)
    return r, policy.logp.detach(), None if policy.entropy is None else policy.entropy.detach() + 0.1 * noise.abs()


def facts(algorithm: Algorithm) -> dict[str, Any]:
    """What it reads of rollouts and of microbatches, by running it with eyes on every field; whether it selects or leaves out."""
    seen: dict[str, set[str]] = {"advantages": set(), "loss": set(), "components": set()}
    leaves_out = keeps = False
    for batch in batches(algorithm):
        state = algorithm.initial_state()
        watched = watching(batch, seen["advantages"], seen["components"])
        leaves_out |= algorithm.select(watched, state) is not None
        out = algorithm.advantages(watched, state)
        leaves_out |= out.keep is not None
        A = out.value if out.value.ndim == 2 else out.value[:, None].expand(batch.mask.shape)
        for drift in probes.DRIFTS:
            algorithm.token_loss(watching(probes.policy_batch(batch, A, drift), seen["loss"]), state)
        keeps |= bool(state)  # it may begin empty
    if "components" in seen["advantages"] and not seen["components"]:  # all of them, whatever their names
        seen["components"] = {"correct", "format"}
    return {"class": type(algorithm).__name__, "reduction": str(algorithm.reduction), "needs": sorted(algorithm.needs),
            "mechanisms": [m.name for m in algorithm.mechanisms], "state": keeps, "leaves_out": leaves_out,
            **{f"{name}_read": sorted(found) for name, found in seen.items()}}


def batches(algorithm: Algorithm) -> Iterator[RolloutBatch]:
    yield from (batch for _, batch in probes.variety(algorithm))
    yield from (sampled(algorithm, step)[0] for step in STEPS)


def watching(batch: Any, seen: set[str], components: set[str] | None = None) -> Any:
    """The same batch, which notes what is read of it."""
    names = {f.name for f in fields(batch)}

    class Watched(type(batch)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                seen.add(name)
            return super().__getattribute__(name)

    class Named(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            components.add(name)
            return super().__getitem__(name)

        def get(self, name: str, default: Any = None) -> Any:
            components.add(name)
            return super().get(name, default)

    values = {name: getattr(batch, name) for name in names}
    return Watched(**values | ({"components": Named(values["components"])} if components is not None else {}))
