"""The archive: one write-once HDF5 record per candidate, and a disposable index over them.

A record is built in memory, written to a temporary file, synced and renamed: a killed writer leaves the old state or
the new one, never half a file. `read` returns what was written or raises `CorruptFile` (`hdf5`). The SHA-256 over its logical
content is a record's identity. `archive_store/README.md` holds the format field by field.

Not covered: several writers. The campaign's lock sees to one; a second would be refused, not merged. A record that
rots *after* the index has its row is found by `verify_campaign`, not by `ArchiveView.load`.
"""
from __future__ import annotations

import bisect
import gc
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from . import files, hdf5
from .agent.novelty import signature
from .entry import EVALUATION_ROW, SCALARS, Entry
from .files import CorruptFile
from .types import EntrySummary, Outcome, PoiseError, Proposal, Score, Screening, candidate_number

INDEX_LAG = 64          # records that may be missing from the index before it is written anew: 3 ms each when it is loaded
RECORD_NAME = re.compile(r"(c\d{4,})\.h5")

INDEX_ROW = np.dtype([  # for plain HDF5 tools; the index's own reader takes the JSON lines
    ("id", "S12"), ("outcome", "S16"), ("overall", "<f8"), ("final", "<f8"), ("delta", "<f8"), ("run_seconds", "<f8")])


# --- records

def write(path: Path, entry: Entry) -> str:
    """Write a record once; its sha256. The same content again is fine, other content under that name is refused."""
    try:
        datasets = _layout(entry)
    except ValueError as error:
        raise PoiseError(f"{entry.id}: cannot be archived: {error}; figures must be finite or null (curves may hold NaN)") from None
    digest = hdf5.digest_of(datasets)
    if path.exists():
        _refuse_other(path, digest)
        return digest
    try:
        files.write_atomic(path, hdf5.pack(datasets, "record", digest))
    except OSError as error:
        raise PoiseError(f"cannot write {path}: {error.strerror or error}. Make room or make the folder writable, then run "
                         "the campaign again: nothing is lost") from None
    return digest


def read(path: Path) -> Entry:
    """The entry as it was written; CorruptFile otherwise."""
    return _read(path)[0]


def identity(path: Path) -> str:
    """The record's SHA-256, as it stands in it: an entry that an earlier version wrote would be laid out otherwise now."""
    return hdf5.unpack(path, "record")[1]


def summary(entry: Entry, record_sha256: str | None = None) -> EntrySummary:
    """The entry's row in the index."""
    score = entry.score
    return EntrySummary(
        id=entry.id, name=entry.name, parents=tuple(entry.parents), outcome=Outcome(entry.outcome), cause=entry.cause,
        proposer=entry.proposer, mechanisms=tuple(entry.proposal.get("mechanisms", ())),
        score=Score.from_json(score) if score else None, behaviour=dict(entry.behaviour), verdict=entry.reflection.get("verdict", ""),
        run_seconds=float(sum((a.get("run_seconds") or 0.0) * a.get("ranks", 1) for a in entry.attempts)), created=entry.created,
        record_sha256=record_sha256 or hdf5.digest_of(_layout(entry)), signature=signature(Proposal.from_json(entry.proposal), entry.code),
        screened=Screening.from_json(entry.screenings[-1]) if entry.outcome == Outcome.SCREENED_OUT else None, digest=entry.hashes.get("digest", ""))


def verify(path: Path) -> list[str]:
    """What is wrong with one record; [] when it is whole."""
    return _check(path)[0]


def verify_campaign(campaign: Path) -> dict[str, list[str]]:
    """Candidate -> problems, over all records, the index and the genealogy; {} when all is well."""
    problems: dict[str, list[str]] = {}
    rows: dict[str, EntrySummary] = {}
    for id in _listed(campaign):
        problems[id], row = _check(campaign / "records" / f"{id}.h5")
        if row:
            rows[id] = row
    for id, row in rows.items():
        problems[id] += [f"parent {p} has no record" for p in row.parents if p not in problems]
    for indexed in map(json.loads, _index_lines(campaign)):
        id = indexed["id"]
        found = problems.setdefault(id, [f"in the index, but records/{id}.h5 is missing"])
        if id in rows and indexed["record_sha256"] != rows[id].record_sha256:
            found.append("the index holds other content than the record; `poise-hpc archive rebuild` makes it anew")
    return {id: found for id, found in problems.items() if found}


