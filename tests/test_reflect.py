"""Reflection by rules: each rule sees its own hand-made curve and stays silent on a healthy one."""
from __future__ import annotations

from dataclasses import replace

import pytest

from helpers_offline import GRPO, score
from poise_hpc.agent.base import Facts
from poise_hpc.agent.reflect import FAILURES, RULES, SYMPTOMS, Curve, reflect
from poise_hpc.types import Outcome

STEPS = 40


def curve(**columns):
    """A healthy run with some columns replaced: a function of t in [0, 1) and the step, or a number."""
    healthy = dict(
        entropy=lambda t, s: 0.8 - 0.4 * t, kl_old=lambda t, s: 0.004 + 0.002 * (s % 3), kl_ref=lambda t, s: 0.2 * t, clip_fraction=0.05,
        gradient_norm=lambda t, s: 0.5 + 0.2 * (s % 4), length=lambda t, s: 14 + 3 * t, zero_variance=lambda t, s: 0.6 - 0.2 * t,
        reward=lambda t, s: 0.2 + 0.5 * t, acc=lambda t, s: 0.2 + 0.5 * t, valid=lambda t, s: 0.75 + 0.2 * t, truncated=0.01)
    return [{"step": s} | {k: f(s / STEPS, s) if callable(f) else f for k, f in (healthy | columns).items()} for s in range(STEPS)]


ILL = {
    "entropy-collapse": dict(entropy=lambda t, s: 0.8 if t < 0.4 else 0.05),
    "kl-spike": dict(kl_old=lambda t, s: 0.9 if s == 23 else 0.005),
    "gradient-spike": dict(gradient_norm=lambda t, s: 40.0 if s == 17 else 0.6),
    "zero-variance": dict(zero_variance=lambda t, s: 0.5 + 0.5 * t),
    "length-explosion": dict(length=lambda t, s: 12 + 12 * t),
    "length-collapse": dict(length=lambda t, s: 15 - 11 * t),
    "truncation": dict(truncated=lambda t, s: 0.5 * t),
    "validity-loss": dict(valid=lambda t, s: 0.9 if t < 0.5 else 0.6),
    "late-collapse": dict(acc=lambda t, s: 0.2 + t if t < 0.5 else 0.3, reward=lambda t, s: 0.2 + t if t < 0.5 else 0.3),
    "no-learning": dict(acc=0.2, reward=0.2),
    "reward-hacking": dict(acc=lambda t, s: 0.2 + 0.1 * t, reward=lambda t, s: 0.2 + 0.9 * t),
}


def facts(rows_by_seed, **changes):
    return Facts(**dict(id="c0003", proposal=GRPO, outcome=Outcome.SUCCEEDED, score=score(31.0, {"0": 31.0}), curves=rows_by_seed) | changes)


def test_every_rule_has_a_case():
    assert set(ILL) == set(SYMPTOMS)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_rule_sees_its_symptom_and_nothing_else(symptom):
    assert reflect(facts({"0": curve(**ILL[symptom])})).symptoms == (symptom,)


def test_healthy_run_has_no_symptoms():
    reflection = reflect(facts({"0": curve(), "1": curve()}))
    assert reflection.symptoms == () and "No symptom" in reflection.text
    assert reflection.author == "rules" and "rules" in reflection.text


def test_missing_columns_short_and_empty_curves():
    for rows in ([], [{"step": 0}], curve()[:2], [{"step": s, "entropy": None, "acc": float("nan")} for s in range(9)]):
        assert reflect(facts({"0": rows})).symptoms == ()


def test_the_hypothesis_stands_in_the_proposal_and_is_not_said_again():
    made = facts({"0": curve()}, proposal=replace(GRPO, hypothesis="Entropy stays above 0.25."))
    assert "Entropy stays" not in reflect(made).text


def test_figures_carry_steps():
    text = reflect(facts({"0": curve(**ILL["kl-spike"])})).text
    assert "kl_old 0.9 nats at step 23" in text
    assert "median 0.005" in text


def test_ends_are_means_of_fifths():
    # ten steps 0..9: fifths are (0, 1) and (8, 9)
    assert Curve([{"step": s, "x": s} for s in range(10)]).ends("x") == (0.5, 8.5)


def test_symptom_needs_half_of_the_seeds():
    ill, well = curve(**ILL["truncation"]), curve()
    assert reflect(facts({"0": ill, "1": well})).symptoms == ("truncation",)
    assert reflect(facts({"0": ill, "1": well, "2": well})).symptoms == ()


@pytest.mark.parametrize("ours, verdict", [
    ({"0": 35.0, "1": 36.0, "2": 35.5}, "supported"),   # + 5, 6, 5.5: mean 5.5, half-width 4.30 * 0.5 / sqrt 3 = 1.24
    ({"0": 25.0, "1": 24.0, "2": 24.5}, "refuted"),
    ({"0": 40.0, "1": 24.0, "2": 30.0}, "undecided"),
    ({"0": 50.0}, "undecided"),                          # one seed has no interval
])
def test_verdict_is_the_paired_interval(ours, verdict):
    parent = score(30.0, {"0": 30.0, "1": 30.0, "2": 30.0})
    reflection = reflect(facts({}, score=score(sum(ours.values()) / len(ours), ours), parent_score=parent))
    assert reflection.verdict == verdict
    if verdict == "supported":
        assert "+5.5 points, 95 % interval +4.3 to +6.7" in reflection.text


def test_parent_decides_and_baseline_stands_in():
    ours, worse, better = score(30, {"0": 30.0, "1": 30.5}), score(20, {"0": 20.0, "1": 20.5}), score(40, {"0": 40.0, "1": 40.5})
    assert reflect(facts({}, score=ours, parent_score=worse, baseline_score=better)).verdict == "supported"
    assert reflect(facts({}, score=ours, parent_score=None, baseline_score=better)).verdict == "refuted"


def test_what_the_baseline_showed_is_compared():
    text = reflect(facts({"0": curve()}, baseline_curves={"0": curve(**ILL["zero-variance"])})).text
    assert "The baseline showed `zero-variance` on the same seeds; this candidate does not." in text
    text = reflect(facts({"0": curve(**ILL["truncation"])}, baseline_curves={"0": curve()})).text
    assert "The baseline does not show `truncation`." in text


@pytest.mark.parametrize("cause", sorted(FAILURES))
def test_failures(cause):
    reflection = reflect(facts({"0": curve(**ILL["gradient-spike"])}, outcome=Outcome.CANDIDATE_ERROR, score=None, cause=cause,
                               message="Traceback ...\nValueError: log of -1"))
    assert reflection.verdict == "failed"
    assert cause in reflection.text and FAILURES[cause] in reflection.text and "log of -1" in reflection.text
    assert reflection.symptoms == ("gradient-spike",)


def test_unknown_cause_is_named():
    text = reflect(facts({}, outcome=Outcome.CANDIDATE_ERROR, score=None, cause="odd", message="")).text
    assert "(odd)" in text


def test_rules_are_named_once():
    assert len({rule.symptom for rule in RULES}) == len(RULES)
