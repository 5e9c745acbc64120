"""What prompts show of the archive: entries, scores, curves, the recipe, as short Markdown. Pure; equal facts, equal text.

Figures are means over the training seeds, to four significant digits, so that a model can cite what it was shown and
`find_figure` can check the citation.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import Config
from ..types import EntrySummary, Outcome, Proposal, Reflection, Score, Screening
from .base import Context, Facts

CURVES = ("reward", "acc", "valid", "truncated", "length", "entropy", "kl_old", "kl_ref", "clip_fraction",
          "gradient_norm", "zero_variance", "advantage_std", "ess")  # of a training step's row
POINTS = 9                 # steps shown of a curve
REFLECTION_CHARS = 1200    # of an earlier reflection, at most
HISTORY = 60               # entries in the table of what was tried, newest


def recipe(config: Config) -> str:
    """The declared budget: what every candidate gets, and cannot change."""
    r, t, s = config.rollout, config.train, config.search
    scores = ", ".join(f"{name}/{metric} {weight:g}" for name, b in config.evaluate.benchmarks.items()
                       for metric, weight in b.metrics.items())
    return "\n".join([
        f"- task `{config.task.name}`; {t.steps} training steps, each {r.prompts} prompts x {r.group_size} completions, "
        f"sampled at temperature {r.temperature:g}",
        f"- {t.epochs} passes over each step's completions, {t.minibatches} optimizer steps a pass, learning rate "
        f"{t.learning_rate:g}, gradient norm clipped at {t.gradient_clip:g}",
        f"- at most {r.max_rounds} sampling rounds a step (1: groups that `select` drops are not replaced)",
        f"- {len(s.train_seeds)} training seeds, the same for every candidate; Overall weighs {scores}, at the training "
        f"fractions {', '.join(f'{a:g}' for a in config.evaluate.at)} "
        f"({'their mean' if config.evaluate.score == 'curve' else 'the last counts'})",
        *(f"- at {r.at:g} of the training a candidate goes no further if its Overall, over {r.seeds} seed(s), is "
          + (f"below the untrained policy's - {r.margin:g}" if r.rule == "below_start" else f"clearly more than {r.margin:g} points below GRPO's")
          for r in config.screen.rungs),
        f"- {config.jobs.train_min:g} minutes of training per seed; no extra forward passes, no critic, no change to sampling"])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def interval(value: float | None, ci: Sequence[float] | None) -> str:
    return number(value) + (f" [{number(ci[0])}, {number(ci[1])}]" if ci else "")


def score_text(score: Score | None) -> str:
    if score is None:
        return "no score"
    parts = [f"Overall {interval(score.overall, score.ci)}"]
    if score.delta is not None:
        parts.append(f"against GRPO {interval(score.delta, score.delta_ci)}")
    parts.append("at training fractions " + ", ".join(f"{at}: {number(v)}" for at, v in sorted(score.curve.items())))
    parts.append("benchmarks " + ", ".join(f"{name}: {number(v)}" for name, v in sorted(score.benchmarks.items())))
    return "; ".join(parts)


def screening_text(s: Screening) -> str:
    """Of a candidate without a score: what is known instead."""
    return (f"screened out at training fraction {s.at}, on {len(s.by_seed)} of the seeds: Overall {number(s.overall)} there, "
            f"{interval(s.delta, s.delta_ci)} against GRPO at the same point, untrained policy {number(s.start)}; not trained further")


def entry_text(entry: EntrySummary, proposal: Proposal | None, reflection: Reflection | None) -> str:
    lines = [f"{entry.id} {entry.name} (parents: {', '.join(entry.parents) or 'none'}; mechanisms: "
             f"{', '.join(entry.mechanisms) or 'none'})",
             f"- outcome: {entry.outcome}" + (f", {entry.cause}" if entry.cause else "") + f"; {screening_text(entry.screened) if entry.screened else score_text(entry.score)}"]
    if entry.behaviour:
        lines.append("- training: " + ", ".join(f"{k} {number(v)}" for k, v in sorted(entry.behaviour.items())))
    if proposal:
        lines.append(f"- hypothesis: {proposal.hypothesis}")
        lines.append(f"- change: {proposal.description}")
    if reflection:
        lines.append(f"- reflection ({reflection.verdict}; {', '.join(reflection.symptoms) or 'no symptoms'}): "
                     f"{_clip(reflection.text)}")
    return "\n".join(lines)


def references_text(context: Context) -> str:
    """The tiered reference set: why each is shown, then the entry."""
    by_id = {e.id: e for e in context.entries}
    blocks = [f"**{r.tier}** ({r.why})\n{entry_text(by_id[r.id], context.proposals.get(r.id), context.reflections.get(r.id))}"
              for r in context.references if r.id in by_id]
    return "\n\n".join(blocks) or "None yet."


def history_text(entries: Sequence[EntrySummary], pending: Sequence[tuple[str, Proposal]] = ()) -> str:
    """One line per candidate, newest last: what was tried, what came of it."""
    lines = [f"- {e.id} {e.name}: {', '.join(e.mechanisms)}; " + (
        f"{interval(e.score.delta, e.score.delta_ci)} against GRPO" if e.score and e.score.delta is not None else
        f"Overall {number(e.score.overall)}" if e.score else
        f"{interval(e.screened.delta, e.screened.delta_ci)} against GRPO at fraction {e.screened.at}, screened out" if e.screened else
        f"failed: {e.cause}") + f"; {e.verdict}"
        for e in entries[-HISTORY:]]
    return "\n".join(lines + [f"- {id} {p.name}: {', '.join(p.mechanisms)}; still running" for id, p in pending]) or "Nothing yet."


def mean_rows(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """Rows per step, mean over the seeds that reached it; numbers only. Rows are joined by their "step"."""
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for rows in curves.values():
        for row in rows:
            steps.setdefault(int(row["step"]), []).append(row)
    out = []
    for step, rows in sorted(steps.items()):
        mean: dict[str, float] = {"step": step}
        for key in CURVES:
            values = [float(r[key]) for r in rows if isinstance(r.get(key), (int, float))]
            if values:
                mean[key] = sum(values) / len(values)
        out.append(mean)
    return out


def curves_text(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A table of `POINTS` steps, first and last among them."""
    rows = mean_rows(curves)
    if not rows:
        return "No training step was finished."
    chosen = [rows[i] for i in sorted({round(n * (len(rows) - 1) / (POINTS - 1)) for n in range(POINTS)})]
    keys = [k for k in CURVES if any(k in row for row in chosen)]
    table = [["step", *keys], ["---"] * (len(keys) + 1)]
    table += [[str(row["step"]), *(number(row.get(k)) for k in keys)] for row in chosen]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def find_figure(facts: Facts, quantity: str, step: int | None) -> float | None:
    """The figure that a citation names: a curve at a step, a benchmark, "overall" or "delta"; None if there is none."""
    if step is not None:
        return next((row.get(quantity) for row in mean_rows(facts.curves) if row["step"] == step), None)
    if facts.outcome is Outcome.SCREENED_OUT:
        return {"overall": facts.screenings[-1].overall, "delta": facts.screenings[-1].delta}.get(quantity, facts.behaviour.get(quantity))
    if facts.score is None:
        return None
    named = {"overall": facts.score.overall, "delta": facts.score.delta, "final": facts.score.final}
    return named.get(quantity, facts.score.benchmarks.get(quantity, facts.behaviour.get(quantity)))


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= REFLECTION_CHARS else text[:REFLECTION_CHARS].rsplit(" ", 1)[0] + " ..."