def _check(path: Path) -> tuple[list[str], EntrySummary | None]:
    try:
        entry, digest = _read(path)
    except PoiseError as error:
        return [str(error)], None
    problems = [] if path.stem == entry.id else [f"{path} holds {entry.id}: the file was renamed or copied"]
    return problems + _code_problems(entry), summary(entry, digest)


def _code_problems(entry: Entry) -> list[str]:
    """Is the code in the record the code that ran? Its hashes were taken when it was proposed."""
    ran = {name.removeprefix("code:"): sha256 for name, sha256 in entry.hashes.items() if name.startswith("code:")}
    held = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in entry.code.items()}
    wrong = sorted(name for name in ran.keys() | held.keys() if ran.get(name) != held.get(name))
    return [f"code/{name} is not the code that was checked and trained: its hash is another" for name in wrong]


def _layout(entry: Entry) -> dict[str, np.ndarray]:
    """An entry as named arrays, in the types they have on disk."""
    return {
        "entry": hdf5.text(files.dumps({name: getattr(entry, name) for name in SCALARS})),
        "config": hdf5.text(entry.config),
        **{f"code/{name}": hdf5.text(text) for name, text in entry.code.items()},
        "curves/steps": np.ascontiguousarray(entry.curve_steps, "<i8"),
        "curves/values": np.ascontiguousarray(entry.curve_values, "<f8"),
        "evaluations": np.ascontiguousarray(entry.evaluations, EVALUATION_ROW),
        "completions/tokens": np.ascontiguousarray(entry.completion_tokens),
        "completions/offsets": np.ascontiguousarray(entry.completion_offsets, "<i8"),
    }


def _read(path: Path) -> tuple[Entry, str]:
    datasets, digest = hdf5.unpack(path, "record")
    data = json.loads(datasets["entry"].tobytes())
    for name in ("parents", "seeds", "curve_names"):
        data[name] = tuple(data[name])
    return Entry(
        **data | {"outcome": Outcome(data["outcome"])},
        config=datasets["config"].tobytes().decode(),
        code={name.removeprefix("code/"): raw.tobytes().decode() for name, raw in datasets.items() if name.startswith("code/")},
        curve_steps=datasets["curves/steps"], curve_values=datasets["curves/values"], evaluations=datasets["evaluations"],
        completion_tokens=datasets["completions/tokens"], completion_offsets=datasets["completions/offsets"]), digest


def _refuse_other(path: Path, digest: str) -> None:
    try:
        there = _read(path)[1]
    except CorruptFile as error:
        raise CorruptFile(f"{error}. Its content is at hand: delete the file and run the campaign again") from None
    if there != digest:
        raise PoiseError(f"{path} exists with other content (sha256 {there[:12]}, new {digest[:12]}). Records are write-once: move "
                         "it away if it is the wrong one")


# --- index

class ArchiveView:
    """All entries of a campaign as summaries, in memory; the controller keeps one and adds to it.

    `load` lists the record names, takes what the index knows and reads the rest one by one, so an index that is old,
    damaged, foreign or absent costs time and never a wrong answer.
    """

    def __init__(self, campaign: Path):
        self.campaign = campaign
        self.entries: list[EntrySummary] = []     # by candidate number
        self.problems: dict[str, str] = {}        # candidate -> why it is not in `entries`, or what is wrong with it
        self._lines: dict[str, str] = {}          # candidate -> its JSON line in the index
        self._unindexed = 0

    @classmethod
    def load(cls, campaign: Path, *, use_index: bool = True) -> ArchiveView:
        view = cls(campaign)
        listed = set(_listed(campaign))
        lines = _index_lines(campaign) if use_index else []
        indexed = _summaries(lines)
        if _foreign(campaign, [row for row in indexed if row.id in listed]):
            lines, indexed = [], []
        view._lines = {row.id: line for row, line in zip(indexed, lines, strict=True)}
        for id in sorted(view._lines.keys() - listed, key=candidate_number):
            view.problems[id] = f"records/{id}.h5 is missing; what is shown comes from the index"
        read_now = []
        for id in sorted(listed - view._lines.keys(), key=candidate_number):
            try:
                read_now.append(view._remember(summary(*_read(campaign / "records" / f"{id}.h5"))))
            except PoiseError as error:
                view.problems[id] = str(error)
        view.entries = sorted(indexed + read_now, key=lambda row: candidate_number(row.id))
        view._unindexed = len(read_now)
        view._refresh_index()
        return view

    def add(self, entry: Entry) -> EntrySummary:
        """Write the entry's record and show it; the index follows every INDEX_LAG records."""
        row = self._remember(summary(entry, write(self.campaign / "records" / f"{entry.id}.h5", entry)))
        if find(self.entries, row.id) is None:
            bisect.insort(self.entries, row, key=lambda e: candidate_number(e.id))
            self._unindexed += 1
        self.problems.pop(row.id, None)
        self._refresh_index()
        return row

    def write_index(self) -> None:
        """Replace index.h5."""
        datasets = {"summaries": hdf5.text("\n".join(self._lines[row.id] for row in self.entries)),
                    "table": np.array([_row(e) for e in self.entries], INDEX_ROW)}
        # Plain: to compress 10,000 rows takes 0.1 s, again and again, for a file that anybody may delete.
        files.write_atomic(self.campaign / "index.h5", hdf5.pack(datasets, "index", hdf5.digest_of(datasets), compress=False), sync=False)
        self._unindexed = 0

    def _refresh_index(self) -> None:
        """A reader without write permission, or a full disk, goes without: it is disposable."""
        with suppress(OSError):
            if self._unindexed >= INDEX_LAG:
                self.write_index()

    def _remember(self, row: EntrySummary) -> EntrySummary:
        """The row as a later load will give it, down to the order of its dicts: who decides by it decides the same."""
        self._lines[row.id] = files.dumps(vars(row) | {"score": vars(row.score) if row.score else None,
                                                       "screened": row.screened.to_json() if row.screened else None})
        return _summary(json.loads(self._lines[row.id]))


