"""The completions of one training step, and how they are dealt out: pure functions, the same on every rank.

Every rank holds the whole step's batch (tokens and a few numbers per token), so that advantages, normalization and
the split over ranks and microbatches are computed everywhere alike and need not be communicated.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithms.base import RolloutBatch
from ..rollout.base import stream_key, uniforms
from ..rollout.recall import Recall


@dataclass(frozen=True)
class StepBatch:
    """N completions of G prompts; completion i answers prompts[rollouts.group[i]]. Completions of a group are adjacent."""

    prompts: tuple[tuple[int, ...], ...]  # G token lists
    tokens: Tensor                        # (N, T) int64, right-padded
    correct: Tensor                       # (N,) bool, for the curves
    rollouts: RolloutBatch                # what the algorithm sees
    recall: Recall | None = None          # products of these tokens with the present weights; None: unknown


def concatenate(parts: Sequence[StepBatch]) -> StepBatch:
    """The parts one after another, groups renumbered, padded to the widest. Of several, nothing is recalled."""
    if len(parts) == 1:
        return parts[0]
    T = max(p.tokens.shape[1] for p in parts)
    offsets = np.cumsum([0] + [len(p.prompts) for p in parts])
    first = parts[0].rollouts

    def joined(name: str) -> Any:
        values = [getattr(p.rollouts, name) for p in parts]
        if name == "group":
            return torch.cat([v + int(o) for v, o in zip(values, offsets)])
        if name == "components":
            return {k: torch.cat([v[k] for v in values]) for k in values[0]}
        return torch.cat([_widen(v, T) for v in values]) if isinstance(values[0], Tensor) else values[0]

    return StepBatch(tuple(x for p in parts for x in p.prompts), torch.cat([_widen(p.tokens, T) for p in parts]),
                     torch.cat([p.correct for p in parts]), replace(first, **{f.name: joined(f.name) for f in fields(first)}))


def _widen(x: Tensor, T: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, T - x.shape[1])) if x.dim() == 2 else x


def take_groups(batch: StepBatch, keep: Tensor) -> StepBatch:
    """The groups with keep (G,) bool, renumbered in their order."""
    rows = keep[batch.rollouts.group]
    number = keep.cumsum(0) - 1

    def taken(name: str) -> Any:
        value = getattr(batch.rollouts, name)
        if name == "group":
            return number[value[rows]]
        if name == "components":
            return {k: v[rows] for k, v in value.items()}
        return value[rows] if isinstance(value, Tensor) else value

    return StepBatch(tuple(p for p, k in zip(batch.prompts, keep.tolist()) if k), batch.tokens[rows], batch.correct[rows],
                     replace(batch.rollouts, **{f.name: taken(f.name) for f in fields(batch.rollouts)}),
                     batch.recall and batch.recall.take(keep, rows))


def clone(rollouts: RolloutBatch) -> RolloutBatch:
    """A copy for candidate code, which might write into what it is given."""
    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v.clone() for k, v in value.items()}
        return value.clone() if isinstance(value, Tensor) else value

    return replace(rollouts, **{f.name: copied(getattr(rollouts, f.name)) for f in fields(rollouts)})


def minibatches(groups: int, count: int, seed: int, step: int, epoch: int) -> list[Tensor]:
    """The groups of each optimizer step of an epoch: a permutation, cut as evenly as possible; never an empty one."""
    order = np.argsort(uniforms([stream_key(seed, "minibatches", step, epoch)], 1, groups)[0], kind="stable")
    return [torch.from_numpy(part) for part in np.array_split(order, count) if len(part)]


def deal(rows: Tensor, group: Tensor, length: Tensor, prompt_length: Tensor, ranks: int, tokens: int) -> list[list[Tensor]]:
    """Rows (indices) to microbatches of each rank: [rank][microbatch] -> rows, with as many microbatches on every rank.

    A group stays together (its prompt is computed once) unless it alone exceeds `tokens`, the most prompt and
    completion tokens of a microbatch. The ranks get about the same number of tokens, whatever the lengths: the largest
    group first, always to the rank with the least. Microbatches that are missing somewhere are empty.
    """
    pieces: list[tuple[int, list[int]]] = []  # tokens, rows
    for g in torch.unique(group[rows]).tolist():
        prompt, members = int(prompt_length[g]), rows[group[rows] == g]
        members = members[torch.argsort(length[members], stable=True)]  # similar lengths together, if it must be cut
        piece, cost = [], prompt
        for row, n in zip(members.tolist(), length[members].tolist()):
            if piece and cost + n > tokens:
                pieces.append((cost, piece))
                piece, cost = [], prompt
            piece.append(row)
            cost += n
        pieces.append((cost, piece))
    load = [0] * ranks
    out: list[list[Tensor]] = [[] for _ in range(ranks)]
    filled = [tokens + 1] * ranks  # of the last microbatch of each rank
    for cost, piece in sorted(pieces, key=lambda p: -p[0]):
        r = load.index(min(load))
        load[r] += cost
        if filled[r] + cost > tokens:
            out[r].append(torch.tensor(piece))
            filled[r] = cost
        else:
            out[r][-1] = torch.cat([out[r][-1], torch.tensor(piece)])
            filled[r] += cost
    most = max(1, *(len(part) for part in out))
    return [part + [torch.empty(0, dtype=torch.long)] * (most - len(part)) for part in out]
