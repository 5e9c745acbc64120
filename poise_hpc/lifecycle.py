r"""A candidate's way, as a pure function. Its table is its test (tests/test_lifecycle.py).

    CHECK -> TRAIN -> EVALUATE -> REFLECT -> ARCHIVED
       \_______\_________\__________^             candidate error: evidence
    (the same stage again)                        preempted; infrastructure error, up to a limit; then HELD
"""
from __future__ import annotations

from .types import Outcome, Stage

AFTER = {
    Stage.CHECK: Stage.TRAIN,
    Stage.TRAIN: Stage.EVALUATE,
    Stage.EVALUATE: Stage.REFLECT,
    Stage.REFLECT: Stage.ARCHIVED,
}
TERMINAL = frozenset({Stage.ARCHIVED})
RESTING = frozenset({Stage.ARCHIVED, Stage.HELD})  # nothing runs, nothing will without a person


def next_stage(stage: Stage, outcome: Outcome, infra_errors: int, limit: int = 3) -> Stage:
    """The stage after an attempt at `stage` ended with `outcome`; `infra_errors` counts this stage's so far."""
    if stage in RESTING:
        return stage
    match outcome:
        case Outcome.SUCCEEDED:
            return AFTER[stage]
        case Outcome.CANDIDATE_ERROR:
            return Stage.REFLECT
        case Outcome.PREEMPTED:
            return stage
        case Outcome.INFRA_ERROR:
            return stage if infra_errors < limit else Stage.HELD
    raise AssertionError(outcome)
