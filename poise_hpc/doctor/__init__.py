"""`poise-hpc doctor`: would a campaign run here? Looks from this machine and, with a Slurm site file, from two nodes of a
tiny job, where `probe.py` answers. Every finding that is not ok says how to cure it.

Not covered: quotas of groups and projects, the speed of network and disks, limits of a QOS other than on jobs in the queue.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import config as configuration
from .. import probe, scheduler
from .. import site as sites
from ..config import Config
from ..site import Site
from . import here, nodes, slurm
from .finding import Call, Finding


def examine(site_file: Path | None, config_file: Path | None, folder: Path, job: bool, wait_min: float, say: Callable[[str], None],
            call: Call = scheduler.run) -> dict[str, Any]:
    """All findings. `folder` is where campaigns are to be; the job's files go into a temporary folder there."""
    site = sites.load(site_file) if site_file else Site(scheduler="local")
    config = configuration.load(config_file) if config_file else Config()
    findings = [*here.machine(config), *here.storage(folder), *here.quota(folder, call), *here.isolation_here(), *here.agent(config), *here.slots(site, config)]
    if site.scheduler == "slurm":
        scheduling = list(slurm.scheduling(site, config, call))
        findings += scheduling
        if job and not any(f.level == "fail" for f in scheduling):
            findings += nodes.in_a_job(site, config, folder, wait_min, say, call)
    elif problem := probe.answer(lambda: probe.problems(config.dump())) is not True:
        findings += [Finding("fail", "model and data", str(problem), "see the message; `poise-hpc data` imports problem sets")]
    return {"findings": [asdict(f) for f in findings], "failed": sum(f.level == "fail" for f in findings)}


def text(data: dict[str, Any]) -> str:
    lines = []
    for f in data["findings"]:
        lines.append(f"{f['level']:4}  {f['name']}: {f['text']}" + (f"\n        cure: {f['cure']}" if f["cure"] else ""))
    return "\n".join([*lines, f"{data['failed']} problem(s) to cure" if data["failed"] else "nothing stands in the way"])
