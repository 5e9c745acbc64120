"""The transition table, written out."""
import pytest

from poise_hpc.lifecycle import AFTER_REVIEW, next_stage
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


@pytest.mark.parametrize(("stage", "outcome", "after"), [
    (Stage.CHECK, OK, Stage.REVIEW), (Stage.CHECK, BAD, Stage.REVIEW), (Stage.CHECK, INFRA, Stage.CHECK), (Stage.CHECK, STOPPED, Stage.CHECK),
    (Stage.TRAIN, OK, Stage.EVALUATE), (Stage.TRAIN, BAD, Stage.REFLECT)])
def test_an_author_sees_what_its_check_found(stage, outcome, after):
    assert next_stage(stage, outcome, 0, author=True) is after


@pytest.mark.parametrize(("stage", "outcome", "rung", "after"), [
    (Stage.TRAIN, OK, True, Stage.EVALUATE), (Stage.EVALUATE, OK, True, Stage.TRAIN), (Stage.EVALUATE, OK, False, Stage.REFLECT),
    (Stage.EVALUATE, Outcome.SCREENED_OUT, True, Stage.REFLECT), (Stage.EVALUATE, BAD, True, Stage.REFLECT),
    (Stage.EVALUATE, INFRA, True, Stage.EVALUATE), (Stage.CHECK, OK, True, Stage.TRAIN)])
def test_at_a_rung(stage, outcome, rung, after):
    assert next_stage(stage, outcome, 0, rung=rung) is after


def test_reviews_end_in_three_ways():
    assert AFTER_REVIEW == {"accepted": Stage.TRAIN, "revised": Stage.CHECK, "rejected": Stage.REFLECT}
