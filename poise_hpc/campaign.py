"""A campaign's folder: create it, open it, lock it, read what is in it. No scheduling and no science here."""
from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import config as configuration
from . import files
from .config import Config
from .lock import LOCK, Lock
from .stored import read_code, read_or_explain, read_result, read_status, read_submitted, stored_proposal
from .types import Outcome, PoiseError, Proposal, Stage, UsageError

FORMAT = 1
# What may change under an existing campaign: how long and how wide it runs, not what its numbers mean.
OPERATIONAL = re.compile(r"budget(\..*)?|search\.candidates|jobs\.(ranks|max_parallel|\w+_min|memory_gb|infra_retries|retry_wait_s|heartbeat_s)|"
                         # of the agent, not what prompts and rounds are made of: a replay could not repeat them
                         r"agent\.(?!proposals|duplicate_rounds|repair_rounds|synthesize_every|cards).*")


@dataclass
class Attempt:
    """One submission of one stage, as its folder says."""

    folder: Path
    stage: Stage
    # What of the stage: "" (all of it), "s0" (training seed 0), "s0@0.5" (of it, up to a rung), "s0@0.5@hard" (one evaluation element),
    # "s0@0.5@hard@3" (a chunk of it).
    unit: str
    number: int
    intent: dict[str, Any]                     # job name, and index within it if the job is an array
    submitted: dict[str, Any] | None = None    # job id; None: not submitted, or its submitter died before writing it down
    result: dict[str, Any] | None = None       # None: queued or running, as far as is known

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int | None:
        return seed_of(self.unit)

    @property
    def reaches(self) -> float:
        return reach(self.unit)

    @property
    def version(self) -> int:
        """Of the package that it ran: an author may have revised it since."""
        return self.intent.get("version", 1)

    @property
    def outcome(self) -> Outcome | None:
        return Outcome(self.result["outcome"]) if self.result else None


@dataclass
class Candidate:
    """A candidate that is not archived yet. `status.json` holds what its attempts do not."""

    id: str
    folder: Path
    stage: Stage
    outcome: Outcome | None = None
    cause: str = ""
    message: str = ""
    held_from: Stage | None = None
    forgiven: list[str] = field(default_factory=list)  # attempts whose failure a person has pardoned (`retry`)
    attempts: list[Attempt] = field(default_factory=list)
    version: int = 1  # of its package: 1 + those kept in versions/
    rung: int = 0     # rungs that it has passed

    def of(self, stage: Stage, unit: str) -> list[Attempt]:
        """Attempts with the current version of the package."""
        return [a for a in self.attempts if a.unit == unit and a.stage == stage and a.version == self.version]

    def by_unit(self, stage: Stage) -> dict[str, list[Attempt]]:
        """The same of every unit: an evaluation may have a thousand."""
        found: dict[str, list[Attempt]] = {}
        for a in self.attempts:
            if a.stage == stage and a.version == self.version:
                found.setdefault(a.unit, []).append(a)
        return found

    def save(self, sync: bool = False) -> None:
        files.write_json(self.folder / "status.json", {
            "id": self.id, "stage": self.stage, "outcome": self.outcome, "cause": self.cause, "message": self.message,
            "held_from": self.held_from, "forgiven": self.forgiven, "rung": self.rung}, sync=sync)  # derivable: see Campaign.load

    def proposal(self) -> Proposal:
        return stored_proposal(self.folder)


