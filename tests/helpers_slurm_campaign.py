"""Campaigns on the virtual cluster: made, driven step by step, looked into."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_campaign import campaign as small_campaign
from helpers_slurm import REPO, VirtualCluster, until

from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.base import for_campaign
from poise_hpc.controller import Controller
from poise_hpc.settings import overlay
from poise_hpc.types import Stage

SITE = REPO / "configs" / "sites" / "virtual.yaml"
NOOP = f"{REPO / 'tests' / 'noop'}:{REPO / 'tests'}"


def noop(folder: Path, **change) -> Campaign:
    made = small_campaign(folder, **overlay({"search": {"candidates": 1}, "jobs": {"heartbeat_s": 0.5, "retry_wait_s": 1.0}}, change))
    made.set_site(SITE)
    return made


def controller(campaign: Campaign) -> Controller:
    return Controller(campaign, for_campaign(campaign), OfflineProposer())


def drive(driven: Controller, end: Callable[[], bool] | None = None, limit_s: float = 200.0) -> None:
    begun = time.monotonic()
    while not (end() if end else driven.finished):
        assert time.monotonic() - begun < limit_s, (driven.campaign.root / "events.log").read_text()
        if not driven.step():
            time.sleep(0.2)


def attempts(driven: Controller, stage: Stage, id: str = "c0000") -> list:
    return [a for a in driven.campaign.load(id).attempts if a.stage == stage]


def running(attempt) -> bool:
    return (attempt.folder / "claim-0.json").exists()


def ranks(attempt, rank: int) -> list[int]:
    """Process ids of submitit in this attempt's job with that rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                if f"SLURM_PROCID={rank}".encode() in (entry / "environ").read_bytes().split(b"\0") and b"submitit.core._submit" in arguments \
                        and str(attempt.folder / "submitit").encode() in arguments:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def kill_rank(attempt, rank: int) -> None:
    for pid in ranks(attempt, rank):
        os.kill(pid, signal.SIGKILL)


def events(campaign: Campaign) -> str:
    return (campaign.root / "events.log").read_text()


def point_at(cluster: VirtualCluster, monkeypatch: pytest.MonkeyPatch, **env: str) -> None:
    """This process talks to the cluster. Nothing of an earlier test is in its queue."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in {"SLURM_CONF": str(cluster.conf), "OMP_NUM_THREADS": "1", **env}.items():
        monkeypatch.setenv(name, value)
    cluster.run("scancel", "--user=" + str(os.getuid()))
    until(lambda: not cluster.run("squeue", "--noheader"), "the queue does not empty")
