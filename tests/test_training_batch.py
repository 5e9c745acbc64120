from __future__ import annotations

import torch

from poise_hpc.algorithms.base import RolloutBatch
from poise_hpc.training import metrics
from poise_hpc.training.batch import StepBatch, concatenate, deal, minibatches, take_groups


def step_batch(lengths: list[int], per_group: int, rewards: list[float] | None = None) -> StepBatch:
    N, T = len(lengths), max(lengths)
    length = torch.tensor(lengths)
    mask = torch.arange(T) < length[:, None]
    reward = torch.tensor(rewards or [0.0] * N)
    logp = torch.where(mask, -1.0, 0.0)
    rollouts = RolloutBatch(reward, {"correct": reward}, mask[:, 0], ~mask[:, 0], torch.arange(N) // per_group, mask, length,
                            logp, logp, 0, 0.0, T)
    return StepBatch(tuple((2, g) for g in range(N // per_group)), torch.where(mask, 5, 0), reward > 0, rollouts)


def test_take_and_concatenate_renumber_groups_and_pad():
    a, b = step_batch([1, 2, 3, 1], 2, [1, 0, 1, 1]), step_batch([5, 1], 2, [0, 0.5])
    both = concatenate([take_groups(a, torch.tensor([False, True])), b])
    assert both.prompts == ((2, 1), (2, 0))
    assert both.rollouts.group.tolist() == [0, 0, 1, 1] and both.rollouts.length.tolist() == [3, 1, 5, 1]
    assert both.tokens.shape == both.rollouts.mask.shape == (4, 5) and both.rollouts.mask.sum(1).tolist() == [3, 1, 5, 1]
    assert both.rollouts.components["correct"].tolist() == both.rollouts.reward.tolist() == [1, 1, 0, 0.5]
    none = take_groups(a, torch.tensor([False, False]))
    assert none.prompts == () and concatenate([none, b]).rollouts.groups == 1 and concatenate([none]).rollouts.groups == 0


def test_minibatches_cover_each_group_once_and_differ_between_epochs():
    parts = minibatches(10, 4, seed=0, step=3, epoch=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(10)) and [len(p) for p in parts] == [3, 3, 2, 2]
    assert torch.cat(minibatches(10, 4, 0, 3, 0)).equal(torch.cat(parts))
    assert not torch.cat(minibatches(10, 4, 0, 3, 1)).equal(torch.cat(parts))
    assert len(minibatches(2, 4, 0, 0, 0)) == 2  # fewer groups than minibatches: no empty ones


def test_deal_gives_every_row_once_and_all_ranks_as_many_microbatches():
    generator = torch.Generator().manual_seed(0)
    for ranks in (1, 2, 3):
        length = torch.randint(1, 30, (48,), generator=generator)
        group, rows = torch.arange(48) // 4, torch.randperm(48, generator=generator)[:31]
        dealt = deal(rows, group, length, torch.full((12,), 5), ranks, tokens=64)
        assert len({len(part) for part in dealt}) == 1
        assert sorted(r for part in dealt for m in part for r in m.tolist()) == sorted(rows.tolist())
        for microbatch in (m for part in dealt for m in part if len(m)):
            assert int(length[microbatch].sum()) + 5 * len(group[microbatch].unique()) <= 64
        loads = [sum(int(length[m].sum()) for m in part) for part in dealt]
        assert max(loads) - min(loads) <= 60  # one group


def test_deal_keeps_groups_together_unless_one_exceeds_the_limit():
    length, group = torch.tensor([4, 4, 9, 9]), torch.tensor([0, 0, 1, 1])
    whole = deal(torch.arange(4), group, length, torch.tensor([2, 2]), 1, tokens=1000)
    assert [sorted(m.tolist()) for m in whole[0]] == [[0, 1, 2, 3]]
    cut = deal(torch.arange(4), group, length, torch.tensor([2, 2]), 1, tokens=11)
    assert sorted(sorted(m.tolist()) for m in cut[0]) == [[0, 1], [2], [3]]
    long = deal(torch.tensor([3]), group, length, torch.tensor([2, 2]), 2, tokens=1)  # one completion always fits
    assert [[m.tolist() for m in part] for part in long] == [[[3]], [[]]]
    assert [[m.tolist() for m in part] for part in deal(torch.tensor([], dtype=torch.long), group, length, torch.tensor([2, 2]), 2, 9)] \
        == [[[]], [[]]]


def test_sampling_metrics_by_hand():
    row = metrics.sampling(step_batch([1, 3, 2, 2], 2, [1, 0, 0.5, 0.5]))
    assert (row["reward"], row["acc"], row["length"], row["entropy"], row["zero_variance"]) == (0.5, 0.75, 2.0, 1.0, 0.5)
    assert row["valid"] == 1.0 and row["truncated"] == 0.0 and row["components"] == {"correct": 0.5} and row["groups_sampled"] == 2


def test_drift_and_effective_share_by_hand():
    logp, old = torch.log(torch.tensor([[0.5, 0.3, 0.9]])), torch.log(torch.tensor([[0.5, 0.2, 0.1]]))
    tokens, kl, far = metrics.drift(logp, old, torch.tensor([[True, True, False]])).tolist()
    # ratio 1.5: k3 = 1.5 - 1 - log 1.5
    assert tokens == 2 and far == 1 and abs(kl - (0.5 - torch.tensor(1.5).log().item())) < 1e-6
    assert metrics.effective_share(torch.tensor([1.0, 1.0])) == 1.0
    assert metrics.effective_share(torch.tensor([1.0, 0.0])) == 0.5
