"""Problem sets on disk: one canonical JSONL per set, and a lock that pins each one's hash.

    DIR/<set>.jsonl   {"answer", "id", "level"?, "problem"} per line, keys sorted
    DIR/lock.json     {set: {"sha256", "count", "source", "licence"}}, written at import, compared at every read

A set comes from the hub (`fetch`) or from a file (`import_file`); what is known about the published ones stands in
tasks/manifest.yaml. A set of your own may have any other name. Light: no torch, no network but in `fetch`.

Not covered: problems with pictures, near-duplicates (overlap is equality of the text without case and spaces).
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from . import files
from .tasks.grading_rules import boxed
from .types import PoiseError, UsageError

LOCK = "lock.json"
# Column names that publishers use, tried in this order, without case.
PROBLEM, ANSWER, ID = ("problem", "question"), ("answer", "final_answer", "expected_answer"), ("id", "unique_id")


@dataclass(frozen=True)
class Row:
    id: str                  # unique within its set
    problem: str
    answer: str
    level: int | None = None

    @property
    def key(self) -> str:
        """Equal for equal problem texts, whatever their case and spacing."""
        return hashlib.sha256(re.sub(r"\s|\\[,;:! ]|\$", "", self.problem.casefold()).encode()).hexdigest()


@cache
def manifest() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((Path(__file__).parent / "tasks" / "manifest.yaml").read_text(encoding="utf-8"))


# --- reading

def lock(folder: Path) -> dict[str, dict[str, Any]]:
    return files.read_json(folder / LOCK) or {}


def pinned(folder: Path, name: str) -> dict[str, Any]:
    """The lock's entry of a set; UsageError if the set is not there."""
    entry = lock(folder).get(name)
    if entry is None:
        raise UsageError(f"the problem set {name!r} is not in {folder} (there: {', '.join(sorted(lock(folder))) or 'none'}). "
                         f"`poise-hpc data fetch {name} {folder}` downloads a published one, `data import {name} FILE {folder}` takes "
                         "a file of yours")
    return entry


def read(folder: Path, name: str) -> list[Row]:
    """A set, if it still is what its lock and the manifest say."""
    entry, path = pinned(folder, name), folder / f"{name}.jsonl"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PoiseError(f"{path} cannot be read ({error.strerror}), but {LOCK} lists it: import it again") from None
    found, published = hashlib.sha256(raw).hexdigest(), manifest().get(name, {}).get("sha256")
    for wanted, where in ((entry["sha256"], LOCK), (published, "the manifest")):
        if wanted is not None and found != wanted:
            raise PoiseError(f"{path} has sha256 {found}, {where} says {wanted}: numbers on it could not be compared. Restore the "
                             "file, or import it anew with --replace")
    return [Row(**json.loads(line)) for line in json_lines(raw)]


def json_lines(raw: bytes) -> list[str]:
    """Not splitlines: it also splits at U+0085 and U+2028, which JSON texts may hold as they are."""
    return [line for line in raw.decode().split("\n") if line.strip()]


# --- importing

def import_file(name: str, source: Path, folder: Path, *, replace: bool = False) -> dict[str, Any]:
    return write(name, canonical(read_table(source), str(source)), folder, f"file:{source.name}", replace=replace)


def fetch(name: str, folder: Path, *, replace: bool = False) -> dict[str, Any]:
    """Download a published set from the Hugging Face hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    known = manifest().get(name)
    if known is None:
        raise UsageError(f"there is no published set {name!r}; known: {', '.join(manifest())}. For others: `poise-hpc data import`")
    repository, revision = known["repository"], known["revision"]
    table: list[dict[str, Any]] = []
    try:
        for file in known["files"]:
            path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
            revision = path.parts[path.parts.index("snapshots") + 1]  # the commit: all files from one
            table += read_table(path)
    except LocalEntryNotFoundError as error:
        raise PoiseError(f"cannot reach the Hugging Face hub for {repository} ({error}). On a machine with internet: download "
                         f"{', '.join(known['files'])}; here: `poise-hpc data import {name} FILE {folder}`") from None
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError) as error:
        raise PoiseError(f"the hub does not give {repository} at {revision or 'its newest revision'}: {error}. Get the set elsewhere "
                         f"and use `poise-hpc data import {name} FILE {folder}`") from None
    return write(name, canonical(table, repository), folder, f"hub:{repository}@{revision}", replace=replace)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json (a list) or .parquet file."""
    try:
        match path.suffix:
            case ".jsonl":
                return [json.loads(line) for line in json_lines(path.read_bytes())]
            case ".json":
                table = json.loads(path.read_bytes())
            case ".parquet":
                table = _read_parquet(path)
            case _:
                raise UsageError(f"{path}: .jsonl, .json or .parquet was wanted")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not what its name says: {error}") from None
    if not isinstance(table, list):
        raise UsageError(f"{path}: a list of problems was wanted, got {type(table).__name__}")
    return table


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{path}: parquet needs pyarrow: pip install 'poise_hpc[math]', or convert the file to .jsonl") from None
    return parquet.read_table(path).to_pylist()


