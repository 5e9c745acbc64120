"""A small archive, a finished candidate and replies of a language model, for the agent's tests."""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from poise_hpc.agent.base import Context, Facts
from poise_hpc.agent.package_text import show_package
from poise_hpc.reply import Reply
from poise_hpc.types import EntrySummary, Outcome, Proposal, Reflection, Score

CLIP_HIGHER_CODE = '''"""Clip-higher GRPO: the upper clip of the ratio is wider than the lower one.

A_i = (R_i - mean R) / (std R + floor);  l = -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A).  DAPO, arXiv:2503.14476.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import group_mean, group_std, ratio


@dataclass(frozen=True)
class ClipHigher(Algorithm):
    clip_low: float = 0.2
    clip_high: float = 0.28
    std_floor: float = 1e-6

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("group-std", "normalization"),
                  Mechanism("asymmetric-clip", "clipping", {"clip_high": 0.2}))
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        R, g = rollouts.reward, rollouts.group
        return Advantages((R - group_mean(R, g)) / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        w, A = ratio(batch), batch.advantage
        return -torch.minimum(w * A, w.clamp(1 - self.clip_low, 1 + self.clip_high) * A)


ALGORITHM = ClipHigher()
'''

GRPO_CODE = (CLIP_HIGHER_CODE.replace("    clip_low: float = 0.2\n    clip_high: float = 0.28\n", "    clip: float = 0.2\n")
             .replace("self.clip_low", "self.clip").replace("self.clip_high", "self.clip").replace("ClipHigher", "GRPO")
             .replace('Mechanism("asymmetric-clip", "clipping", {"clip_high": 0.2})', 'Mechanism("symmetric-clip", "clipping")'))


def score(overall: float, delta: float = 0.0) -> Score:
    return Score(overall=overall, ci=(overall - 1, overall + 1), by_seed={"0": overall}, final=overall + 2,
                 curve={"0.5": overall - 3, "1.0": overall + 2}, benchmarks={"easy/acc@1": 61.0, "hard/pass@32": 40.5},
                 delta=delta, delta_ci=(delta - 1.5, delta + 1.5))


def entry(id: str, name: str, parents: tuple[str, ...] = ("c0000",), mechanisms: tuple[str, ...] = ("group-std",),
          overall: float | None = 47.0, delta: float = 0.0, cause: str = "", verdict: str = "undecided") -> EntrySummary:
    return EntrySummary(id=id, name=name, parents=parents, cause=cause, proposer="seed", mechanisms=mechanisms,
                        outcome=Outcome.CANDIDATE_ERROR if cause else Outcome.SUCCEEDED,
                        score=None if cause or overall is None else score(overall, delta),
                        behaviour={"entropy_end": 0.41}, verdict=verdict, run_seconds=60.0, created="2026-01-01T00:00:00Z")


def proposal(name: str, mechanisms: tuple[str, ...], parents: tuple[str, ...] = ("c0000",), **details: Any) -> Proposal:
    return Proposal(name=name, parents=parents, hypothesis=f"{name} keeps entropy up", mechanisms=mechanisms,
                    description=f"{name} changes one term: A = R - b_{name}", expected_effect="entropy stays above 0.4",
                    details=details)


def context(id: str = "c0003", **changes: Any) -> Context:
    entries = (entry("c0000", "GRPO", (), ("group-std", "symmetric-clip")),
               entry("c0001", "DR-GRPO", mechanisms=("token-sum", "no-std"), overall=48.5, delta=1.5, verdict="supported"),
               entry("c0002", "SA-GRPO", mechanisms=("two-anchors",), cause="nonfinite-loss", verdict="failed"))
    proposals = {"c0000": proposal("GRPO", entries[0].mechanisms, ()), "c0001": proposal("DR-GRPO", entries[1].mechanisms),
                 "c0002": proposal("SA-GRPO", entries[2].mechanisms)}
    made = Context(id=id, seed=0, parent=entries[0], parent_code={"algorithm.py": GRPO_CODE}, parent_proposal=proposals["c0000"],
                   entries=entries, proposals=proposals,
                   reflections={"c0002": Reflection("failed", "The two anchors blew the ratio up at step 7.", ("kl-spike",))},
                   code=lambda id: {"algorithm.py": GRPO_CODE if id == "c0000" else f"# {id}\nVALUE = '{id}'\n"})
    return replace(made, **changes)


def facts(**changes: Any) -> Facts:
    rows = [{"step": n, "reward": n / 10, "entropy": 1.0 - n / 20, "kl_old": 0.01} for n in range(11)]
    made = Facts(id="c0003", proposal=proposal("CLIPHIGHER-GRPO", ("group-std", "asymmetric-clip")), outcome=Outcome.SUCCEEDED,
                 score=score(49.0, 2.0), parent_score=score(47.0), baseline_score=score(47.0),
                 curves={"0": rows, "1": [row | {"reward": row["reward"] + 0.2} for row in rows]}, baseline_curves={"0": rows},
                 behaviour={"entropy_end": 0.5})
    return replace(made, **changes)


def idea(name: str = "CLIPHIGHER-GRPO", mechanisms: tuple[str, ...] = ("group-std", "asymmetric-clip"), **changes: Any) -> dict[str, Any]:
    return {"name": name, "hypothesis": f"{name} keeps entropy above GRPO's after half of training", "mechanisms": list(mechanisms),
            "description": f"{name}: l = -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) with {' and '.join(mechanisms)}",
            "expected_effect": "entropy up, pass@32 up", "responds_to": ["reward", "group", "logp_old"],
            "hyperparameters": [{"name": "clip_high", "value": 0.28, "meaning": "upper clip"}],
            "sources": ["arXiv:2503.14476"]} | changes


def ideas(*several: dict[str, Any]) -> str:
    return json.dumps({"proposals": list(several)})


def package(code: str = CLIP_HIGHER_CODE) -> str:
    return show_package({"algorithm.py": code})


CONSISTENT = json.dumps({"reasoning": "claim by claim: fine", "consistent": True, "findings": []})


def inconsistent(code: str = "line 31 clips both sides at 0.2") -> str:
    return json.dumps({"reasoning": "the upper clip", "consistent": False, "findings": [
        {"claim": "the upper clip is 0.28", "code": code, "change": "use clip_high"}]})


def cited(quantity: str, step: int | None, value: float, of: str = "candidate") -> dict[str, Any]:
    return {"of": of, "quantity": quantity, "step": step, "value": value}


def diagnosis(**changes: Any) -> dict[str, Any]:
    return {"verdict": "supported", "diagnosis": "The wider clip kept entropy up.",
            "citations": [cited("entropy", 10, 0.5), cited("hard/pass@32", None, 40.5)],
            "symptoms": ["slow-start"], "next_step": "Widen it further; entropy would show it."} | changes


@dataclass
class Scripted:
    """An LLM that says what it was told to, by operator and in order; an exception is raised."""

    replies: dict[str, list[Any]]

    def __post_init__(self) -> None:
        self.requests: list[Any] = []

    def complete(self, request: Any) -> Reply:
        self.requests.append(request)
        said = self.replies[request.operator].pop(0)
        if isinstance(said, Exception):
            raise said
        return Reply("m", said, "stop", "", 1, 1)

    def asked(self, operator: str) -> list[str]:
        """The latest message of each request of an operator."""
        return [r.messages[-1]["content"] for r in self.requests if r.operator == operator]
