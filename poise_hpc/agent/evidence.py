"""What prompts show of the archive: entries, scores, curves, the recipe, as short Markdown. Pure; equal facts, equal text.

Figures are means over the training seeds, to four significant digits, so that a model can cite what it was shown and
`find_figure` can check the citation. What the columns mean is told by prompts/figures.md.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..config import Config
from ..tasks.base import summary
from ..types import BASELINE_ID, EntrySummary, Outcome, Proposal, Reflection, Score, Screening
from .base import Context, Facts
from .prompts import render

CURVES = ("reward", "acc", "valid", "truncated", "length", "entropy", "kl_old", "kl_ref", "clip_fraction",
          "gradient_norm", "zero_variance", "advantage_std", "ess")  # of a training step's row
POINTS = 9                 # rows shown of a curve
REASON_CHARS = 200         # of why a candidate failed, in its line


@dataclass(frozen=True)
class Detail:
    """How much of the archive a prompt shows, at most."""

    entries: int     # of what was tried, the newest
    chars: int       # of an entry's change, and of its reflection
    children: int    # of the parent, the newest
    references: int
    cards: int


FULL = Detail(entries=60, chars=1200, children=20, references=1000, cards=8)  # references: as many as search.references wants
SHORTER = (Detail(30, 500, 10, 4, 4), Detail(10, 250, 5, 2, 2))  # where the model's context does not hold that, in turn


def recipe(config: Config) -> str:
    """The declared budget: what every candidate gets, and cannot change."""
    r, t, s = config.rollout, config.train, config.search
    scores = ", ".join(f"{name}/{metric} {weight:g}" for name, b in config.evaluate.benchmarks.items()
                       for metric, weight in b.metrics.items())
    return "\n".join([
        f"- task `{config.task.name}`" + (f": {told}" if (told := summary(config)) else "") +
        (f"; start model {Path(config.model.path).name}" if config.model.path else ""),
        f"- {t.steps} training steps, each {r.prompts} prompts x {r.group_size} completions, "
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
    parts.append("at training fractions " + ", ".join(f"{float(at):g}: {number(v)}" for at, v in sorted(score.curve.items())))
    parts.append("benchmarks " + ", ".join(f"{name}: {number(v)}" for name, v in sorted(score.benchmarks.items())))
    return "; ".join(parts)


def screening_text(s: Screening) -> str:
    """Of a candidate without a score: what is known instead."""
    return (f"screened out at training fraction {s.at}, on {len(s.by_seed)} of the seeds: Overall {number(s.overall)} there, "
            f"{interval(s.delta, s.delta_ci)} against GRPO at the same point, untrained policy {number(s.start)}; not trained further")


def entry_text(entry: EntrySummary, proposal: Proposal | None, reflection: Reflection | None, chars: int = FULL.chars) -> str:
    lines = [f"{entry.id} {entry.name} (parents: {', '.join(entry.parents) or 'none'}; mechanisms: "
             f"{', '.join(entry.mechanisms) or 'none'})",
             f"- outcome: {entry.outcome}" + (f", {entry.cause}" if entry.cause else "") + f"; {screening_text(entry.screened) if entry.screened else score_text(entry.score)}"]
    if entry.behaviour:
        lines.append("- training: " + ", ".join(f"{k} {number(v)}" for k, v in sorted(entry.behaviour.items())))
    if proposal:
        lines.append(f"- hypothesis: {proposal.hypothesis}")
        lines.append(f"- change: {_clip(proposal.description, chars)}")
    if reflection:
        hypothesis = f"hypothesis {reflection.hypothesis}; " if reflection.hypothesis else ""
        lines.append(f"- reflection (scores {reflection.verdict}; {hypothesis}{', '.join(reflection.symptoms) or 'no symptoms'}): "
                     f"{_clip(reflection.text, chars)}")
    return "\n".join(lines)


def references_text(context: Context, detail: Detail = FULL) -> str:
    """The tiered reference set: why each is shown, then the entry."""
    by_id = {e.id: e for e in context.entries}
    blocks = [f"**{r.tier}** ({r.why})\n{entry_text(by_id[r.id], context.proposals.get(r.id), context.reflections.get(r.id), detail.chars)}"
              for r in context.references[:detail.references] if r.id in by_id]
    return "\n\n".join(blocks) or "None yet."


def history_text(context: Context, detail: Detail = FULL) -> str:
    """One line per candidate, newest last: what was tried, what came of it."""
    lines = [line(e, context.reflections.get(e.id)) for e in context.entries[-detail.entries:]]
    return "\n".join(lines + [pending_line(id, p) for id, p in context.pending])


def lineage_text(context: Context) -> str:
    """The line from the first ancestor to the parent."""
    by_id, chain, id = {e.id: e for e in context.entries}, [], context.parent.id
    while id in by_id and by_id[id] not in chain:
        chain.append(by_id[id])
        id = next(iter(by_id[id].parents), "")
    return "\n".join(line(e, context.reflections.get(e.id)) for e in reversed(chain))


def children_text(context: Context, detail: Detail = FULL) -> str:
    """What was made of this parent so far, the newest."""
    children = [e for e in context.entries if context.parent.id in e.parents][-detail.children:]
    lines = [line(e, context.reflections.get(e.id)) for e in children]
    return "\n".join(lines + [pending_line(id, p) for id, p in context.pending if context.parent.id in p.parents]) or "None yet."


def line(e: EntrySummary, reflection: Reflection | None) -> str:
    s = e.score
    result = (f"{interval(e.screened.delta, e.screened.delta_ci)} against GRPO at fraction {e.screened.at}, screened out" if e.screened else
              f"failed: {e.cause}{_reason(reflection)}" if s is None else
              f"Overall {interval(s.overall, s.ci)}" + (f", {interval(s.delta, s.delta_ci)} against GRPO" if s.delta is not None else ""))
    hypothesis = f", hypothesis {reflection.hypothesis}" if reflection and reflection.hypothesis else ""
    return f"- {_head(e.id, e.name, e.parents, e.mechanisms)}; {result}; {e.verdict}{hypothesis}"


def pending_line(id: str, p: Proposal) -> str:
    return f"- {_head(id, p.name, p.parents, p.mechanisms)}; still running"


def _head(id: str, name: str, parents: Sequence[str], mechanisms: Sequence[str]) -> str:
    return f"{id} {name}" + (f" (from {', '.join(parents)})" if parents else "") + f": {', '.join(mechanisms) or 'no mechanism named'}"


def _reason(reflection: Reflection | None) -> str:
    """Of a failure: the message that the rules quote, else the first line of the diagnosis."""
    lines = reflection.text.strip().splitlines() if reflection else []
    said = next((text.removeprefix("Message: ") for text in lines if text.startswith("Message: ")), lines[0] if lines else "")
    return f", {_clip(said, REASON_CHARS)}" if said else ""


def noise_text(entries: Sequence[EntrySummary]) -> str:
    """How far one seed's Overall strays, in this archive, and a difference over the seeds that entries share."""
    from ..stats import paired_sd, pooled_sd

    scores = [e.score for e in entries if e.score]
    sd, paired = pooled_sd(scores), paired_sd(scores)
    if not sd:
        return "Nobody knows yet how far one seed strays."
    text = f"One training seed's Overall strays by {number(sd)} points (standard deviation, all entries)"
    seeds = max(len(s.by_seed) for s in scores)
    return text + (f"; the difference of two entries over the same {seeds} seeds by {number(paired * (2 / seeds) ** 0.5)}." if paired else ".")


