"""How long a job and a campaign still take: estimates for people, nothing is decided by them. Seconds of run time.

Not covered: waiting in a scheduler's queue, candidates that fail early, what a language model takes to think.
"""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import files, site
from .campaign import Campaign, Candidate
from .types import BASELINE_ID, EntrySummary, Outcome, Stage


def job_left(progress: dict[str, Any]) -> float | None:
    """Of a job's present stage, by its pace since it began there: start-up is no step. None: no step is behind it."""
    since, step = progress.get("since"), progress.get("step", 0)
    if not since or step <= since["step"]:
        return None
    return since["seconds"] / (step - since["step"]) * (progress["total"] - step)


def campaign_left(campaign: Campaign, archived: Sequence[EntrySummary], active: Sequence[Candidate], running: Sequence[dict[str, Any]],
                  fresh: int) -> float | None:
    """Until all is archived. `running`: rows of views.running; `fresh`: candidates that are not begun. None: nothing to go by yet."""
    ranks, seeds = campaign.config.jobs.ranks, len(campaign.config.search.train_seeds)
    costs = [e.run_seconds / ranks for e in archived if e.outcome is Outcome.SUCCEEDED]
    baseline = next((c for c in active if c.id == BASELINE_ID), None)
    cost = statistics.median(costs) if costs else first_cost(baseline, running, seeds) if baseline else None
    if cost is None:
        return None
    begun = []
    for candidate in active:
        rows = [r for r in running if r["candidate"] == candidate.id]
        spent = sum(r["elapsed_s"] for r in rows) + sum(a.result.get("run_seconds", 0.0) for a in candidate.attempts if a.result)
        over = candidate.stage in (Stage.REVIEW, Stage.REFLECT, Stage.HELD)  # none of its jobs is to come
        begun.append((cost if over else spent, sum(r["eta_s"] or 0.0 for r in rows)))
    return left(cost, begun, fresh, slots(campaign, len(running)), [r["eta_s"] or 0.0 for r in running])


def left(cost: float, begun: Sequence[tuple[float, float]], fresh: int, slots: int, jobs: Sequence[float] = ()) -> float:
    """`cost`: of a whole candidate; `begun`: (spent, still known to come) of those under way; `jobs`: what each running job still takes."""
    work = fresh * cost + sum(max(cost - spent, rest) for spent, rest in begun)
    return max([work / slots, *jobs])


def first_cost(baseline: Candidate, running: Sequence[dict[str, Any]], seeds: int) -> float | None:
    """Of a whole candidate, while the first one trains: its check, and its training runs at their present pace."""
    done = [(a.stage, a.result.get("run_seconds", 0.0)) for a in baseline.attempts if a.outcome is Outcome.SUCCEEDED and a.result]
    runs = [seconds for stage, seconds in done if stage == Stage.TRAIN]
    runs += [r["elapsed_s"] + (r["eta_s"] or 0.0) for r in running if r["candidate"] == baseline.id and r["attempt"].startswith("train")
             and (r["eta_s"] is not None or r["stage"] == "evaluate")]  # by the training job itself, at its end
    return sum(s for stage, s in done if stage == Stage.CHECK) + seeds * statistics.mean(runs) if runs else None


def slots(campaign: Campaign, running: int) -> int:
    """Jobs side by side: this host's limit; on a cluster, what it lets run now."""
    path: Path = campaign.root / "site.yaml"
    local = not path.exists() or site.load(path).scheduler == "local"
    return campaign.config.jobs.max_parallel if local else max(running, 1)


def read_progress(attempt: Path) -> dict[str, Any]:
    """{} while there is none, or none that is whole: a job writes it anew within seconds."""
    try:
        found = files.read_json(attempt / "progress.json")
    except files.CorruptFile:
        return {}
    return found if isinstance(found, dict) else {}
