"""A virtual Slurm cluster for a test: its own folder and ports, nothing left behind."""
from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from poise_hpc import files

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "scripts" / "virtual_cluster.sh"
DAEMON_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=DAEMON_PATH) is None]
needs_slurm = [pytest.mark.slurm, pytest.mark.skipif(bool(missing), reason=f"Slurm is not installed here: no {', '.join(missing)}")]


class VirtualCluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        # A cluster's commands find it by SLURM_CONF; nothing else of a surrounding Slurm may leak in.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))} | {"SLURM_CONF": str(self.conf)}

    def script(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(SCRIPT), command, "--dir", str(self.folder), *options], text=True, capture_output=True, timeout=120)

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        done = subprocess.run(command, env=self.env | env, cwd=cwd or self.folder, text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def sbatch(self, *options: str, cwd: Path | None = None) -> str:
        return self.run("sbatch", "--parsable", *options, cwd=cwd)

    def state(self, job: str) -> str:
        return self.run("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T")

    def wait_for(self, job: str, *states: str) -> None:
        until(lambda: self.state(job) in states, f"job {job} is not {' or '.join(states)}")

    def node_states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()

    def pid(self, daemon: str) -> int:
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def kill(self, daemon: str, number: int) -> None:
        """Signal a daemon, and wait until it is gone."""
        os.kill(pid := self.pid(daemon), number)
        until(lambda: files.process_start(pid) is None, f"{daemon} stays")


def until(true: Callable[[], bool], otherwise: str, seconds: float = 90.0) -> None:
    """Wait; the limit is generous, for a busy machine."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"after {seconds:g} s: {otherwise}")
        time.sleep(0.2)


def processes(conf: Path) -> list[str]:
    """Command lines of everything alive that was started for this cluster, jobs included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and f"SLURM_CONF={conf}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def survivors(conf: Path, seconds: float = 10.0) -> list[str]:
    """What is alive of a stopped cluster. The kernel takes its time with what was just killed."""
    end = time.monotonic() + seconds
    while (left := processes(conf)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


@contextmanager
def virtual_cluster(nodes: int = 2, name: str = "cluster", *options: str) -> Iterator[VirtualCluster]:
    """A running cluster in a short path (sockets lie below it)."""
    parent = Path(tempfile.mkdtemp(prefix="vc-", dir="/tmp"))
    cluster = VirtualCluster(parent / name)
    try:
        started = cluster.script("start", "--nodes", str(nodes), *options)
        assert started.returncode == 0, started.stderr
        yield cluster
    finally:
        cluster.script("stop")
        left = survivors(cluster.conf)
        shutil.rmtree(parent, ignore_errors=True)
    assert not left, f"still alive after stop: {left}"