def legend() -> str:
    """What the figures mean."""
    return render("figures").strip()


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


def last_step(*several: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """Of all these curves: tables that are made with it have the same steps."""
    return max((int(row["step"]) for curves in several for rows in curves.values() for row in rows), default=0)


def condensed(curves: Mapping[str, Sequence[Mapping[str, Any]]], last: int) -> list[dict[str, float]]:
    """`POINTS` rows, each the mean of the steps since the row above it: single steps are noise, and none is left out. A run that
    ended before step `last` has fewer."""
    rows, out, since = mean_rows(curves), [], -1
    for end in sorted({round(n * last / (POINTS - 1)) for n in range(POINTS)}):
        window = [row for row in rows if since < row["step"] <= end]
        if window:
            means = {key: fmean(row[key] for row in window if key in row) for key in CURVES if any(key in row for row in window)}
            out.append({"step": window[-1]["step"]} | means)
        since = end
    return out


def curves_text(curves: Mapping[str, Sequence[Mapping[str, Any]]], last: int) -> str:
    chosen = condensed(curves, last)
    if not chosen:
        return "No training step was finished."
    keys = [k for k in CURVES if any(k in row for row in chosen)]
    table = [["step", *keys], ["---"] * (len(keys) + 1)]
    table += [[str(row["step"]), *(number(row.get(k)) for k in keys)] for row in chosen]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def find_figure(facts: Facts, of: str, quantity: str, step: int | None) -> float | None:
    """The figure that a citation names, of the candidate, of "grpo" or of its "parent": a curve's column at a step or, without one, a
    score; None if there is none. Scores: overall, final, delta, their interval's ends as overall.low, a training fraction as
    overall@0.5, a benchmark; of the candidate also what `behaviour` holds, and parent_delta, its paired difference to the parent."""
    if step is not None:
        rows = condensed(curves_of(facts)[of], last_step(*curves_of(facts).values()))
        return next((row.get(quantity) for row in rows if row["step"] == step), None)
    if of == "candidate" and facts.outcome is Outcome.SCREENED_OUT:
        return {"overall": facts.screenings[-1].overall, "delta": facts.screenings[-1].delta}.get(quantity, facts.behaviour.get(quantity))
    score = {"candidate": facts.score, "grpo": facts.baseline_score, "parent": facts.parent_score}[of]
    named: dict[str, float | None] = {**facts.behaviour} if of == "candidate" else {}
    if score is not None:
        paired = parent_difference(facts) if of == "candidate" else None
        named |= score.benchmarks | {f"overall@{float(at):g}": value for at, value in score.curve.items()}
        named |= _ends("overall", score.overall, score.ci) | _ends("delta", score.delta, score.delta_ci) | {"final": score.final}
        named |= _ends("parent_delta", *paired) if paired else {}
    return named.get(quantity)


def curves_of(facts: Facts) -> dict[str, Mapping[str, Sequence[Mapping[str, Any]]]]:
    """By whom a citation names. The parent of most candidates is GRPO in the beginning."""
    grpo = facts.proposal.parents[:1] == (BASELINE_ID,)
    return {"candidate": facts.curves, "grpo": facts.baseline_curves, "parent": facts.baseline_curves if grpo else facts.parent_curves}


def _ends(name: str, value: float | None, ci: Sequence[float] | None) -> dict[str, float | None]:
    return {name: value} | ({f"{name}.low": ci[0], f"{name}.high": ci[1]} if ci else {})


def parent_difference(facts: Facts) -> tuple[float, Sequence[float] | None] | None:
    """Difference to the parent over common seeds, with its interval."""
    from ..stats import paired_difference

    return paired_difference(facts.score.by_seed, facts.parent_score.by_seed) if facts.score and facts.parent_score else None


def _clip(text: str, chars: int) -> str:
    """Without the middle, if it is longer: a reflection ends with what should be tried next."""
    text = " ".join(text.split())
    if len(text) <= chars:
        return text
    return f"{text[:chars * 2 // 3].rsplit(' ', 1)[0]} ... {text[-(chars // 3):].split(' ', 1)[-1]}"
