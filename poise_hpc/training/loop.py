"""One training step, as in the box:

    sample G completions of each prompt from pi_old          (again for groups that `select` dropped)
    reward them
    A <- advantages, on the whole batch
    repeat for each epoch, for each minibatch of groups:
        J <- 1/Z  sum m * w * l(A)
        theta <- AdamW(theta, dJ / dtheta)

Everything random is a pure function of (seed, step, round, prompt, sample): a resumed run draws what the undisturbed
run would have drawn. All ranks hold the same batch and take the same decisions; they differ in the rows they compute.
"""
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms import ops
from ..algorithms.base import Algorithm, PolicyBatch, RolloutBatch
from ..config import Config
from ..rollout.base import RolloutEngine, stream_key
from ..tasks.base import Grade, Task
from ..types import CandidateError
from . import candidate, metrics
from .batch import StepBatch, concatenate, deal, minibatches, take_groups
from .engine import Engine
from .policy import Policy
from .ranks import Ranks


@dataclass
class Trainer:
    config: Config
    seed: int
    task: Task
    algorithm: Algorithm
    engine: Engine
    sampler: RolloutEngine
    reference: Policy | None     # start weights, in host memory; with needs = {"ref_logp"}
    ranks: Ranks
    state: dict[str, Any]        # the algorithm's

    def step(self, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """One training step: its curves row and the seconds of its parts."""
        clock = metrics.Stopwatch()
        # Candidates that draw random numbers draw reproducible ones, the same on every rank.
        torch.manual_seed(stream_key(self.seed, "algorithm", step) >> 1)
        sampled, batch = self.rollouts(step, clock)
        row = {"step": step, **metrics.sampling(sampled)}
        del sampled  # what it recalls may go after the first update
        if not batch.prompts:  # `select` dropped every group: nothing to learn from
            return row | {"trained_rows": 0, "gradient_norm": 0.0, "loss": 0.0}, clock.seconds
        with clock("advantages"):
            A, keep = candidate.advantages(self.algorithm, batch.rollouts, self.state)
            self.state = candidate.plain_state(self.state)
        r = batch.rollouts
        weight = importance_weights(r, self.config.rollout.weight_cap, self.sampler.exact)
        updates = []
        for epoch in range(self.config.train.epochs):
            for groups in minibatches(r.groups, self.config.train.minibatches, self.seed, step, epoch):
                updates.append(self.update(batch, A, keep, weight, groups, step, epoch, clock))
                batch = replace(batch, recall=None)  # theta has moved
        live = r.mask & keep[:, None]
        return row | summary(updates, self.config.train.epochs - 1, self.ranks) | metrics.advantage(A, live) | {
            "ess": metrics.effective_share(weight[live])}, clock.seconds

    # --- sampling

    def rollouts(self, step: int, clock: metrics.Stopwatch) -> tuple[StepBatch, StepBatch]:
        """(all that was sampled, the groups to train on)."""
        self.sync(clock)
        sampled, kept, missing = [], [], self.config.rollout.prompts
        for round in range(self.config.rollout.max_rounds):
            part = self.sample(step, round, missing, clock)
            chosen = take_groups(part, candidate.select(self.algorithm, part.rollouts, self.state))
            sampled, kept, missing = [*sampled, part], [*kept, chosen], missing - len(chosen.prompts)
            if missing == 0:
                break
        self.sampler.rest()
        self.engine.rest()
        return concatenate(sampled), concatenate(kept)

    def sync(self, clock: metrics.Stopwatch) -> None:
        """The sampler gets the present weights. Collective under ZeRO-3."""
        error = None
        try:
            with clock("sync"):
                if self.sampler.copies:
                    self.sampler.load_weights(self.engine.model, self.engine.whole)
                else:
                    self.sampler.load_weights(self.engine.full_model())
        except Exception as failure:  # told to all ranks before the next collective, then raised
            error = failure
        self.ranks.agree(error)

    def sample(self, step: int, round: int, count: int, clock: metrics.Stopwatch) -> StepBatch:
        """`count` fresh prompts, completed and graded: each rank does its share, all ranks get the whole."""
        config, error, part = self.config.rollout, None, None
        first = (round * self.config.train.steps + step) * config.prompts  # rounds draw from ranges of their own
        mine = range(count)[self.ranks.rank * count // self.ranks.world:(self.ranks.rank + 1) * count // self.ranks.world]
        try:
            with clock("rollout"):
                problems = [self.task.train_problem(self.seed, first + i) for i in mine]
                keys = [stream_key(self.seed, step, round, i) for i in mine]
                if problems or self.sampler.collective:
                    drawn = self.sampler.generate(
                        [p.prompt for p in problems], config.group_size, temperature=config.temperature,
                        max_new_tokens=self.task.max_new_tokens, eos_id=self.task.eos_id, pad_id=self.task.pad_id, keys=keys)
            with clock("grade"):
                part = self.graded(problems, drawn, step, keys) if problems else None
        except Exception as failure:  # told to all ranks before the next collective, then raised
            error = failure
        self.ranks.agree(error)
        batch = concatenate([p for p in self.ranks.gather(part) if p is not None])
        with clock("score"):
            return self.scored(batch)

    def graded(self, problems: list[Any], drawn: Any, step: int, keys: list[int]) -> StepBatch:
        n, mask = self.config.rollout.group_size, drawn.mask
        completions = [tokens[:length] for tokens, length in zip(drawn.tokens.tolist(), drawn.length.tolist())]
        grades = self.task.grade([p for p in problems for _ in range(n)], completions, drawn.truncated.tolist())
        told = [coin(grade, keys[i // n], i % n) for i, grade in enumerate(grades)] if self.config.train.reward == "random" else grades
        rollouts = RolloutBatch(
            reward=torch.tensor([g.reward for g in told], dtype=torch.float32),
            components={k: torch.tensor([g.components[k] for g in told], dtype=torch.float32) for k in told[0].components},
            valid=torch.tensor([g.valid for g in told]), truncated=drawn.truncated,
            group=torch.arange(len(problems)).repeat_interleave(n), mask=mask, length=drawn.length,
            logp_old=drawn.logp, logp_rollout=drawn.logp, step=step, progress=step / self.config.train.steps,
            max_length=self.task.max_new_tokens)
        return StepBatch(tuple(p.prompt for p in problems), drawn.tokens, torch.tensor([g.correct for g in grades]), rollouts, drawn.recall)

    def scored(self, batch: StepBatch) -> StepBatch:
        """Adds what only a forward pass knows: log-probs and entropy of pi_old, log-probs of the reference."""
        added: dict[str, Tensor] = {}
        if not self.sampler.exact or "entropy" in self.algorithm.needs:
            logp, entropy = self.score(self.engine, batch, "entropy" in self.algorithm.needs)
            added = ({} if self.sampler.exact else {"logp_old": logp}) | ({} if entropy is None else {"entropy": entropy})
        if self.reference is not None:  # on the device while it is needed, and no longer
            added["logp_ref"] = self.score(self.reference.to(self.engine.device), batch, False)[0]
            self.reference.to("cpu")
        return replace(batch, rollouts=replace(batch.rollouts, **added))

    @torch.no_grad()
    def score(self, policy: Any, batch: StepBatch, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """(N, T) log-probs and entropies of all completions, computed by all ranks together."""
        shape = batch.tokens.shape
        values = [torch.zeros(shape), torch.zeros(shape) if entropy else None]
        mine = []
        for rows in self.deal(batch, torch.arange(shape[0])):
            out = self.forward(policy, batch, rows if len(rows) else torch.zeros(1, dtype=torch.long), entropy)
            mine += [(rows, [None if v is None else v.cpu() for v in out])] if len(rows) else []
        for rows, parts in (item for part in self.ranks.gather(mine) for item in part):
            for value, computed in zip(values, parts):
                if value is not None:
                    value[rows, :computed.shape[1]] = computed
        return values[0], values[1]

    # --- learning

    def update(self, batch: StepBatch, A: Tensor, keep: Tensor, weight: Tensor, groups: Tensor, step: int, epoch: int,
               clock: metrics.Stopwatch) -> dict[str, Any]:
        """One optimizer step on a minibatch of groups."""
        r, train = batch.rollouts, self.config.train
        rows = torch.isin(r.group, groups).nonzero().squeeze(1)
        W = token_weights(self.algorithm, r, keep, rows) * weight
        live = (W != 0).any(1)
        if train.skip_zero_advantage and self.algorithm.zero_advantage_zero_loss:
            live &= (A != 0).any(1)   # the others are in Z, and add exactly nothing
        error, loss, drift = None, 0.0, torch.zeros(3, dtype=torch.float64)
        for part in self.deal(batch, live.nonzero().squeeze(1)):
            filler = len(part) == 0   # others have more: an ordinary forward whose loss is 0 keeps the ranks in step
            part = rows[:1] if filler else part
            with clock("forward"):
                logp, entropy = self.forward(self.engine, batch, part, "entropy" in self.algorithm.needs)
            with clock("loss"):
                dJ = torch.zeros_like(logp), None
                if not filler and error is None:
                    try:
                        policy_batch = self.policy_batch(batch, A, part, logp, entropy)
                        w = W[part, :logp.shape[1]].to(logp.device)
                        g = candidate.loss_gradient(self.algorithm, policy_batch, w, self.state)
                        dJ, loss = (g.logp, g.entropy), loss + g.loss
                        if epoch == train.epochs - 1:
                            drift += metrics.drift(logp.detach(), policy_batch.logp_old, w != 0)
                    except CandidateError as failure:
                        error = failure
            with clock("backward"):
                surrogate = (logp * dJ[0]).sum()     # its gradient with respect to theta is that of J
                self.engine.backward(surrogate if dJ[1] is None else surrogate + (entropy * dJ[1]).sum())
        self.ranks.agree(error)
        with clock("optimizer"):
            norm = self.engine.step(train.learning_rate * min(1.0, (step + 1) / max(1, train.warmup_steps)))
        if not torch.isfinite(torch.tensor(norm)):
            raise CandidateError("nonfinite-gradient", f"the gradient's norm is {norm} in step {step}, epoch {epoch}")
        return {"epoch": epoch, "loss": loss, "norm": norm, "drift": drift, "rows": int(live.sum())}

    def deal(self, batch: StepBatch, rows: Tensor) -> list[Tensor]:
        """This rank's microbatches of `rows`."""
        prompt_length = torch.tensor([len(p) for p in batch.prompts])
        return deal(rows, batch.rollouts.group, batch.rollouts.length, prompt_length, self.ranks.world,
                    self.config.train.microbatch_tokens)[self.ranks.rank]

    def forward(self, policy: Any, batch: StepBatch, rows: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """(B, T) log-probs and entropies of these rows, T their longest."""
        device, length = self.engine.device, batch.rollouts.length[rows]
        groups, group = torch.unique(batch.rollouts.group[rows], return_inverse=True)
        tokens = batch.tokens[rows, :int(length.max())]
        prompts = [batch.prompts[g] for g in groups.tolist()]
        with batch.recall.replay(groups, list(map(len, prompts)), rows, length) if batch.recall else nullcontext():
            return policy(prompts, group.to(device), tokens.to(device), length.to(device), entropy)

    def policy_batch(self, batch: StepBatch, A: Tensor, rows: Tensor, logp: Tensor, entropy: Tensor | None) -> PolicyBatch:
        r, T, device = batch.rollouts, logp.shape[1], logp.device

        def part(x: Tensor) -> Tensor:
            return (x[rows, :T] if x.dim() == 2 else x[rows]).to(device)

        return PolicyBatch(
            logp=logp, logp_old=part(r.logp_old), advantage=part(A), mask=part(r.mask), length=part(r.length),
            reward=part(r.reward), progress=r.progress, max_length=r.max_length,
            logp_ref=None if r.logp_ref is None else part(r.logp_ref), entropy=entropy)


def importance_weights(r: RolloutBatch, cap: float, exact: bool) -> Tensor:
    """w (N, T): min(pi_old / sampler, cap), a constant; 1 where the sampler is the trainer's own model."""
    if exact:
        return torch.ones_like(r.logp_old)
    return torch.where(r.mask, r.logp_old - r.logp_rollout, 0.0).exp().clamp(max=cap)


def token_weights(algorithm: Algorithm, r: RolloutBatch, keep: Tensor, rows: Tensor) -> Tensor:
    """m / Z (N, T) of one optimizer step on `rows`; 0 elsewhere. Z is over all ranks and microbatches."""
    mask = torch.zeros_like(r.mask)
    mask[rows] = r.mask[rows]
    inside = torch.zeros_like(keep)
    inside[rows] = keep[rows]
    m, z = ops.token_weights(algorithm.reduction, mask, r.length, inside, r.max_length)
    return torch.where(mask & inside[:, None], m / z, 0.0) if inside.any() else torch.zeros_like(r.logp_old)


def summary(updates: list[dict[str, Any]], last: int, ranks: Ranks) -> dict[str, Any]:
    """What the updates of one training step were like. Drift: of the last epoch, how far the step has gone."""
    norms = [u["norm"] for u in updates]
    tokens, kl, far = ranks.sum(sum(u["drift"] for u in updates)).tolist()
    return {
        "gradient_norm": sum(norms) / len(norms), "gradient_norm_max": max(norms),
        "loss": float(ranks.sum(torch.tensor([u["loss"] for u in updates], dtype=torch.float64)).mean()),
        "kl_old": kl / max(tokens, 1.0), "clip_fraction": far / max(tokens, 1.0),
        "trained_rows": sum(u["rows"] for u in updates if u["epoch"] == last),
    }


def coin(grade: Grade, key: int, sample: int) -> Grade:
    """What the algorithm is told in place of `grade` under random rewards (Shao et al. 2025, arXiv:2506.10947): 1 or 0, whatever the
    completion says. What is recorded as right stays what is right."""
    reward = float(stream_key("reward", key, sample) & 1)
    return replace(grade, reward=reward, components=dict.fromkeys(grade.components, reward), valid=True)
