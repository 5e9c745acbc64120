"""A candidate that computes what a visible one computed ends before its training: the numbers are known.

By the digest of its check job (`algorithms.digest`), against what it was allowed to see (pick.json), so that it depends on no order
of jobs. Never refused: the baseline, persons' packages, and so whatever a derived campaign is made of; a person is told, of the
same files at once. An entry that never
trained (a duplicate itself, a rejected draft) tells nothing and does not count.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import files
from .algorithms import load
from .campaign import Campaign, Candidate
from .types import BASELINE_ID, EntrySummary, Outcome, candidate_number

CAUSE = "duplicate"


def judged(candidate: Candidate, check: dict[str, Any], entries: Sequence[EntrySummary]) -> dict[str, Any]:
    """The check's result, as the search sees it: a candidate's error where it passed and repeats one of `entries`."""
    e = repeated(candidate, check, entries)
    if e is None or candidate.proposal().proposer == "person":
        return check
    how = f"which has {e.score.overall:.1f} points" if e.score else f"which was screened out: {e.cause}" if e.screened else f"which failed: {e.cause}"
    return check | {"outcome": Outcome.CANDIDATE_ERROR, "cause": CAUSE, "message": (
        f"it computes the same as {e.id} ({e.name}), {how}: equal gradients on every probe. Either the code leaves out what its "
        f"proposal adds, or the proposal repeats {e.id} in other words")}


def repeated(candidate: Candidate, check: dict[str, Any], entries: Sequence[EntrySummary]) -> EntrySummary | None:
    """The entry whose computations it repeats, of those that it has seen."""
    found = check["payload"].get("digest")
    if not found or check["outcome"] != Outcome.SUCCEEDED or candidate.id == BASELINE_ID:
        return None
    hidden, number = set(pending(candidate)), candidate_number(candidate.id)
    return next((e for e in entries if e.digest == found and (e.score or e.behaviour) and candidate_number(e.id) < number and e.id not in hidden), None)


def same_code(campaign: Campaign, package: Path) -> str | None:
    """The first candidate that has exactly these files."""
    mine = load.manifest(package)
    return next((id for id in campaign.ids() if files.read_json(campaign.candidates / id / "manifest.json") == mine), None)


def pending(candidate: Candidate) -> list[str]:
    """Older candidates that it has not seen."""
    return (files.read_json(candidate.folder / "pick.json") or {}).get("pending", [])