class Campaign:
    """Paths and plain reads. `open` and `create` are the only ways to one."""

    def __init__(self, root: Path, config: Config, meta: dict[str, Any]):
        self.root, self.config, self.meta = root, config, meta
        self.candidates, self.records = root / "candidates", root / "records"
        self._resolved: tuple[Config, dict[str, Any]] | None = None

    # --- create and open

    @classmethod
    def create(cls, root: Path, config: Config, fill: Callable[[Path], None] = lambda folder: None, **meta: Any) -> Campaign:
        """A new campaign folder, whole or not at all. `fill` may put more into it before it becomes visible."""
        root = Path(os.path.abspath(root))
        if root.is_dir() and any(root.iterdir()):
            raise UsageError(f"{root} is there and no campaign: it has other files, and no campaign.json. Give a new or an empty folder")
        temporary = root.parent / f".{root.name}.{os.getpid()}.tmp"
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in ("candidates", "records", "inbox"):
                (temporary / folder).mkdir(parents=True)
            data = {"format": FORMAT, "created": time.time(), "versions": versions(), **meta}
            files.write_json(temporary / "campaign.json", data)
            files.write_atomic(temporary / "config.yaml", dump_yaml(config))
            fill(temporary)
            os.rename(temporary, root)
        except OSError as error:
            cure = "Make room there" if files.full(error) else f"Give another path, or make {root.parent} a folder that can be written"
            raise PoiseError(f"cannot create the campaign folder {root}: {error.strerror or error}. {cure}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(root, config, data)

    @classmethod
    def open(cls, root: Path) -> Campaign:
        root = Path(os.path.abspath(root))
        cure = "Restore it from a copy. If there is none, move it away: `leaderboard`, `show`, `rerun` and `archive` do without it"
        meta = read_or_explain(root / "campaign.json", cure, format=int, created=(int, float), versions=dict, cache_dir=str)
        if meta is None:
            raise UsageError(f"{root} is no campaign: it has no campaign.json. `poise-hpc run {shlex.quote(str(root))}` creates one")
        if meta["format"] != FORMAT:
            raise UsageError(f"{root} has campaign format {meta['format']}; this version reads {FORMAT}")
        return cls(root, configuration.load(root / "config.yaml"), meta)

    def changes(self, config: Config) -> list[str]:
        """What `adopt` would take over: operational settings. Others are refused by name."""
        changed = sorted(_differences(self.config.dump(), config.dump(), Config().dump()))
        refused = [line for key, line in changed if not OPERATIONAL.fullmatch(key)]
        if refused:
            raise UsageError(f"{self.root / 'config.yaml'} is frozen and the given config differs:\n  " + "\n  ".join(refused)
                             + "\nscores would not be comparable: start another campaign, or give the old values")
        return [line for _, line in changed]

    def adopt(self, config: Config) -> None:
        if changed := self.changes(config):
            files.write_atomic(self.root / "config.yaml", dump_yaml(config))
            self.log("config", "changed", "; ".join(changed))
            self.config = config

    def set_site(self, path: Path) -> None:
        """Keep a copy of the site file, parsed first: later steps (cron, a self-resubmitting job) need no option."""
        from . import site

        loaded = site.load(path)
        files.write_atomic(self.root / "site.yaml", yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False))

    # --- read

    @property
    def word(self) -> str:
        """Its folder as one word of a shell, for messages that say how to go on."""
        return shlex.quote(str(self.root))

    @property
    def resolved(self) -> dict[str, Any]:
        """The config as plain data, for job.json; made once per config."""
        if self._resolved is None or self._resolved[0] is not self.config:
            self._resolved = (self.config, self.config.dump())
        return self._resolved[1]

    def ids(self) -> list[str]:
        """Every candidate, in order; none where only the records were kept."""
        found = os.scandir(self.candidates) if self.candidates.is_dir() else ()
        return sorted((e.name for e in found if re.fullmatch(r"c\d{4,}", e.name)), key=lambda id: int(id[1:]))

    def archived_ids(self) -> set[str]:
        return {e.name.removesuffix(".h5") for e in os.scandir(self.records) if re.fullmatch(r"c\d{4,}\.h5", e.name)}

    def load(self, id: str) -> Candidate:
        folder = self.candidates / id
        if not (folder / "proposal.json").exists():
            known = self.ids()
            has = f"it has {known[0]} to {known[-1]}" if known else "it has none yet"
            raise UsageError(f"{self.root.name} has no candidate {id}: {has}")
        status = read_status(folder)
        if status is None:  # lost in a power cut: its attempts' results lead it through the stages again
            return Candidate(id, folder, Stage.CHECK, attempts=load_attempts(folder), version=latest_version(folder))
        outcome, held = status["outcome"], status["held_from"]
        return Candidate(id, folder, Stage(status["stage"]), Outcome(outcome) if outcome else None, status["cause"],
                         status["message"], Stage(held) if held else None, status["forgiven"], load_attempts(folder), latest_version(folder),
                         status.get("rung", 0))

    def code(self, id: str) -> dict[str, str]:
        """The package's files, by name, as its manifest lists them; CorruptFile if they are no longer the candidate's code."""
        return read_code(self.candidates / id)

    def proposal(self, id: str) -> Proposal:
        return stored_proposal(self.candidates / id)

    # --- write

    def log(self, id: str, what: str, text: str = "") -> str:
        """One event, one line, the id first."""
        line = f"{id:<8} {what:<20} {text}".rstrip().replace("\n", " ")
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with files.naming(self.root / "events.log"), open(self.root / "events.log", "a", encoding="utf-8") as f:
            f.write(f"{stamp} {line}\n")
        return line

    @contextmanager
    def lock(self) -> Iterator[Lock]:
        lock = Lock(self.root / LOCK)
        lock.take()
        try:
            yield lock
        finally:
            lock.release()


def load_attempts(candidate: Path) -> list[Attempt]:
    out = []
    folder = candidate / "attempts"
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = re.fullmatch(r"([a-z]+)(?:-(s\d+(?:@[^/]+)?))?-(\d+)", entry.name)
        if match and entry.is_dir():
            stage, unit, number = match.groups()
            path = Path(entry.path)
            intent = read_or_explain(path / "intent.json", f"Delete the folder {path}, and the stage is submitted again", name=str)
            if intent is None:
                raise PoiseError(f"{path} has no intent.json. Delete the folder, and the stage is submitted again")
            out.append(Attempt(path, Stage(stage), unit or "", int(number), intent, read_submitted(path), read_result(path)))
    return sorted(out, key=lambda a: (a.stage, -1 if a.seed is None else a.seed, a.unit, a.number))


def latest_version(candidate: Path) -> int:
    """Of its package: one more than `versions/` keeps."""
    kept = candidate / "versions"
    return 1 + sum(e.name.isdigit() for e in os.scandir(kept)) if kept.is_dir() else 1


def seed_of(unit: str) -> int | None:
    return int(unit[1:].partition("@")[0]) if unit else None


def reach(unit: str) -> float:
    """Of a unit of training, or of a seed's evaluation: up to which fraction of the training."""
    return float(unit.partition("@")[2] or 1)


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True)


def versions() -> dict[str, str]:
    """Of everything that numbers depend on; "" where a package is not installed."""
    out = {}
    for package in ("poise-hpc", "torch", "transformers", "deepspeed", "vllm", "submitit", "h5py", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = ""
    return out


ABSENT = "(none)"  # in place of a value: the key is in one of the two only


def _differences(old: Any, new: Any, default: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        below = default if isinstance(default, dict) else {}
        for name in old.keys() | new.keys():
            yield from _differences(*(d.get(name, ABSENT) for d in (old, new, below)), f"{key}.{name}" if key else name)
    elif old != new:
        # A default of None says nothing: it is "no limit", or "by itself".
        before, after = ("(default)" if value is None and default is None else ABSENT if value is ABSENT else repr(value) for value in (old, new))
        yield key, f"{key}: {before} -> {after}"
