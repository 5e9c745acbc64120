"""From a finished candidate's files to its reflection and its write-once archive entry."""
from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import entry as tables
from . import files, jobspec, screening, stats, wording
from .agent.base import Facts
from .archive import ArchiveView, find
from .campaign import Attempt, Campaign, Candidate
from .config import Config, Rung
from .entry import Entry
from .evaluation import metrics, parts
from .types import BASELINE_ID, START, EntrySummary, Outcome, Score, Screening, Stage


SPENT = re.compile(r"heartbeat\.json|progress\.json|outcome-\d+\.json|stack-\d+\.txt")  # of an attempt that has its result


@dataclass(frozen=True)
class Evaluated:
    """An evaluation element, and the files that hold it: one, or its parts."""

    element: dict[str, Any]
    files: dict[Path, dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """What a candidate's jobs left behind, read. Keys are training seeds."""

    curves: dict[str, list[dict[str, Any]]]                       # a row a step
    behaviour: dict[str, float]
    elements: dict[int, list[Evaluated]]                          # of the evaluation
    evaluations: dict[str, dict[str, Any]]                        # merged; {} unless every seed has all of its elements

    @classmethod
    def of(cls, candidate: Candidate, config: Config) -> Results:
        verify(candidate)
        rows, found = curves(candidate), {seed: elements(candidate, seed) for seed in config.search.train_seeds}
        trained = {seed: [e.element for e in each if e.element["at"] != START] for seed, each in found.items()}
        whole = len(config.evaluate.benchmarks) * len(config.evaluate.at)
        complete = all(len(each) >= whole for each in trained.values())
        merged = {str(seed): metrics.merge(each, config.evaluate.benchmarks) for seed, each in trained.items()} if complete else {}
        return cls(rows, behaviour(rows), found, merged)

    def overall(self, seed: int, at: str, config: Config) -> float:
        """Of one point, which may be there before the others are."""
        return metrics.merge([e.element for e in self.elements[seed] if e.element["at"] == at], config.evaluate.benchmarks)["final"]


class Recorder:
    """Builds reflections and entries. The results of the baseline, which all are compared with, and of the candidate at hand are kept."""

    def __init__(self, campaign: Campaign, archive: ArchiveView):
        self.campaign, self.archive = campaign, archive
        self._results: dict[tuple[str, int], Results] = {}  # id, rungs passed

    def results(self, candidate: Candidate) -> Results:
        key = candidate.id, candidate.rung
        if key not in self._results:
            kept = {k: r for k, r in self._results.items() if k == (BASELINE_ID, 0)}
            self._results = kept | {key: Results.of(candidate, self.campaign.config)}
        return self._results[key]

    def baseline(self) -> Results:
        return self._results.get((BASELINE_ID, 0)) or self.results(self.campaign.load(BASELINE_ID))

    def start(self) -> float | None:
        """Overall of the untrained policy; None in a campaign of a version that did not evaluate it."""
        config, first = self.campaign.config, self.campaign.config.search.train_seeds[0]
        known = any(e.element["at"] == START for e in self.baseline().elements[first])
        return self.baseline().overall(first, START, config) if known else None

    def screening(self, candidate: Candidate, rung: Rung) -> Screening:
        """What the rung finds; its seeds are evaluated at its point."""
        config, at = self.campaign.config, f"{rung.at:g}"
        base, own, start = self.baseline(), self.results(candidate), self.start()
        assert start is not None
        ours, theirs = ({str(s): r.overall(s, at, config) for s in config.search.train_seeds[:rung.seeds]} for r in (own, base))
        return screening.judge(rung, ours, theirs, start)

    def screenings(self, candidate: Candidate) -> tuple[Screening, ...]:
        return tuple(self.screening(candidate, rung) for rung in screening.judged(self.campaign.config, candidate))

    def facts(self, candidate: Candidate) -> Facts:
        proposal, own = candidate.proposal(), self.results(candidate)
        parent = find(self.archive.entries, proposal.parents[0]) if proposal.parents else None
        base = find(self.archive.entries, BASELINE_ID) if candidate.id != BASELINE_ID else None
        return Facts(
            id=candidate.id, proposal=proposal, outcome=candidate.outcome or Outcome.CANDIDATE_ERROR, cause=candidate.cause,
            message=candidate.message, score=self.score(candidate), parent_score=parent.score if parent else None,
            baseline_score=base.score if base else None, curves=own.curves,
            baseline_curves=self.baseline().curves if base else {},
            parent_curves=curves(self.campaign.load(parent.id)) if parent and parent.id != BASELINE_ID else {}, behaviour=own.behaviour, screenings=self.screenings(candidate),
            files=self.campaign.code(candidate.id))

    def score(self, candidate: Candidate) -> Score | None:
        if candidate.outcome is not Outcome.SUCCEEDED:
            return None
        base = self.baseline().evaluations if candidate.id != BASELINE_ID else None
        score = stats.score(self.results(candidate).evaluations, base or None, self.campaign.config.evaluate.score)
        start = self.start() if candidate.id == BASELINE_ID else None
        return score if start is None else replace(score, curve={START: start} | score.curve)

    def record(self, candidate: Candidate) -> EntrySummary:
        """Write the entry. Large files that it does not need go first, so that a kill in between leaves none behind."""
        entry = self.entry(candidate)
        clean(candidate)
        return self.archive.add(entry)

    def entry(self, candidate: Candidate) -> Entry:
        """Everything of a candidate, from its files."""
        campaign, proposal, own = self.campaign, candidate.proposal(), self.results(candidate)
        names, steps, values = tables.curve_table({int(seed): r for seed, r in own.curves.items()})
        seeds = campaign.config.search.train_seeds
        trained = [a for seed in seeds if (a := jobspec.trained(candidate, seed))]
        score = self.score(candidate)
        evaluations, tokens, offsets = tables.evaluation_tables(e for seed, found in own.elements.items() for e in completions(seed, found))
        check = candidate.of(Stage.CHECK, "")
        path = candidate.folder / "reflection.json"
        reflection = files.read_json(path)
        written = reflection.pop("written", None) or path.stat().st_mtime  # an earlier version's has none
        return Entry(
            id=candidate.id, name=proposal.name, parents=proposal.parents, proposer=proposal.proposer, proposal=proposal.to_json(),
            outcome=candidate.outcome or Outcome.CANDIDATE_ERROR, cause=candidate.cause, message=candidate.message,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(written)),
            config=(campaign.root / "config.yaml").read_text(encoding="utf-8"), code=campaign.code(candidate.id), seeds=tuple(int(seed) for seed in own.curves),
            versions=versions(campaign, trained), hashes=hashes(campaign, candidate, trained) | digest(check),
            pick=files.read_json(candidate.folder / "pick.json") or {},
            checks=(files.read_json(check[-1].folder / "checks.json") or {}).get("checks", []) if check else [],
            attempts=[attempt_row(a) for a in candidate.attempts], timings=timings(candidate), score=vars(score) if score else None,
            screenings=[s.to_json() for s in self.screenings(candidate)],
            vocabulary=jobspec.prepared(jobspec.home(campaign)).get("vocabulary", {}),  # none from a campaign of an earlier version
            behaviour=own.behaviour, reflection=reflection, curve_names=names, curve_steps=steps, curve_values=values,
            evaluations=evaluations, completion_tokens=tokens, completion_offsets=offsets)


