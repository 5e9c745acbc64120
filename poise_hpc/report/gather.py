"""Everything a report shows, read once, through the readers that the other commands use.

The index has a row of every entry; records are read for few of them, since one costs milliseconds and its text fills pages. A file
that cannot be read is named among the problems, and the report goes on without it.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from .. import derived, files, guidance, stats, views
from ..archive import ArchiveView, read
from ..campaign import Campaign
from ..entry import Entry
from ..evaluation import metrics
from ..types import BASELINE_ID, EntrySummary, Outcome, PoiseError, Stage

LINE = 40      # of the winner's ancestors, the nearest ones
EXAMPLES = 12  # causes of failure of which one record is read for its message


@dataclass(frozen=True)
class Derived:
    """What `derived.report` says of one campaign that was made from an entry, and how far it is."""

    name: str
    kind: str                       # confirm, ablate, control, transfer, rerun
    candidate: str                  # of this campaign
    report: dict[str, Any]
    seeds: tuple[int, ...]
    purpose: str                    # which of the task's prompts
    expected: int                   # entries when it is finished
    entries: list[EntrySummary]


@dataclass(frozen=True, eq=False)
class Findings:
    campaign: Campaign
    entries: dict[str, EntrySummary]         # by candidate number
    rows: list[dict[str, Any]]               # of views.leaderboard
    status: dict[str, Any] | None            # of views.status; None: it could not be read
    records: dict[str, Entry]                # those read, without completions
    detailed: tuple[str, ...]                # candidates with a section of their own, in the leaderboard's order
    line: tuple[str, ...]                    # the winner and its ancestors, nearest first
    derived: list[Derived]
    said: list[dict[str, Any]]               # lines of guidance.jsonl
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> EntrySummary | None:
        return self.entries.get(BASELINE_ID)

    @property
    def label(self) -> str:
        """What figures call the baseline."""
        return self.baseline.name if self.baseline else "the baseline"

    @cached_property
    def scored(self) -> list[EntrySummary]:
        """Candidates with a score, best first; not the baseline."""
        return [self.entries[r["id"]] for r in self.rows if r["overall"] is not None and r["id"] != BASELINE_ID]

    @cached_property
    def unscored(self) -> list[EntrySummary]:
        """Failed or screened out."""
        return [e for e in self.entries.values() if e.score is None]

    @cached_property
    def failed(self) -> list[EntrySummary]:
        return [e for e in self.unscored if e.screened is None]

    @property
    def winner(self) -> EntrySummary | None:
        """The best candidate, whether or not it is better than the baseline."""
        return self.scored[0] if self.scored else None

    @property
    def active(self) -> list[dict[str, Any]]:
        """Rows of candidates that are not archived yet."""
        return [c for c in self.status["candidates"] if c["stage"] != Stage.ARCHIVED] if self.status else []

    @cached_property
    def noise(self) -> float | None:
        """Standard error of a candidate's mean over its seeds, as differences see it; None with one seed or one entry."""
        scores = [e.score for e in self.entries.values() if e.score]
        sd = stats.paired_sd(scores)
        return None if sd is None else sd / sqrt(max(len(s.by_seed) for s in scores))

    def differences(self, entry: EntrySummary) -> dict[str, float]:
        """Training seed -> points over the baseline."""
        if not (entry.score and self.baseline and self.baseline.score):
            return {}
        against = self.baseline.score.by_seed
        return {seed: value - against[seed] for seed, value in entry.score.by_seed.items() if seed in against}

    def of(self, kind: str, candidate: str | None = None) -> list[Derived]:
        return [d for d in self.derived if d.kind == kind and candidate in (None, d.candidate)]


def gather(campaign: Campaign, candidates: int) -> Findings:
    """`candidates`: how many of the best get a section of their own."""
    archive = ArchiveView.load(campaign.root)
    problems = dict(archive.problems)
    entries = {e.id: e for e in archive.entries}
    rows = views.leaderboard(campaign, archive)["rows"]
    try:
        status = views.status(campaign, archive=archive)
    except PoiseError as error:
        status, problems["status"] = None, str(error)
    made = _derived(campaign, problems)
    best = next((r["id"] for r in rows if r["overall"] is not None and r["id"] != BASELINE_ID), None)
    line = ancestors(entries, best)
    wanted = {*[r["id"] for r in rows[:candidates]], *line[:LINE], *[d.candidate for d in made], BASELINE_ID} & entries.keys()
    detailed = [r["id"] for r in rows if r["id"] in wanted]
    records = _records(campaign, [*detailed, *_compared_with(entries, detailed), *_examples(entries)], problems)
    return Findings(campaign, entries, rows, status, records, tuple(id for id in detailed if id in records), tuple(line), made,
                    list(files.read_lines(campaign.root / guidance.FILE)), problems)


def ancestors(entries: dict[str, EntrySummary], id: str | None) -> list[str]:
    """The entry and those it descends from, nearest first."""
    found = dict.fromkeys([id] if id in entries else [])
    waiting = list(found)
    while waiting:
        new = [p for p in entries[waiting.pop(0)].parents if p in entries and p not in found]
        found |= dict.fromkeys(new)
        waiting += new
    return [name for name in found if name is not None]


def benchmarks(entry: Entry, campaign: Campaign) -> dict[str, dict[str, float]]:
    """"hard/pass@32" -> training seed -> points, at the last evaluation point."""
    return metrics.last_point(entry.evaluations, campaign.config.evaluate.benchmarks)


def _compared_with(entries: dict[str, EntrySummary], ids: Iterable[str]) -> list[str]:
    """First parents: a detail shows the change of code against one."""
    return [entries[id].parents[0] for id in ids if entries[id].parents and entries[id].parents[0] in entries]


def _examples(entries: dict[str, EntrySummary]) -> list[str]:
    """The newest entry of each cause of failure."""
    newest = {e.cause: e.id for e in entries.values() if e.outcome is Outcome.CANDIDATE_ERROR}
    return list(newest.values())[:EXAMPLES]


def _records(campaign: Campaign, ids: Iterable[str], problems: dict[str, str]) -> dict[str, Entry]:
    out: dict[str, Entry] = {}
    nothing = np.zeros(0, "<u2")
    for id in dict.fromkeys(ids):
        try:
            out[id] = replace(read(campaign.records / f"{id}.h5"), completion_tokens=nothing)
        except PoiseError as error:
            problems.setdefault(id, str(error))
    return out


def _derived(campaign: Campaign, problems: dict[str, str]) -> list[Derived]:
    out = []
    for folder in derived.existing(campaign):
        try:
            out.append(_one(folder))
        except PoiseError as error:
            problems[f"derived/{folder.name}"] = str(error)
    return out


def _one(folder: Path) -> Derived:
    made = Campaign.open(folder)
    kind, id = made.meta["origin"]["kind"], made.meta["origin"]["id"]
    view = ArchiveView.load(folder)
    waiting = len([p for p in (folder / "inbox").iterdir() if p.is_dir()])
    return Derived(folder.name, kind, id, derived.report(kind, made), made.config.search.train_seeds, made.config.evaluate.purpose,
                   max(len(made.ids()), 1) + waiting, view.entries)
