"""No cluster: for benchmarks and tests of the controller."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..scheduler import News, Submitted


class InlineCluster:
    """Runs a job at once, in this process, with the given function."""

    poll_s, idle_s, on_this_host = 0.0, 0.0, True

    def __init__(self, work: Callable[[Path, dict[str, Any]], dict[str, Any]], slots: int = 8):
        self.slots, self.work = slots, work

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        return [[one] for one in wanted]

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]]:
        (attempt,) = attempts
        result = self.work(attempt, files.read_json(attempt / "job.json"))
        files.create_exclusive(attempt / "result.json", {"run_seconds": 0.0, "ranks": ranks, "host": "inline", **result})
        return [{"job_id": f"inline-{time.monotonic_ns()}", "executor": "inline"}]

    def find(self, job: Submitted) -> dict[str, Any] | None:
        return None

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        return {job.attempt: False for job in submitted}

    def cancel(self, submitted: Sequence[Submitted]) -> None:
        pass

    def clear(self) -> bool:
        return True
