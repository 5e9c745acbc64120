"""Reflection by rules: symptoms in the training curves, a verdict from the paired interval, a diagnosis that cites figures.

A rule looks at one seed's rows and returns the figure it saw; a symptom counts when at least half of the seeds show it.
The thresholds are ours, set where GRPO stays silent in the base, big and stress labs. A rule sees a coincidence in a
curve, not a cause: what is written about mechanisms is what the literature says of that symptom.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ..types import Outcome, Reflection
from .base import Facts

class Curve:
    """One seed's training rows by column. A column is made once, however many rules ask."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows
        self._columns: dict[str, tuple[list[int], list[float]]] = {}

    def column(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values where the key is there and finite."""
        if key not in self._columns:
            rows = [row for row in self.rows if isinstance(row.get(key), (int, float)) and abs(row[key]) < float("inf")]
            self._columns[key] = [int(row["step"]) for row in rows], [float(row[key]) for row in rows]
        return self._columns[key]

    def ends(self, key: str) -> tuple[float, float] | None:
        """Means over the first and the last fifth of a curve (single steps are noise); None below five steps."""
        _, values = self.column(key)
        fifth = len(values) // 5
        return (fmean(values[:fifth]), fmean(values[-fifth:])) if fifth else None

    def smoothed(self, key: str) -> list[tuple[int, float]]:
        """Running mean over an eighth of the curve, at least three steps, at the window's last step."""
        steps, values = self.column(key)
        width = max(3, len(values) // 8)
        return [(steps[i], fmean(values[i - width + 1:i + 1])) for i in range(width - 1, len(values))]


@dataclass(frozen=True)
class Rule:
    symptom: str                            # slug
    find: Callable[[Curve], str | None]     # the figure that shows it, with its step; None where it is absent
    meaning: str


def entropy_collapse(curve: Curve) -> str | None:
    found = curve.ends("entropy")
    if not found or found[0] <= 0 or found[1] > 0.1 * found[0]:
        return None
    step = next(step for step, value in zip(*curve.column("entropy"), strict=True) if value <= 0.1 * found[0])
    return f"entropy {found[0]:.3g} -> {found[1]:.3g} nats a token, below 10 % of its start at step {step}"


def spike(key: str, factor: float, floor: float, unit: str) -> Callable[[Curve], str | None]:
    """A step `factor` times above the curve's median and above `floor`."""
    def find(curve: Curve) -> str | None:
        steps, values = curve.column(key)
        if len(values) < 5:
            return None
        typical, highest = median(values), max(values)
        step = steps[values.index(highest)]
        if highest > max(floor, factor * typical):
            return f"{key} {highest:.3g}{unit} at step {step}, median {typical:.3g}"
        return None
    return find


def kl_spike(curve: Curve) -> str | None:
    return spike("kl_old", 8, 0.1, " nats")(curve) or spike("kl_ref", 8, 1.0, " nats")(curve)


def zero_variance(curve: Curve) -> str | None:
    found = curve.ends("zero_variance")
    if found and found[1] > 0.8:
        return f"{100 * found[1]:.0f} % of the groups had equal rewards in the last fifth ({100 * found[0]:.0f} % in the first)"
    return None


def length_explosion(curve: Curve) -> str | None:
    found = curve.ends("length")
    return f"length {found[0]:.1f} -> {found[1]:.1f} tokens" if found and found[1] > 1.5 * found[0] else None


def length_collapse(curve: Curve) -> str | None:
    found = curve.ends("length")
    return f"length {found[0]:.1f} -> {found[1]:.1f} tokens" if found and found[1] < 0.5 * found[0] else None


def truncation(curve: Curve) -> str | None:
    found = curve.ends("truncated")
    return f"{100 * found[1]:.0f} % of the completions were cut at the token limit at the end" if found and found[1] > 0.2 else None


def validity_loss(curve: Curve) -> str | None:
    points = curve.smoothed("valid")
    if not points:
        return None
    best, last = max(v for _, v in points), points[-1][1]
    return f"valid answers {100 * best:.0f} % at best, {100 * last:.0f} % at step {points[-1][0]}" if last < best - 0.15 else None


def late_collapse(curve: Curve) -> str | None:
    points = curve.smoothed("acc") or curve.smoothed("reward")
    if not points:
        return None
    step, best = max(points, key=lambda p: p[1])
    last = points[-1][1]
    if best > 0.1 and last < 0.7 * best:
        return f"accuracy in training {best:.2f} at step {step}, {last:.2f} at step {points[-1][0]}"
    return None


def no_learning(curve: Curve) -> str | None:
    points = curve.smoothed("acc") or curve.smoothed("reward")
    if len(points) < 5:
        return None
    best = max(v for _, v in points)
    return f"accuracy in training {points[0][1]:.3f} at the start and never above {best:.3f}" if best < points[0][1] + 0.03 else None


def reward_hacking(curve: Curve) -> str | None:
    reward, acc = curve.ends("reward"), curve.ends("acc")
    if reward and acc and reward[1] - reward[0] > 0.1 and acc[1] - acc[0] < 0.25 * (reward[1] - reward[0]):
        return f"reward {reward[0]:.2f} -> {reward[1]:.2f} while accuracy went {acc[0]:.2f} -> {acc[1]:.2f}"
    return None


RULES = (
    Rule("entropy-collapse", entropy_collapse, "The policy became nearly deterministic: little is left to explore, and pass@k suffers first."),
    Rule("kl-spike", kl_spike, "One update moved the policy far from its samples: the advantage or the ratio bound let a few tokens dominate."),
    Rule("gradient-spike", spike("gradient_norm", 10, 1.0, ""), "Single steps had outlying gradients: the advantage's scale is not steady."),
    Rule("zero-variance", zero_variance, "Most groups carried no signal: prompts were too easy or too hard for the group size."),
    Rule("length-explosion", length_explosion, "Completions grew: long failures are cheap under this reduction, or length is not priced."),
    Rule("length-collapse", length_collapse, "Completions shrank: the objective pays for brevity before correctness."),
    Rule("truncation", truncation, "The token limit decides about rewards."),
    Rule("validity-loss", validity_loss, "The answer format was unlearned: failures push down well-formed text too, or nothing anchors it."),
    Rule("late-collapse", late_collapse, "Training undid what it had learned: the surrogate is not trustworthy after many updates a batch."),
    Rule("no-learning", no_learning, "The signal did not reach the policy: advantages too small, too rare, or clipped away."),
    Rule("reward-hacking", reward_hacking, "The shaped reward was raised without raising correctness."),
)
SYMPTOMS = tuple(rule.symptom for rule in RULES)

FAILURES = {
    "check-failed": "The package breaks the contract of an algorithm; no training was spent on it.",
    "gate": "The package uses what algorithms may not use; no training was spent on it.",
    "raised": "Its code raised an exception on training data that the checks did not have.",
    "hang": "Its code did not come back.",
    "wrong-shape": "It returned tensors of the wrong shape.",
    "nonfinite-advantage": "Advantages became infinite or not-a-number: a division without a floor, or a logarithm of zero.",
    "nonfinite-loss": "The loss became infinite or not-a-number: an exponential of an unbounded log-ratio is the usual cause.",
    "nonfinite-gradient": "The gradient became infinite or not-a-number although the loss was finite: a root or a ratio at its edge.",
    "nonfinite-weights": "Training left weights that are not finite: steps were too large.",
}


def reflect(facts: Facts) -> Reflection:
    """The diagnosis of a finished candidate, by rules."""
    seen = symptoms(facts)
    if facts.outcome is Outcome.SCREENED_OUT:
        lines = [f"**Screened out** ({facts.cause}): it was not trained to the end, so its hypothesis stays open.", f"{facts.message}."]
        verdict = "screened"
    elif facts.outcome != Outcome.SUCCEEDED or facts.score is None:
        lines = [f"**Failed** ({facts.cause or 'unknown cause'}). {FAILURES.get(facts.cause, '')}".rstrip()]
        lines += [message_line(facts)] if facts.message.strip() else []
        verdict = "failed"
    else:
        verdict, lines = judge(facts)
    if seen:
        lines += ["", "Symptoms in training:"] + [f"- `{rule.symptom}`: {'; '.join(figures)}. {rule.meaning}" for rule, figures in seen]
    elif facts.curves:
        lines += ["", "No symptom in the training curves."]
    own = {rule.symptom for rule, _ in seen}
    base = {rule.symptom for rule, _ in symptoms(facts, baseline=True)}
    if facts.baseline_curves and (cured := sorted(base - own)):
        lines.append(f"The baseline showed {_slugs(cured)} on the same seeds; this candidate does not.")
    if facts.baseline_curves and (new := sorted(own - base)):
        lines.append(f"The baseline does not show {_slugs(new)}.")
    lines += ["", "Written by rules, not by a model."]
    return Reflection(verdict, "\n".join(lines), tuple(rule.symptom for rule, _ in seen))


def message_line(facts: Facts) -> str:
    """What went wrong, in the line that later proposals are shown (`evidence.line`)."""
    return f"Message: {facts.message.strip().splitlines()[-1][:300]}"


def symptoms(facts: Facts, baseline: bool = False) -> list[tuple[Rule, list[str]]]:
    """Rules that at least half of the seeds trigger, with what each seed showed."""
    curves = {seed: Curve(rows) for seed, rows in sorted((facts.baseline_curves if baseline else facts.curves).items())}
    out = []
    for rule in RULES:
        figures = [f"seed {seed}: {figure}" for seed, curve in curves.items() if (figure := rule.find(curve))]
        if figures and 2 * len(figures) >= len(curves):
            out.append((rule, figures))
    return out


def judge(facts: Facts) -> tuple[str, list[str]]:
    """supported | refuted | undecided, from the paired interval against the parent, else the baseline."""
    from ..stats import paired_difference

    score, lines = facts.score, []
    assert score is not None
    verdict = "undecided"
    for name, other in (("parent", facts.parent_score), ("baseline", facts.baseline_score)):
        if other is None:
            continue
        if (paired := paired_difference(score.by_seed, other.by_seed)) is None:
            lines.append(f"Against the {name}: no training seed in common.")
            continue
        delta, interval = paired
        outcome = "undecided" if interval is None else "supported" if interval[0] > 0 else "refuted" if interval[1] < 0 else "undecided"
        verdict = outcome if name == "parent" or facts.parent_score is None else verdict
        span = f", 95 % interval {interval[0]:+.1f} to {interval[1]:+.1f}" if interval else ", one seed: no interval"
        lines.append(f"Against the {name}: {delta:+.1f} points{span}.")
    head = f"**{verdict.capitalize()}.** Overall {score.overall:.1f}, last point {score.final:.1f}."
    if score.curve:
        head += " Points: " + ", ".join(f"{float(at):.0%} {value:.1f}" for at, value in sorted(score.curve.items(), key=lambda p: float(p[0]))) + "."
    return verdict, [head, *lines]


def _slugs(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
