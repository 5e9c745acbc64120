"""Words with one meaning: the nouns that every other module uses. Standard library only.

*campaign*   one search with its archive           *attempt*     one submission of one stage
*candidate*  one algorithm package and its record  *evaluation*  scores of saved weights on benchmarks
*proposal*   what a candidate is meant to test     *entry*       a candidate's write-once archive record
"""
from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

BASELINE_ID = "c0000"  # GRPO, the algorithm that everything is paired with
START = "0"            # the evaluation point of the untrained start policy
# A candidate's numbers belong to the code that was proposed and checked.
RESTORE_CODE = ("Restore it (the record of an archived candidate holds its text). `poise-hpc add` takes an edited package as another "
                "candidate; `poise-hpc hold` lets this one rest")


class Stage(StrEnum):
    """Where a candidate is. The transition table is `lifecycle.next_stage`."""

    PREPARE = "prepare"    # the campaign's own: model and data
    CHECK = "check"        # contract checks and static gate, as a job
    REVIEW = "review"      # an LLM's candidate: its author sees what the check found, on the controller
    TRAIN = "train"        # one run per training seed
    EVALUATE = "evaluate"  # saved weights on the selection prompts
    REFLECT = "reflect"    # diagnosis, on the controller
    ARCHIVED = "archived"  # record written: terminal
    HELD = "held"          # needs a person: `retry` goes on


class Outcome(StrEnum):
    """How an attempt, or a candidate as a whole, ended."""

    SUCCEEDED = "succeeded"
    CANDIDATE_ERROR = "candidate_error"  # the algorithm's fault: evidence, goes to reflection
    SCREENED_OUT = "screened_out"        # of a candidate: a rung has ended it before its training was whole; evidence, too
    INFRA_ERROR = "infra_error"          # the cluster's or ours: repeat, then HELD
    PREEMPTED = "preempted"              # stopped from outside, resumable: repeat without limit


class PoiseError(Exception):
    """An error a user can act on: what came, what was wanted, how to go on. Exit code 1."""


class UsageError(PoiseError):
    """Wrong command line, config or site file. Exit code 2."""


class CandidateError(PoiseError):
    """Raised where candidate code is called: the algorithm's fault, never the cluster's."""

    def __init__(self, cause: str, message: str):
        super().__init__(f"{cause}: {message}")
        self.cause = cause      # short slug: "raised", "nonfinite-loss", "wrong-shape", "hang", ...
        self.message = message


def candidate_id(number: int) -> str:
    return f"c{number:04d}"


def candidate_number(id: str) -> int:
    return int(id.removeprefix("c"))


@dataclass(frozen=True)
class Proposal:
    """What a candidate tests and why. Written to proposal.json before any code exists."""

    name: str                        # e.g. "VM-AV-GRPO"
    parents: tuple[str, ...]         # candidate ids; () for the baseline
    hypothesis: str                  # one falsifiable sentence
    mechanisms: tuple[str, ...]      # names, as the algorithm package declares them
    description: str                 # what is changed against the parent, with the formula
    expected_effect: str
    sources: tuple[str, ...] = ()    # papers, prior cards
    proposer: str = "person"         # "offline", "llm:<model>", "person", "seed"
    details: dict[str, Any] = field(default_factory=dict)  # the proposer's own data: JSON-able

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Proposal:
        return cls(**{k: tuple(v) if isinstance(v, list) and k != "details" else v for k, v in data.items()})


@dataclass(frozen=True)
class Reflection:
    """A mechanism-level diagnosis of one candidate. Figures it cites stand in the entry."""

    verdict: str                     # of the scores, by their interval: "supported" | "refuted" | "undecided" | "failed" | "screened" (not trained to the end)
    text: str                        # Markdown
    symptoms: tuple[str, ...] = ()   # slugs: "entropy-collapse", "kl-spike", "late-collapse", ...
    author: str = "rules"            # "rules" or "llm:<model>"
    hypothesis: str = ""             # the author's verdict on the hypothesis as written, training included; "" from rules

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reflection:
        return cls(**{k: v for k, v in data.items() if k != "written"} | {"symptoms": tuple(data.get("symptoms", ()))})


@dataclass(frozen=True)
class Score:
    """A candidate's figures over its training seeds, in points (0..100)."""

    overall: float                              # what selection uses (curve or final score, by config)
    ci: tuple[float, float] | None              # 95 % interval of `overall` over seeds; None with one seed
    by_seed: dict[str, float]                   # seed -> overall
    final: float                                # overall of the last evaluation point
    curve: dict[str, float]                     # training fraction ("0.25") -> overall, mean over seeds; the baseline's has START
    benchmarks: dict[str, float]                # "hard/pass@32" -> value, last point, mean over seeds
    delta: float | None = None                  # paired difference to the baseline
    delta_ci: tuple[float, float] | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Score:
        ci, delta_ci = (None if pair is None else tuple(pair) for pair in (data["ci"], data["delta_ci"]))
        return cls(**{**data, "ci": ci, "delta_ci": delta_ci})


@dataclass(frozen=True)
class Screening:
    """What a rung found, in points (0..100): Overall at one point of training, against figures that are fixed."""

    at: str                                     # training fraction, "0.25"
    rule: str                                   # "below_start" | "behind"
    passed: bool
    by_seed: dict[str, float]                   # seed -> overall at that point
    overall: float                              # its mean
    start: float                                # of the untrained start policy
    delta: float                                # paired difference to the baseline at the same point and seeds
    delta_ci: tuple[float, float] | None        # 95 % interval; None with one seed
    bound: float                                # what was compared ...
    limit: float                                # ... with this; below it, the candidate goes no further

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Screening:
        return cls(**data | {"delta_ci": tuple(data["delta_ci"]) if data["delta_ci"] is not None else None})


@dataclass(frozen=True)
class EntrySummary:
    """One row of the index: what selection, leaderboard and status need of an archived candidate."""

    id: str
    name: str
    parents: tuple[str, ...]
    outcome: Outcome
    cause: str                        # "" when it succeeded
    proposer: str
    mechanisms: tuple[str, ...]
    score: Score | None               # None when it failed or was screened out
    behaviour: dict[str, float]       # condensed training curves: see evaluation.metrics.behaviour
    verdict: str                      # of the reflection
    run_seconds: float                # summed over attempts and ranks; queue wait is not in it
    created: str                      # ISO 8601, UTC
    record_sha256: str = ""
    signature: str = ""               # agent.novelty.signature: two that cannot repeat each other are told apart without their files
    screened: Screening | None = None  # the rung that has ended it
    digest: str = ""                  # algorithms.digest: equal for two that compute the same; "" where it is not known
