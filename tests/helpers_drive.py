"""Driving campaigns in tests: clusters with a will of their own, kills at every write, and what an archive says."""
from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_campaign import noop_work

from poise_hpc import archive, files
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.controller import Controller
from poise_hpc.scheduler import Submitted
from poise_hpc.types import Outcome

# What may differ between two runs of one campaign: when and how often, not what.
CIRCUMSTANCES = {"created", "attempts", "timings", "versions", "checks"}


def archive_of(root: Path) -> dict[str, dict[str, Any]]:
    """Every record's content that two runs of one campaign must share, ready for ==."""
    out = {}
    for path in sorted((root / "records").glob("c*.h5")):
        entry = archive.read(path)
        data = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name not in CIRCUMSTANCES}
        out[path.stem] = {k: (v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for k, v in data.items()}
    return out


class Clock:
    """Moves a second at each look, so that every step may ask the scheduler."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class ShuffledCluster(InlineCluster):
    """Jobs wait; each look at the cluster ends a random one of them."""

    def __init__(self, seed: int, slots: int = 4, work: Callable[..., dict[str, Any]] = noop_work):
        super().__init__(work, slots)
        self.random, self.queue = random.Random(seed), dict[Path, int]()

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]]:
        self.queue |= {attempt: ranks for attempt in attempts}
        return [{"job_id": attempt.name} for attempt in attempts]

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, bool | None]:
        answer = {job.attempt: job.attempt in self.queue for job in submitted}
        attempt = self.random.choice(sorted(self.queue))
        super().submit([attempt], "", "", self.queue.pop(attempt))
        return answer


def controller(root: Path, cluster: Any = None, **more: Any) -> Controller:
    return Controller(Campaign.open(root), cluster or InlineCluster(noop_work), OfflineProposer(), clock=Clock(), **more)


def drive(root: Path, cluster: Any = None, limit: int = 2000) -> Controller:
    """Open the campaign and step until it is finished."""
    return finish(controller(root, cluster), limit)


def finish(driven: Controller, limit: int = 2000) -> Controller:
    for _ in range(limit):
        driven.step()
        if driven.finished:
            return driven
    raise AssertionError(f"not finished after {limit} steps: {[(c.id, c.stage) for c in driven.active.values()]}")


def failing(kind: str, candidate: str, outcome: Outcome, cause: str = "x", times: int = 10**6, seed: int | None = None) -> Callable[..., dict[str, Any]]:
    """noop jobs, of which those of `candidate` and `kind` end with `outcome`, the first `times` times."""
    left = [times]

    def work(attempt: Path, job: dict[str, Any]) -> dict[str, Any]:
        if (job["kind"], job["candidate"]) == (kind, candidate) and seed in (None, job["seed"]) and left[0] > 0:
            left[0] -= 1
            return {"outcome": outcome, "cause": cause, "message": f"{cause} in {kind}", "payload": {}}
        return noop_work(attempt, job)

    return work


class Killed(BaseException):
    pass


class Mortal:
    """Context: the n-th change of the file system (from 0) never happens, nor does any later one, as after kill -9.

    Data that go into an open file are not counted: no reader looks at them before the rename.
    """

    CALLS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir")

    def __init__(self, at: int):
        self.at, self.calls = at, 0

    def __enter__(self) -> Mortal:
        self.saved = {name: getattr(os, name) for name in self.CALLS}
        for name, function in self.saved.items():
            setattr(os, name, self.counted(function))
        return self

    def __exit__(self, kind: Any, *error: Any) -> bool:
        for name, function in self.saved.items():
            setattr(os, name, function)
        return kind is Killed

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls > self.at:
                raise Killed
            return function(*arguments, **named)

        return call


def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process wrote is there, synced or not: where thousands of lives end by a kill, nobody waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def write_package(folder: Path, name: str = "mine", seed: str = "rloo") -> Path:
    """A person's package: a seed algorithm under its own name."""
    from poise_hpc.algorithms import load

    load.write_seed_package(seed, folder)
    files.write_json(folder / "proposal.json", {"name": name, "hypothesis": "mine is better"})
    return folder
