"""One algorithm package without a campaign: check it here, in a job's isolation."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from . import files, jobs
from .config import Config
from .jobspec import limits
from .types import Outcome, Stage


def check(folder: Path) -> dict[str, Any]:
    """The static gate and the contract checks; `{"outcome", "cause", "message", "checks": [...]}`."""
    with tempfile.TemporaryDirectory(prefix="poise-check-") as scratch:
        attempt, config = Path(scratch), Config()
        files.write_json(attempt / "job.json", {
            "kind": str(Stage.CHECK), "package": os.path.abspath(folder), "config": config.dump(), "threads": 1, "ranks": 1,
            "limits": limits(config, Stage.CHECK, [])})
        # Also inside a Slurm allocation, whose variables would make this one rank of many.
        jobs.run_attempt(str(attempt), jobs.Place(0, 1, 0, f"pid-{os.getpid()}", 0, None))
        result = files.read_json(attempt / "result.json")
        listed = files.read_json(attempt / "checks.json") or {}
        return {"package": str(folder), "outcome": result["outcome"], "cause": result["cause"], "message": result["message"],
                "walls": result["walls"], **listed}


def dry_run(campaign: Path, config_file: Path | None, site_file: Path | None) -> dict[str, Any]:
    """What each stage's submission looks like: the exact sbatch text, or the local command. Creates nothing."""
    from . import config as configuration
    from . import jobspec
    from . import site as sites
    from .cluster import SlurmCluster

    exists = (campaign / "campaign.json").exists()
    config = configuration.load(config_file) if config_file else configuration.load(campaign / "config.yaml") if exists else Config()
    kept = campaign / "site.yaml"
    site = sites.load(site_file) if site_file else sites.load(kept) if kept.exists() else sites.Site(scheduler="local")
    scripts = {}
    for stage in (Stage.PREPARE, Stage.CHECK, Stage.TRAIN, Stage.EVALUATE):
        units = jobspec.units(config, stage)
        attempt = Path(os.path.abspath(campaign)) / "candidates" / "cNNNN" / "attempts" / jobspec.attempt_name(stage, (units or [""])[0], 1)
        if site.scheduler == "local":
            scripts[str(stage)] = f"# on this host: {jobspec.ranks(config, stage)} process(es) of jobs.run_attempt({str(attempt)!r})"
        elif units:
            with tempfile.TemporaryDirectory() as scratch:  # submitit makes the folder that it is told
                text = SlurmCluster(site, "poise-").script(Path(scratch), f"poise-{attempt.name}", stage, jobspec.ranks(config, stage))
                scripts[str(stage)] = text.replace(scratch, str(attempt))
    return {"campaign": str(campaign), "scripts": scripts}


def dry_run_text(data: dict[str, Any]) -> str:
    return "\n".join(f"### {stage}\n{text}" for stage, text in data["scripts"].items())


def check_text(data: dict[str, Any]) -> str:
    lines = [f"{'pass' if c['passed'] else 'FAIL'}  {c['name']}" + (f": {c['message']}" if c["message"] else "")
             for c in data.get("checks", [])]
    if data["outcome"] != Outcome.SUCCEEDED and not any(not c["passed"] for c in data.get("checks", [])):
        lines.append(f"{data['cause']}: {data['message']}")
    lines.append("passes: it may enter a campaign" if data["outcome"] == Outcome.SUCCEEDED else f"fails ({data['cause']})")
    return "\n".join(lines)
