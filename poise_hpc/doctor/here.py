"""What the doctor sees from this machine, with or without Slurm."""
from __future__ import annotations

import getpass
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import files, probe
from ..config import Config
from ..scheduler import SchedulerSilent
from ..site import Site
from ..types import PoiseError, UsageError
from .finding import Call, Finding

FREE_GB, FREE_INODES = 20, 100_000  # a campaign of 100 small candidates; weights of large models come on top


def machine(config: Config) -> Iterator[Finding]:
    from ..campaign import versions
    from ..rollout.base import wants_vllm

    found = versions()
    missing = [name for name, version in found.items() if not version and (name != "vllm" or wants_vllm(config))]
    if missing:
        package = "'poise_hpc[vllm]'" if "vllm" in missing else "poise-hpc"
        yield Finding("fail", "packages", f"not installed here: {', '.join(missing)}", f"pip install {package} in this Python environment")
    else:
        yield Finding("ok", "packages", f"Python {sys.version.split()[0]}, " + ", ".join(f"{k} {v}" for k, v in found.items() if v))


def storage(folder: Path) -> Iterator[Finding]:
    """The primitives that exactly-once rests on, and room."""
    try:
        with tempfile.TemporaryDirectory(prefix=".poise-doctor-", dir=folder) as scratch:
            path = Path(scratch) / "x"
            files.write_json(path, {"a": 1})
            first, second = files.create_exclusive(path.with_name("y"), {}), files.create_exclusive(path.with_name("y"), {})
    except OSError as error:
        yield Finding("fail", "storage", f"{folder}: {error.strerror or error}", "give a folder on shared storage where you may write, with hard links (--folder)")
        return
    if not first or second:
        yield Finding("fail", "storage", f"{folder}: exclusive creation does not hold", "use another file system: two jobs could claim one attempt")
        return
    room = os.statvfs(folder)
    free_gb, inodes = room.f_bavail * room.f_frsize / 1e9, room.f_favail
    low = free_gb < FREE_GB or 0 < room.f_files and inodes < FREE_INODES
    yield Finding("warn" if low else "ok", "storage", f"{folder} ({filesystem(folder)}): rename and exclusive creation work; {free_gb:.0f} GB and "
                  f"{inodes} inodes free", f"{FREE_GB} GB and {FREE_INODES} inodes are little enough: make room, or take another folder" if low else "")


def filesystem(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Its type, as the mount table says."""
    table = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    path = os.path.realpath(folder)
    return max(((point, kind) for point, kind in table if os.path.commonpath([path, point]) == point), key=lambda m: len(m[0]), default=("", "unknown"))[1]


def quota(folder: Path, call: Call) -> Iterator[Finding]:
    """What the file system's own command says: statvfs does not know of a user's quota."""
    user, kind = getpass.getuser(), filesystem(folder)
    command = {"lustre": ["lfs", "quota", "-q", "-u", user, str(folder)], "gpfs": ["mmlsquota", "-u", user, "--block-size", "G"]}.get(kind, ["quota", "-w", "-u", user])
    if shutil.which(command[0]) is None:
        return
    try:
        said = " ".join(call(command).split())
    except SchedulerSilent as silent:  # quota(1) ends with 1 where a limit is exceeded
        said = str(silent)
    if said:
        over = "*" in said  # all three mark with it what is over its limit
        yield Finding("warn" if over else "ok", "quota", f"`{' '.join(command)}`: {said[:300]}", "make room before jobs fail at their checkpoints" if over else "")


def isolation_here() -> Iterator[Finding]:
    yield walls_finding("isolation here", probe.walls())


def walls_finding(name: str, walls: dict[str, bool]) -> Finding:
    if all(walls.values()):
        return Finding("ok", name, "network namespace and Landlock are available")
    lacks = [what for key, what in (("network", "user + network namespaces"), ("files", "Landlock")) if not walls[key]]
    return Finding("warn", name, f"no {' and no '.join(lacks)}: candidate code runs with fewer walls, as each record says",
                   "ask for kernel.unprivileged_userns_clone=1, or Linux 5.13 or newer; or review candidates before they run")


def agent(config: Config) -> Iterator[Finding]:
    if config.search.proposer != "llm":
        return
    from .. import llm

    if config.agent.unlimited:
        yield Finding("warn", "budget", config.agent.unlimited, "agent.budget_tokens, or agent.budget_cost with agent.prices")
    wanted = {m for models in config.agent.models.values() for m in models}
    try:
        served = set(llm.served_models(config.agent))
    except UsageError as error:  # the key: the endpoint was not asked
        yield Finding("fail", "agent", str(error), "put the key alone on one line of the file that agent.api_key_file names, and `chmod 600` it; or "
                      "export the variable that agent.api_key_env names where campaigns are driven")
        return
    except PoiseError as error:
        yield Finding("fail", "agent", str(error), "check agent.base_url (it ends in /v1), the key and this machine's way to the internet")
        return
    if missing := sorted(wanted - served):
        yield Finding("warn", "agent", f"the endpoint does not list {', '.join(missing)}; it lists {', '.join(sorted(served)[:10])}", "correct agent.models")
    else:
        yield Finding("ok", "agent", f"the endpoint answers and serves {', '.join(sorted(wanted))}")


def slots(site: Site, config: Config) -> Iterator[Finding]:
    """In order, a campaign does not use more of a cluster than its window, and a config that says nothing has a narrow one."""
    search, wide = config.search, site.max_submit if site.scheduler == "slurm" else config.jobs.max_parallel
    jobs = search.width(wide) * len(search.train_seeds)
    if search.window is None and not search.asynchronous and jobs < 2 * wide:
        yield Finding("warn", "slots", f"{search.width(wide)} candidates with {len(search.train_seeds)} seeds are in flight at most, and a slot waits for the "
                      f"slowest of them; {wide} jobs may run at once", "search.asynchronous: true (the search then depends on which job ends "
                      "first), or a wider search.window (on older evidence), in a new campaign")