def canonical(table: Iterable[Any], where: str) -> list[Row]:
    """Rows from whatever columns the publisher has."""
    rows: list[Row] = []
    for number, raw in enumerate(table):
        if not isinstance(raw, dict):
            raise UsageError(f"{where}: row {number} is no object but {type(raw).__name__}")
        row = {str(k).lower(): v for k, v in raw.items()}
        problem, answer = _first(row, PROBLEM), _answer(row)
        if not problem or not answer:
            raise UsageError(f"{where}: row {number} has no {'problem' if not problem else 'answer'}; its columns are {', '.join(raw)}. "
                             f"Wanted: one of {', '.join(PROBLEM)}, and one of {', '.join(ANSWER)} or a solution with a \\boxed answer")
        id = _first(row, ID)
        rows.append(Row(f"{number:05d}" if id is None else str(id), str(problem).strip(), answer, _level(row.get("level"))))
    if len({row.id for row in rows}) < len(rows):  # several files, each numbered from 0
        rows = [Row(f"{number:05d}", row.problem, row.answer, row.level) for number, row in enumerate(rows)]
    return rows


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _answer(row: dict[str, Any]) -> str:
    answer = _first(row, ANSWER)
    if answer is None:
        return _boxed(str(row.get("solution") or ""))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    parts = answer if isinstance(answer, list) else [answer]
    return ", ".join(str(part).strip().strip("$").strip() for part in parts)


def _boxed(solution: str) -> str:
    r"""What the last box holds; some of MATH's solutions write it without braces, $x = \boxed 5$."""
    bare = re.findall(r"\\boxed\s+([^\s{}$]+)\s*\$", solution)
    return boxed(solution) or (bare[-1] if bare else "")


def _level(level: Any) -> int | None:
    """5 from 5 or "Level 5"; None where there is none ("Level ?")."""
    digits = re.search(r"\d+", str(level))
    return int(digits[0]) if digits else None


def write(name: str, rows: Sequence[Row], folder: Path, source: str, *, replace: bool) -> dict[str, Any]:
    """Store a set and pin it. Another content under a pinned name is refused without `replace`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise UsageError(f"a set's name is made of small letters, digits, '-' and '_', not {name!r}")
    known, locked = manifest().get(name, {}), lock(folder)
    raw = "".join(files.dumps({k: v for k, v in vars(row).items() if v is not None}) + "\n" for row in rows).encode()
    sha256 = hashlib.sha256(raw).hexdigest()
    if known and len(rows) != known["count"]:
        raise UsageError(f"{name} has {known['count']} problems, {source} has {len(rows)}: another version, or a part. To use it all "
                         "the same, import it under a name of its own")
    if known.get("sha256") not in (None, sha256):
        raise UsageError(f"{source} is not the {name} of the manifest: sha256 {sha256}, wanted {known['sha256']}. To use it all the "
                         "same, import it under a name of its own")
    if not replace and name in locked and locked[name]["sha256"] != sha256:
        raise UsageError(f"{folder} holds another {name} already (sha256 {locked[name]['sha256']}, from {locked[name]['source']}). "
                         "Campaigns may depend on it; --replace replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / f"{name}.jsonl", raw)
    entry = {"sha256": sha256, "count": len(rows), "source": source, "licence": known.get("licence", "yours to know")}
    files.write_json(folder / LOCK, locked | {name: entry})
    return entry


# --- checking

def verify(folder: Path) -> dict[str, Any]:
    """{"sets": {name: {"count", "sha256", "duplicates"}}, "overlaps": [{"sets", "count"}], "faults": [...]}.

    Faults make a folder unusable. Duplicates and overlaps are reported: published sets have some; the task keeps
    training and confirmation clear of them.
    """
    report: dict[str, Any] = {"sets": {}, "overlaps": [], "faults": []}
    keys: dict[str, set[str]] = {}
    if not lock(folder):
        report["faults"].append(f"{folder} has no {LOCK}: nothing was imported there")
    for name, entry in sorted(lock(folder).items()):
        try:
            rows = read(folder, name)
        except PoiseError as error:
            report["faults"].append(str(error))
            continue
        keys[name] = {row.key for row in rows}
        report["sets"][name] = {"count": len(rows), "sha256": entry["sha256"], "duplicates": len(rows) - len(keys[name]),
                                "source": entry["source"], "licence": entry["licence"]}
    names = sorted(keys)
    report["overlaps"] = [{"sets": [a, b], "count": n} for i, a in enumerate(names) for b in names[i + 1:]
                          if (n := len(keys[a] & keys[b]))]
    return report


def verify_text(report: dict[str, Any]) -> str:
    lines = [f"{name:14} {s['count']:5} problems  {s['sha256'][:12]}  {s['source']}"
             + (f"  {s['duplicates']} duplicates" if s["duplicates"] else "") for name, s in report["sets"].items()]
    lines += [f"overlap: {o['count']} problems of {o['sets'][0]} are also in {o['sets'][1]}" for o in report["overlaps"]]
    return "\n".join(lines + [f"fault: {fault}" for fault in report["faults"]])
