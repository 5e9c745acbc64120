"""What a campaign's own training runs took, part by part: from their attempt folders, the latest ones."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import files
from ..campaign import Attempt, Campaign
from ..types import Outcome, Stage

LATEST = 16  # candidates; older ones say little about the machine of today


@dataclass(frozen=True)
class Run:
    """One whole training run: a first attempt that nothing interrupted."""

    candidate: str
    unit: str
    ranks: int
    seconds: dict[str, float]  # part (`cost.PARTS`) -> seconds; those that are known
    length: float              # tokens of a completion, mean over the steps
    trained: float             # share of the completions that the update computed


def runs(campaign: Campaign) -> list[Run]:
    """Oldest first."""
    found = []
    for id in campaign.ids()[-LATEST:]:
        attempts = [a for a in campaign.load(id).attempts if a.outcome is Outcome.SUCCEEDED and a.number == 1 and a.result["restart"] == 0]
        checks = [a.result["run_seconds"] for a in attempts if a.stage == Stage.CHECK]
        evaluated: dict[int | None, float] = {}
        for a in attempts:
            if a.stage == Stage.EVALUATE:
                evaluated[a.seed] = evaluated.get(a.seed, 0.0) + a.result["run_seconds"]
        found += [run for a in attempts if a.stage == Stage.TRAIN and a.reaches == 1  # not to a rung
                  if (run := whole(id, a, campaign.config.rollout.group_size, checks, evaluated.get(a.seed))) is not None]
    return found


def whole(id: str, attempt: Attempt, group: int, checks: list[float], evaluated: float | None) -> Run | None:
    """None if the attempt went on from an earlier one: its times are not a run's."""
    assert attempt.result is not None
    payload: dict[str, Any] = attempt.result["payload"]
    curves = list(files.read_lines(attempt.folder / "curves.jsonl"))
    timings = list(files.read_lines(attempt.folder / "timings.jsonl"))
    if not curves or len(timings) != payload["steps"]:
        return None
    wall = payload["timings"]["wall"]
    sampled = payload["timings"].get("rollout", 0.0) + payload["timings"].get("grade", 0.0)
    inside = elements(attempt.folder)
    seconds = {"start": max(attempt.result["run_seconds"] - wall - inside, 0.1), "rollout": sampled, "update": wall - sampled}
    if (evaluate := inside or evaluated) is not None:
        seconds["evaluate"] = evaluate
    if checks:
        seconds["check"] = fmean(checks)
    share = [row["trained_rows"] / (row["groups_sampled"] * group) for row in curves]
    return Run(id, attempt.unit, attempt.result["ranks"], seconds, fmean(row["length"] for row in curves), fmean(share))


def elements(attempt: Path) -> float:
    """Seconds of the evaluation that the training job did itself."""
    return sum((files.read_json(path) or {}).get("seconds", 0.0) for path in (attempt / "elements").glob("*.json"))
