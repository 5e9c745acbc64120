r"""A candidate's way, as pure functions. Their tables are their test (tests/test_lifecycle.py).

    CHECK -> TRAIN -> EVALUATE -> REFLECT -> ARCHIVED
       \_______\_________\__________^             candidate error: evidence
    (the same stage again)                        preempted; infrastructure error, up to a limit; then HELD

With screening, TRAIN and EVALUATE come once for each rung, which is a point of the training, and then for the whole of it:

    TRAIN -> EVALUATE -> TRAIN      promoted: the next rung, or the rest of the training
                \-> REFLECT         screened out: evidence

A candidate with an author that can be asked (an LLM's) goes from CHECK to REVIEW, however the check ended:

    CHECK -> REVIEW -> TRAIN      accepted: the checks passed and say nothing against the proposal
      ^________|   \-> REFLECT    rejected: the repair rounds are used up, or it cannot be repaired
        revised: another version of the package
"""
from __future__ import annotations

from typing import Literal

from .types import Outcome, Stage

AFTER = {
    Stage.CHECK: Stage.TRAIN,
    Stage.TRAIN: Stage.EVALUATE,
    Stage.EVALUATE: Stage.REFLECT,
    Stage.REFLECT: Stage.ARCHIVED,
}
Review = Literal["accepted", "revised", "rejected"]
AFTER_REVIEW: dict[Review, Stage] = {"accepted": Stage.TRAIN, "revised": Stage.CHECK, "rejected": Stage.REFLECT}
RESTING = frozenset({Stage.ARCHIVED, Stage.HELD})  # nothing runs, nothing will without a person
THINKING = frozenset({Stage.REVIEW, Stage.REFLECT})  # waits for the proposer, not for a job


def next_stage(stage: Stage, outcome: Outcome, infra_errors: int, limit: int = 3, author: bool = False, rung: bool = False) -> Stage:
    """The stage after an attempt at `stage` ended with `outcome`; `infra_errors` counts this stage's so far. `author`:
    somebody can be shown what the check found. `rung`: its training goes to a rung only."""
    if stage in RESTING:
        return stage
    match outcome:
        case Outcome.SUCCEEDED | Outcome.CANDIDATE_ERROR if stage is Stage.CHECK and author:
            return Stage.REVIEW
        case Outcome.SUCCEEDED if stage is Stage.EVALUATE and rung:
            return Stage.TRAIN
        case Outcome.SUCCEEDED:
            return AFTER[stage]
        case Outcome.CANDIDATE_ERROR | Outcome.SCREENED_OUT:
            return Stage.REFLECT
        case Outcome.PREEMPTED:
            return stage
        case Outcome.INFRA_ERROR:
            return stage if infra_errors < limit else Stage.HELD
    raise AssertionError(outcome)
