"""What the controller wants of a cluster, and which one a campaign has.

An attempt's job is submitted in two phases: `intent.json` (a unique job name) before, `submitted.json` (the id) after.
A controller killed in between finds the job again by that name. A job that was submitted twice all the same is
harmless: the second one cannot claim the attempt and exits.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .. import site as sites
from ..jobspec import ended_attempt, job_prefix
from ..scheduler import News, Submitted
from ..site import Site
from .local import LocalCluster
from .slurm import SlurmCluster


class Cluster(Protocol):
    slots: int      # jobs in flight at most
    poll_s: float   # between two calls of `alive`
    idle_s: float   # between two looks at the attempts' folders, when nothing moved
    on_this_host: bool  # jobs share this machine with the controller, and stop when it is told to

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        """How (candidate, unit) pairs are cut into submissions; a batch of several becomes one job array."""

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]] | None:
        """Submit `jobs.run_attempt` for each; returns what each submitted.json holds ("job_id" at least). None: the
        scheduler does not take jobs now, and may or may not have taken these."""

    def find(self, job: Submitted) -> dict[str, Any] | None:
        """A job submitted under that name whose id was never written down; None if there is none."""

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        """What has become of each job."""

    def cancel(self, submitted: Sequence[Submitted]) -> int | None:
        """Ask jobs to save and stop. Returns how many were asked, where that is known."""

    def clear(self) -> bool:
        """Asked when all attempts have ended, until it is true: nothing of the campaign is left in the queue."""


def for_campaign(campaign: Any) -> Cluster:
    """The cluster of the campaign's site file; this host without one."""
    path = campaign.root / "site.yaml"
    site = sites.load(path) if path.exists() else Site(scheduler="local")
    if site.scheduler == "local":
        return LocalCluster(campaign.config.jobs.max_parallel, tell=lambda job, reason: campaign.log(
            job.attempt.parent.parent.name, "elsewhere", f"{job.attempt.name}  {reason}"))
    return SlurmCluster(site, job_prefix(campaign), tell=lambda job, reason: campaign.log(job.attempt.parent.parent.name, "waits", f"{job.attempt.name}  {reason}"),
                        needless=lambda seen: ended_attempt(campaign, seen.name, seen.index, seen.id) is not None)
