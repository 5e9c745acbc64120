"""The transition table, written out."""
import pytest

from poise_hpc.lifecycle import next_stage
from poise_hpc.types import Outcome, Stage

OK, BAD, INFRA, STOPPED = Outcome.SUCCEEDED, Outcome.CANDIDATE_ERROR, Outcome.INFRA_ERROR, Outcome.PREEMPTED

TABLE = [
    (Stage.CHECK, OK, 0, Stage.TRAIN), (Stage.TRAIN, OK, 0, Stage.EVALUATE), (Stage.EVALUATE, OK, 0, Stage.REFLECT),
    (Stage.REFLECT, OK, 0, Stage.ARCHIVED),
    (Stage.CHECK, BAD, 0, Stage.REFLECT), (Stage.TRAIN, BAD, 2, Stage.REFLECT), (Stage.EVALUATE, BAD, 0, Stage.REFLECT),
    (Stage.TRAIN, INFRA, 0, Stage.TRAIN), (Stage.TRAIN, INFRA, 2, Stage.TRAIN), (Stage.TRAIN, INFRA, 3, Stage.HELD),
    (Stage.CHECK, INFRA, 3, Stage.HELD), (Stage.EVALUATE, INFRA, 3, Stage.HELD),
    (Stage.TRAIN, STOPPED, 3, Stage.TRAIN), (Stage.EVALUATE, STOPPED, 0, Stage.EVALUATE),  # being preempted is no failure
]


@pytest.mark.parametrize(("stage", "outcome", "errors", "after"), TABLE)
def test_table(stage, outcome, errors, after):
    assert next_stage(stage, outcome, errors, limit=3) is after


@pytest.mark.parametrize("stage", [Stage.ARCHIVED, Stage.HELD])
@pytest.mark.parametrize("outcome", list(Outcome))
def test_resting_stages_stay(stage, outcome):
    assert next_stage(stage, outcome, 0) is stage