def verify(candidate: Candidate) -> None:
    """CorruptFile if a file that a job left behind is not what it wrote: no number is made of it."""
    for attempt in candidate.attempts:
        wanted = attempt.result["payload"].get("sha256", {}) if attempt.result else {}
        for name, sha256 in wanted.items():
            whole(attempt.folder / name, sha256, attempt.folder)


def whole(path: Path, sha256: str | None, attempt: Path) -> bytes:
    """A file that a job left behind, as it wrote it (None: it left no hash)."""
    raw = path.read_bytes() if path.exists() else None
    if raw is None or (sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256):
        raise files.CorruptFile(f"{path} is missing or damaged. Delete {attempt / 'result.json'} and "
                                f"{attempt.parents[1] / 'status.json'}: that job is then repeated, and gives the same numbers")
    return raw


def curves(candidate: Candidate) -> dict[str, list[dict[str, Any]]]:
    """Training rows by seed, of each seed's last attempt that has any (it repeats what its predecessors computed)."""
    out = {}
    trained = [a for a in candidate.attempts if a.stage == Stage.TRAIN]
    for attempt in sorted(trained, key=lambda a: (a.seed, a.reaches, a.number)):  # not as they came to be
        if (rows := list(files.read_lines(attempt.folder / "curves.jsonl"))):
            out[str(attempt.seed)] = [row | {f"reward/{name}": value for name, value in row.get("components", {}).items()} for row in rows]
    return out


