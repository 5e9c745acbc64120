"""The only home of submitit, which renders and submits. Nothing else is taken from it: its own status queries are per job,
unbounded, and latch transient states as final.

It has no public way to submit an array with our time limit, to see a script before it is submitted, or to give a job its pickle
later: some of its underscores are used here.
"""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import files, jobs
from .. import site as sites
from ..isolation import SECRET
from ..scheduler import Submitted
from ..site import Site
from ..types import PoiseError

WHICH = ("SLURM_CONF", "SLURM_CLUSTERS")  # cluster; squeue and scancel go by them, too
SBATCH_S = 120  # a scheduler that hangs: the job may exist all the same, and is found by its name then


class NotTaken(PoiseError):
    """What sbatch said when it created no job; nothing where it was killed because it hung."""


def folder(attempt: Path) -> Path:
    return attempt / "submitit"


def start(attempt: Path, ranks: int) -> subprocess.Popen[bytes]:
    """The attempt's job as a process of this host."""
    import submitit

    local = submitit.LocalExecutor(folder=folder(attempt))
    # Limits are ours (jobs.Supervisor): submitit's would end a run without asking whether it is resumable.
    local.update_parameters(timeout_min=60 * 24 * 30, tasks_per_node=ranks, stderr_to_stdout=True)
    # submitit's hides every GPU that was not asked of it by number; the supervisor takes this instead.
    os.environ[jobs.GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    with clean_environment(), deaf_to_ctrl_c():  # in an interactive job of Slurm, too, this is a process of this host
        return local.submit(jobs.run_attempt, str(attempt))._process


def executor(site: Site, attempt: Path, name: str, stage: str, ranks: int, count: int, avoid: Sequence[str] = ()) -> Any:
    """submitit's for Slurm, for an array of `count` (its own map_array makes another executor, without our time limit)."""
    import submitit

    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise PoiseError(f"{command} is not on PATH: work on a login node, load the site's Slurm module, or use a site file "
                             "with scheduler: local")
    slurm = submitit.SlurmExecutor(folder=folder(attempt), python=sites.python_command(site))
    slurm.update_parameters(job_name=name, **sites.sbatch_parameters(site, str(stage), ranks, avoid))
    if count > 1:
        slurm.parameters["map_count"] = count
    slurm._make_submission_command = lambda path: ["timeout", "--kill-after=5", str(SBATCH_S), "sbatch", str(path)]
    return slurm


def script(executor: Any) -> str:
    """The sbatch text that `hand_over` would hand over."""
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def hand_over(executor: Any) -> str:
    """Submit; the job's id."""
    import submitit

    executor.folder.mkdir(exist_ok=True)
    try:
        with clean_environment():
            return executor._submit_command(executor._submitit_command_str).job_id
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise NotTaken(" ".join(str(error).split())) from None


def complete(job: Submitted, id: str) -> None:
    """Of a job whose submitter was killed after sbatch: it waits a minute for its pickle, then fails."""
    intents = {path.parent: files.read_json(path) for path in job.attempt.parent.glob("*/intent.json")} if job.index else {}
    first = next((a for a, intent in intents.items() if (intent["name"], intent["index"]) == (job.name, 0)), job.attempt)
    put_pickle(first, job.attempt, id)


def put_pickle(first: Path, attempt: Path, id: str) -> None:
    """What job `id` is to run. An array's lie with its first attempt."""
    import submitit

    paths = submitit.core.utils.JobPaths(folder(first), id)
    if not paths.submitted_pickle.exists():
        delayed = submitit.core.utils.DelayedSubmission(jobs.run_attempt, str(attempt))
        delayed.set_timeout(60 * 24 * 30, 1)  # our supervisor answers the signals, not submitit's handler
        temporary = paths.submitted_pickle.with_suffix(".tmp")
        delayed.dump(temporary)
        os.replace(temporary, paths.submitted_pickle)


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """A terminal interrupts everything that was started in it, and submitit's launcher then kills the job within a second. What is
    started in here inherits a blocked SIGINT; this process gets its own afterwards, and asks the jobs to save (`stop_on_signal`)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class without_secrets:
    """submitit passes the controller's whole environment on; a key must not reach a job, whatever executor it is."""

    def __enter__(self) -> None:
        self.hidden = {k: os.environ.pop(k) for k in list(os.environ) if self.hides(k, SECRET)}

    def hides(self, name: str, secret: tuple[str, ...]) -> bool:
        return any(word in name.upper() for word in secret)

    def __exit__(self, *error: object) -> None:
        os.environ.update(self.hidden)


class clean_environment(without_secrets):
    """A controller that is itself a job must not hand its own allocation on: sbatch would mix it into the new job's."""

    def hides(self, name: str, secret: tuple[str, ...]) -> bool:
        inherited = name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")) and name not in WHICH
        return inherited or super().hides(name, secret)
