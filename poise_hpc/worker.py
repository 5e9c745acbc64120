"""Inside the job: runs one attempt's work and writes `outcome.json`. Started by the supervisor (`jobs.py`).

    python -m poise_hpc.worker ATTEMPT_DIR

Only this process imports torch and candidate code. What it tells the supervisor, it tells in files:
`progress.json` (the watchdog reads its age), `outcome.json` (the end), `stack-<rank>.txt` (where it was: on SIGUSR2, a fatal signal, `os._exit`).
"""
from __future__ import annotations

import faulthandler
import fcntl
import hashlib
import importlib
import os
import posix
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from . import files
from .types import CandidateError, Outcome

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
WORK = {  # job kind -> "module:function" of (job, attempt_dir) -> payload
    "prepare": "poise_hpc.tasks.base:run_prepare",
    "check": "poise_hpc.algorithms.checks:run",
    "train": "poise_hpc.worker:train",
    "evaluate": "poise_hpc.evaluation.job:run",
    "export": "poise_hpc.export.vectors:run",
}


class Stopped(Exception):
    """Raised after work was saved because a stop was requested: the attempt is resumable."""


class StopFlag:
    """Set by the signal; read by all ranks together, between optimizer steps.

    The handler must not save: DeepSpeed's save is collective, and the signal may land inside another collective.
    """

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: Any) -> None:
        self.requested = True


_stop = StopFlag()
_attempt: Path | None = None
_last_write = 0.0
_since: tuple[str, int, int, float] = ("", 0, 0, 0.0)  # stage and total; the step and the time at which it began here


def stop_requested() -> bool:
    return _stop.requested


def progress(stage: str, step: int, total: int, **figures: float | str) -> None:
    """Say how far this process is. Cheap: at most one small file every half second, and the last step."""
    global _last_write, _since
    now = time.monotonic()
    if _since[:2] != (stage, total):
        _since = (stage, total, step, now)
    if _attempt is None or int(os.environ.get("RANK", "0")) != 0 or (now - _last_write < 0.5 and step < total):
        return
    _last_write = now
    files.write_json(_attempt / "progress.json", {"stage": stage, "step": step, "total": total, "figures": figures,
                                                  "since": {"step": _since[2], "seconds": round(now - _since[3], 3)}}, sync=False)


def main(attempt_dir: str) -> int:
    global _attempt
    _attempt = attempt = Path(attempt_dir)
    rank = int(os.environ.get("RANK", "0"))
    _stop.install()
    prepare_network()
    with open(attempt / f"stack-{rank}.txt", "w") as stack:
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
        faulthandler.enable(file=stack)
        leave = trace_exits(stack)
        job = files.read_json(attempt / "job.json")
        outcome = run(job, attempt) | {"restart": int(os.environ.get("POISE_JOB_RESTART", "0"))}
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.enable()
    # An outcome of a rank above 0 is only a cause: rank 0 speaks for the job when both exist.
    files.write_json(attempt / f"outcome-{rank}.json", outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    leave(0)  # the work is on disk; interpreter teardown of torch and gloo can only hang or crash


def trace_exits(stack: TextIO) -> Callable[[int], None]:
    """From now on `os._exit` leaves its stack behind: no `except` sees it, and the supervisor must tell whose it was.
    Returns the plain one. Of an exit from C code only `inside` tells."""
    leave, worker = os._exit, os.getpid()

    def traced(code: int) -> None:
        if os.getpid() == worker and not stack.closed:  # forked helpers end this way, too
            faulthandler.dump_traceback(stack)
        leave(code)

    os._exit = posix._exit = traced
    return leave


def prepare_network() -> None:
    """In a network namespace of its own: bring the loopback up. A lone rank also picks its rendezvous port here."""
    if os.environ.get("POISE_JOB_NETWORK") == "namespace":
        flags = struct.pack("16sh", b"lo", 1)  # ifreq with IFF_UP
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            fcntl.ioctl(s, 0x8914, flags)      # SIOCSIFFLAGS
        # No resolver in there: torch's store would warn, in every run, that it cannot name the loopback address. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if os.environ.get("MASTER_PORT") == "0":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])


def train(job: dict[str, Any], attempt: Path) -> dict[str, Any]:
    """A training run; with job["purpose"] its snapshots are evaluated by the same process, which has everything loaded."""
    from .evaluation import job as evaluation
    from .training import job as training

    payload = training.run(job, attempt)
    if "purpose" in job and int(os.environ.get("RANK", "0")) == 0:
        snapshots = {at: str(attempt / path) for at, path in payload["snapshots"].items()}
        payload |= evaluation.run(job | {"weights": job.get("weights", {}) | snapshots}, attempt)
        if "until" not in job:  # the run is over, and the last snapshot is the result
            shutil.rmtree(attempt / "checkpoints", ignore_errors=True)
    return payload


def run(job: dict[str, Any], attempt: Path) -> dict[str, Any]:
    """The job's work; every way it can end becomes an outcome with its cause."""
    module, _, function = WORK[job["kind"]].partition(":")
    try:
        payload = getattr(importlib.import_module(module), function)(job, attempt)
        payload["sha256"] = hashes(attempt, ["curves.jsonl", *payload.get("elements", ())])
        return {"outcome": Outcome.SUCCEEDED, "cause": "", "message": "", "payload": payload}
    except CandidateError as error:
        traceback.print_exc()
        return {"outcome": Outcome.CANDIDATE_ERROR, "cause": error.cause, "message": error.message, "payload": {}}
    except Stopped as stop:
        return {"outcome": Outcome.PREEMPTED, "cause": "stopped", "message": str(stop), "payload": {}}
    except BaseException as error:  # the job ends here
        traceback.print_exc()
        if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit) and raised_in(error, job.get("package")):
            return {"outcome": Outcome.CANDIDATE_ERROR, "cause": "exited", "message": f"it raised {type(error).__name__}", "payload": {}}
        cause = "disk-full" if files.full(error) else type(error).__name__
        return {"outcome": Outcome.INFRA_ERROR, "cause": cause, "message": str(error)[:2000], "payload": {}}


def hashes(attempt: Path, names: list[str]) -> dict[str, str]:
    """Of the files that the archive takes its numbers from (an element's .json holds the hash of its .npz)."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name in names if (path := attempt / name).exists()}


def raised_in(error: BaseException, package: str | None) -> bool:
    """Does it come out of candidate code? What is no Exception passes by the places that set the blame."""
    frames = traceback.extract_tb(error.__traceback__)
    return package is not None and any(os.path.dirname(f.filename) == os.path.realpath(package) for f in frames)


if __name__ == "__main__":
    # `-m` makes this module __main__; the code that calls `worker.progress` imports it by its own name.
    sys.exit(importlib.import_module("poise_hpc.worker").main(sys.argv[1]))