def behaviour(rows_by_seed: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Training-curve features, averaged over seeds."""
    per_seed = [metrics.behaviour(rows) for rows in rows_by_seed.values()]
    return {key: sum(f[key] for f in per_seed) / len(per_seed) for key in sorted(set.intersection(*map(set, per_seed)))} if per_seed else {}


def elements(candidate: Candidate, seed: int) -> list[Evaluated]:
    """Whole evaluation elements of one training seed, whichever jobs wrote them or their parts, in (point, benchmark) order."""
    paths: dict[str, Path] = {}
    for attempt in candidate.attempts:
        if attempt.seed == seed and attempt.outcome is Outcome.SUCCEEDED and attempt.result:  # of TRAIN or EVALUATE
            paths |= {Path(name).name: attempt.folder / name for name in attempt.result["payload"].get("elements", ())}
    found: dict[str, dict[Path, dict[str, Any]]] = {}
    for name in sorted(paths):
        element = Path(name).stem.partition(parts.CUT)[0]
        found.setdefault(f"{element}.json", {})[paths[name]] = files.read_json(paths[name])
    merged = {name: Evaluated(parts.merge([*pieces.values()]), pieces) for name, pieces in found.items()}
    return [merged[name] for name in sorted(merged) if merged[name].element is not None]


def hashes(campaign: Campaign, candidate: Candidate, trained: list[Attempt]) -> dict[str, str]:
    """SHA-256 of what the numbers came from and of the weights they led to."""
    home = jobspec.prepared(jobspec.home(campaign))
    weights = {f"weights-s{a.seed}": a.result["payload"]["weights_sha256"] for a in trained if a.result}
    return {"model": home["model_sha256"], "data": home["data_sha256"], **weights} | {
        f"code:{name}": digest for name, digest in files.read_json(candidate.folder / "manifest.json").items()}


def digest(checks: list[Attempt]) -> dict[str, str]:
    """Of what the algorithm computes, as its last check found it."""
    found = checks[-1].result["payload"].get("digest") if checks and checks[-1].result else None
    return {"digest": found} if found else {}


def versions(campaign: Campaign, trained: list[Attempt]) -> dict[str, str]:
    """Of the campaign's environment, and of the training jobs' own with their machine; several where seeds ran on different ones."""
    found: dict[str, set[str]] = {}
    for attempt in trained:
        for name, value in (attempt.result or {})["payload"].get("versions", {}).items():
            found.setdefault(name, set()).add(value)
    return campaign.meta["versions"] | {name: " or ".join(sorted(values)) for name, values in found.items() if name != "poise_hpc"}


def attempt_row(attempt: Attempt) -> dict[str, Any]:
    result, submitted = attempt.result or {}, attempt.submitted or {}
    return {"stage": str(attempt.stage), "unit": attempt.unit, "seed": attempt.seed, "number": attempt.number, "outcome": result.get("outcome"),
            "cause": result.get("cause", ""), "run_seconds": result.get("run_seconds", 0.0), "ranks": result.get("ranks", 1),
            "job_id": submitted.get("job_id") or result.get("job_id"), "host": result.get("host", ""), "walls": result.get("walls", {})}


def timings(candidate: Candidate) -> dict[str, float]:
    """Seconds by phase of training, summed over seeds and rungs."""
    total: dict[str, float] = {}
    for attempt in (a for a in candidate.attempts if a.stage == Stage.TRAIN and a.outcome is Outcome.SUCCEEDED and a.version == candidate.version):
        for phase, seconds in (attempt.result or {})["payload"].get("timings", {}).items():
            total[phase] = round(total.get(phase, 0.0) + seconds, 4)
    return total


def completions(seed: int, found: list[Evaluated]) -> Iterator[tables.Element]:
    """Evaluation elements, those of the last point with their raw completions."""
    import numpy

    from .evaluation import chunks

    last = max((float(e.element["at"]) for e in found), default=0.0)
    for e in found:
        if float(e.element["at"]) < last:
            yield seed, e.element, None, None
        else:
            yield seed, e.element, *chunks.join((parts.rows(part), numpy.load(io.BytesIO(
                whole(path.with_suffix(".npz"), part.get("npz_sha256"), path.parents[1])))) for path, part in e.files.items())


def clean(candidate: Candidate) -> None:
    """Checkpoints, all weights but the final ones, and what jobs said of themselves while they ran: inodes and quota are short on
    clusters, and an evaluation may have a thousand attempts."""
    last = {a.folder for seed in {a.seed for a in candidate.attempts} if (a := jobspec.trained(candidate, seed))}
    for attempt in candidate.attempts:
        shutil.rmtree(attempt.folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(attempt.folder / "chunks", ignore_errors=True)  # of evaluations that were killed
        shutil.rmtree(attempt.folder / "submitit", ignore_errors=True)
        for entry in os.scandir(attempt.folder):
            if SPENT.fullmatch(entry.name) and (entry.stat().st_size == 0 or not entry.name.startswith("stack")):
                os.unlink(entry)
        done = attempt.result["payload"].get("snapshots", {}) if attempt.result and attempt.folder in last else {}
        keep = {done[max(done, key=float)]} if done else set()
        for snapshot in sorted((attempt.folder / "snapshots").glob("*")):
            if str(Path("snapshots") / snapshot.name) not in keep:
                shutil.rmtree(snapshot, ignore_errors=True)


def headline(summary: EntrySummary) -> str:
    """One line for the event log."""
    if summary.screened is not None:
        return f"{summary.name}  screened out ({summary.cause}): {screening.text(summary.screened)}"
    if summary.score is None:
        return f"{summary.name}  failed: {summary.cause}"
    s = summary.score
    half = f" +- {(s.ci[1] - s.ci[0]) / 2:.1f}" if s.ci else ""
    against = f"  {s.delta:+.1f} against {BASELINE_ID}" if s.delta is not None else ""
    verdict = wording.verdict(summary.id, s.delta, s.delta_ci, summary.verdict)
    return f"{summary.name}  overall {s.overall:.1f}{half} ({wording.count(len(s.by_seed), 'seed')}){against}  {verdict}".rstrip()
