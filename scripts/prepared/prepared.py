"""Work that takes no time, or as long as the file `seconds` says: the files and the payload of a finished job are copied from a
folder beside this file."""
from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

VARIANTS = 8  # of a training job's results, so that scores differ


def folder(job: dict[str, Any]) -> Path:
    variant = f"-{int(job['candidate'][1:]) % VARIANTS}" if job["kind"] == "train" else ""
    return Path(__file__).parent / f"{job['kind']}{variant}"


def work(job: dict[str, Any], attempt: Path) -> dict[str, Any]:
    ready = folder(job)
    if job["kind"] == "train":
        time.sleep(float((ready.parent / "seconds").read_text()))
    shutil.copytree(ready / "files", attempt, dirs_exist_ok=True)
    return json.loads((ready / "payload.json").read_text())
