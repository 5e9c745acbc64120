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
        jobs.run_attempt(str(attempt))
        result = files.read_json(attempt / "result.json")
        listed = files.read_json(attempt / "checks.json") or {}
        return {"package": str(folder), "outcome": result["outcome"], "cause": result["cause"], "message": result["message"],
                "walls": result["walls"], **listed}


def check_text(data: dict[str, Any]) -> str:
    lines = [f"{'pass' if c['passed'] else 'FAIL'}  {c['name']}" + (f": {c['message']}" if c["message"] else "")
             for c in data.get("checks", [])]
    if data["outcome"] != Outcome.SUCCEEDED and not any(not c["passed"] for c in data.get("checks", [])):
        lines.append(f"{data['cause']}: {data['message']}")
    lines.append("passes: it may enter a campaign" if data["outcome"] == Outcome.SUCCEEDED else f"fails ({data['cause']})")
    return "\n".join(lines)
