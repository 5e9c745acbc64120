"""From a finished candidate's files to its reflection and its write-once archive entry."""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from . import files, stats
from .agent.base import Facts, Proposer
from .archive import ArchiveView, Entry
from .campaign import Attempt, Campaign, Candidate, dump_yaml, load_attempts
from .evaluation import metrics
from .types import BASELINE_ID, EntrySummary, Outcome, Score, Stage


def reflect(campaign: Campaign, candidate: Candidate, proposer: Proposer, archive: ArchiveView) -> bool:
    """Write reflection.json; True once it is there."""
    path = candidate.folder / "reflection.json"
    if not path.exists():
        files.write_json(path, proposer.reflect(facts(campaign, candidate, archive)).to_json())
    return True


def facts(campaign: Campaign, candidate: Candidate, archive: ArchiveView) -> Facts:
    proposal, rows = candidate.proposal(), curves(candidate)
    parent = archive.get(proposal.parents[0]) if proposal.parents else None
    base = archive.get(BASELINE_ID) if candidate.id != BASELINE_ID else None
    return Facts(
        id=candidate.id, proposal=proposal, outcome=candidate.outcome or Outcome.CANDIDATE_ERROR, cause=candidate.cause,
        message=candidate.message, score=score(campaign, candidate), parent_score=parent.score if parent else None,
        baseline_score=base.score if base else None, curves=rows,
        baseline_curves=curves(campaign.load(BASELINE_ID)) if base else {}, behaviour=behaviour(rows))


def curves(candidate: Candidate) -> dict[str, list[dict[str, Any]]]:
    """Training rows by seed, of each seed's last attempt that has any (it repeats what its predecessors computed)."""
    out = {}
    for attempt in candidate.attempts:
        if attempt.stage == Stage.TRAIN and (rows := list(files.read_lines(attempt.folder / "curves.jsonl"))):
            out[str(attempt.seed)] = rows
    return out


def behaviour(rows_by_seed: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Training-curve features, averaged over seeds."""
    per_seed = [metrics.behaviour(rows) for rows in rows_by_seed.values()]
    return {key: sum(f[key] for f in per_seed) / len(per_seed) for key in sorted(set.intersection(*map(set, per_seed)))} if per_seed else {}


def evaluations(campaign: Campaign, candidate: Candidate) -> dict[str, dict[str, Any]]:
    """Merged evaluation by seed; {} unless every seed has one."""
    benchmarks = campaign.config.evaluate.benchmarks
    out = {}
    for seed in campaign.config.search.train_seeds:
        attempt = _last(candidate, Stage.EVALUATE, seed)
        if attempt is None:
            return {}
        out[str(seed)] = metrics.merge(elements(attempt), benchmarks)
    return out


def elements(attempt: Attempt) -> list[dict[str, Any]]:
    assert attempt.result is not None
    return [files.read_json(attempt.folder / name) for name in attempt.result["payload"]["elements"]]


def score(campaign: Campaign, candidate: Candidate) -> Score | None:
    if candidate.outcome is not Outcome.SUCCEEDED:
        return None
    base = evaluations(campaign, campaign.load(BASELINE_ID)) if candidate.id != BASELINE_ID else None
    return stats.score(evaluations(campaign, candidate), base or None, campaign.config.evaluate.score)


def _last(candidate: Candidate, stage: Stage, seed: int | None) -> Attempt | None:
    done = [a for a in candidate.of(stage, seed) if a.outcome is Outcome.SUCCEEDED]
    return done[-1] if done else None


def record(campaign: Campaign, candidate: Candidate, archive: ArchiveView) -> EntrySummary:
    """Write the entry. Large files that the entry does not need go first, so that a kill in between leaves none behind."""
    new = entry(campaign, candidate)
    clean(candidate)
    return archive.add(new)


def entry(campaign: Campaign, candidate: Candidate) -> Entry:
    raise NotImplementedError


def clean(candidate: Candidate) -> None:
    """Checkpoints and all weights but the final ones: inodes and quota are short on clusters."""
    for attempt in candidate.attempts:
        shutil.rmtree(attempt.folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(attempt.folder / "submitit", ignore_errors=True)
        done = attempt.result["payload"].get("snapshots", {}) if attempt.result else {}
        keep = {done[max(done, key=float)]} if done else set()
        for snapshot in sorted((attempt.folder / "snapshots").glob("*")):
            if str(Path("snapshots") / snapshot.name) not in keep:
                shutil.rmtree(snapshot, ignore_errors=True)


def headline(summary: EntrySummary) -> str:
    """One line for the event log."""
    if summary.score is None:
        return f"{summary.name}  failed: {summary.cause}"
    s = summary.score
    half = f" +- {(s.ci[1] - s.ci[0]) / 2:.1f}" if s.ci else ""
    against = f"  {s.delta:+.1f} against {BASELINE_ID}" if s.delta is not None else ""
    return f"{summary.name}  overall {s.overall:.1f}{half} ({len(s.by_seed)} seeds){against}  {summary.verdict}"


__all__ = ["reflect", "record", "facts", "headline", "load_attempts", "dump_yaml"]
