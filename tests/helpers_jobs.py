"""Real supervisors and workers on small jobs: a task plug-in whose "warm start" does what a test asks of it, in the worker."""
from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from poise_hpc import config as configuration
from poise_hpc import files

HERE = str(Path(__file__).parent)
BENCHMARKS = {"easy": {"split": "easy", "problems": 4, "samples": 2, "metrics": {"acc@1": 1.0}}}


class Conduct:
    """A task without problems. `model.options["do"]` names a function of this module that makes the start model."""

    name, eos_id, pad_id, max_new_tokens, splits = "conduct", 1, 0, 4, ("easy",)

    def __init__(self, options: dict[str, Any], model_options: dict[str, Any]):
        self.options = model_options

    def train_problem(self, seed: int, index: int) -> None:
        return None

    def problems(self, split: str, purpose: str, count: int) -> list[Any]:
        return []

    def model_recipe(self) -> dict[str, Any]:
        return self.options

    def make_model(self, folder: Path, progress: Any) -> None:
        progress("make", 0, 10)
        said = globals()[self.options["do"]](folder, *self.options.get("with", []))
        (folder / "model.safetensors").write_text(json.dumps(said))

    def data_sha256(self) -> str:
        return "d" * 64


def config(do: str, *arguments: Any, **jobs: Any) -> dict[str, Any]:
    data = {"task": {"name": "helpers_jobs:Conduct"}, "model": {"options": {"do": do, "with": list(arguments)}},
            "evaluate": {"at": [1.0], "benchmarks": BENCHMARKS}, "jobs": {"heartbeat_s": 0.2, **jobs}}
    return configuration.parse(data).dump()


def write_job(attempt: Path, do: str, *arguments: Any, **limits: Any) -> Path:
    """A prepare job whose worker does `do`; `limits` over generous ones."""
    attempt.mkdir(parents=True)
    cache = attempt.parent / "cache"
    cache.mkdir(exist_ok=True)
    files.write_json(attempt / "job.json", {
        "kind": "prepare", "campaign": "", "candidate": "prepare", "seed": None, "attempt": 1, "config": config(do, *arguments),
        "ranks": 1, "threads": 1, "cache_dir": str(cache), "writable": [str(cache)],
        "limits": {"seconds": 60.0, "silent_s": 60.0, "heartbeat_s": 0.2, "memory_gb": 4.0, "isolation": "auto"} | limits})
    return attempt


def said(attempt: Path) -> Any:
    """What `do` returned."""
    (model,) = (attempt.parent / "cache" / "models").glob("*/model.safetensors")
    return json.loads(model.read_text())


# --- conducts

def nothing(folder: Path) -> str:
    return "fine"


def breaks(folder: Path) -> None:
    raise RuntimeError("no such luck")


def environment(folder: Path) -> dict[str, str]:
    return dict(os.environ)


def writes(folder: Path, *paths: str) -> list[str]:
    """Tries to write, truncate and remove each; what came of it."""
    found = []
    for path in paths:
        for act in (lambda p: open(p, "ab").close(), lambda p: os.truncate(p, 0), os.unlink):
            try:
                act(path)
                found.append("done")
            except OSError as error:
                found.append(type(error).__name__)
    return found


def connects(folder: Path, port: int) -> str:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return "connected"
    except OSError as error:
        return type(error).__name__


def spies(folder: Path, pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text()
    except OSError as error:
        return type(error).__name__


def eats(folder: Path, gigabytes: float) -> str:
    return str(len(bytearray(int(gigabytes * 2**30))))


def hangs(folder: Path) -> None:
    while True:
        time.sleep(0.05)


def exits(folder: Path, code: int) -> None:
    os._exit(code)


def segfaults(folder: Path) -> None:
    ctypes.string_at(0)


def leaves_in_c(folder: Path, turn: str) -> None:
    """An end that leaves no stack. `turn`: "candidate's", or ours."""
    from poise_hpc import inside

    with inside.candidate_code() if turn == "candidate's" else nullcontext():
        ctypes.CDLL(None)._exit(3)


def works_until_stopped(folder: Path) -> None:
    """Ticks like a training loop, and saves when asked to stop."""
    from poise_hpc import worker

    for tick in range(10**6):
        worker.progress("tick", tick, 10**6)
        if worker.stop_requested():
            raise worker.Stopped(f"after tick {tick}")
        time.sleep(0.05)


def ignores_the_stop(folder: Path) -> None:
    from poise_hpc import worker

    while True:
        worker.progress("tick", 0, 10)
        time.sleep(0.05)


def tells_its_pid(folder: Path, path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    hangs(folder)


def fills(folder: Path, path: str) -> None:
    Path(path).write_bytes(bytes(2**20))


if __name__ == "__main__":  # as a job: the supervisor
    from poise_hpc import jobs

    print(jobs.run_attempt(sys.argv[1]))