def find(entries: Sequence[EntrySummary], id: str) -> EntrySummary | None:
    """The entry of that id, or None; `entries` by candidate number."""
    if not id.removeprefix("c").isdigit():  # a person's word
        return None
    place = bisect.bisect_left(entries, candidate_number(id), key=lambda e: candidate_number(e.id))
    return entries[place] if place < len(entries) and entries[place].id == id else None


def rebuild(campaign: Path) -> ArchiveView:
    """Write the index anew from the records alone."""
    view = ArchiveView.load(campaign, use_index=False)
    view.write_index()
    return view


def check_index(campaign: Path) -> None:
    """Read index.h5 whole; CorruptFile says what is wrong with it."""
    hdf5.unpack(campaign / "index.h5", "index")


def _listed(campaign: Path) -> list[str]:
    """Candidates with a record file, by name only: 10,000 stat calls on a shared file system take seconds."""
    try:
        names = os.listdir(campaign / "records")
    except FileNotFoundError:
        raise PoiseError(f"{campaign} has no folder 'records': it is no campaign") from None
    return sorted((m[1] for m in map(RECORD_NAME.fullmatch, names) if m), key=candidate_number)


def _index_lines(campaign: Path) -> list[str]:
    try:
        text = hdf5.unpack(campaign / "index.h5", "index")[0]["summaries"].tobytes().decode()
        return text.split("\n") if text else []  # not splitlines: it also splits at U+2028 and friends
    except CorruptFile:
        return []


def _foreign(campaign: Path, indexed: list[EntrySummary]) -> bool:
    """Does the index belong to other records (a copied or restored folder)? Its first and last row are looked up."""
    for row in {e.id: e for e in indexed[:1] + indexed[-1:]}.values():
        try:
            if identity(campaign / "records" / f"{row.id}.h5") != row.record_sha256:
                return True
        except CorruptFile:
            continue  # rotten, not foreign: `verify_campaign` names it
    return False


def _summaries(lines: list[str]) -> list[EntrySummary]:
    # 10,000 rows are 100,000 new objects and no garbage: looking for some in between costs a third of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return [_summary(data) for data in json.loads(f"[{','.join(lines)}]")]
    finally:
        if enabled:
            gc.enable()


def _summary(data: dict[str, Any]) -> EntrySummary:
    data["parents"], data["mechanisms"] = tuple(data["parents"]), tuple(data["mechanisms"])
    data["outcome"] = Outcome(data["outcome"])
    data["score"] = Score.from_json(data["score"]) if data["score"] else None
    data["screened"] = Screening.from_json(data["screened"]) if data.get("screened") else None
    return EntrySummary(**data)


def _row(e: EntrySummary) -> tuple[Any, ...]:
    nan = float("nan")
    overall, final, delta = (e.score.overall, e.score.final, e.score.delta) if e.score else (nan, nan, None)
    return (e.id.encode(), e.outcome.encode(), overall, final, nan if delta is None else delta, e.run_seconds)
