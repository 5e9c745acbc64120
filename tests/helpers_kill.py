"""Real campaigns, killed with SIGKILL at seeded random moments and run again until they are done."""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from poise_hpc import files
from poise_hpc.campaign import Campaign, load_attempts
from poise_hpc.types import Outcome

TINY, SCREEN = (Path(__file__).parents[1] / "configs" / name for name in ("tiny.yaml", "tiny_screen.yaml"))
VICTIMS = ("controller", "job", "both")
LIMIT_S = 900.0  # of one life of a controller: only a hang takes so long


def start(campaign: Path, cache: Path, *options: str) -> subprocess.Popen[bytes]:
    """`poise-hpc run`, in a session of its own."""
    command = [sys.executable, "-m", "poise_hpc.cli", "run", str(campaign), "--config", str(TINY), "--cache-dir", str(cache), *options]
    with open(campaign.with_name(f"{campaign.name}.log"), "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def processes_of(folder: Path) -> list[int]:
    """Live processes whose command line names something in `folder`: controllers, launchers, supervisors, workers."""
    name, found = os.fsencode(folder), []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                arguments = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            inside = any(a == name or a.startswith(name + b"/") for a in arguments)
            if inside and files.process_start(int(entry.name)) is not None:
                found.append(int(entry.name))
    return found


def job_processes(campaign: Path, controller: int) -> list[int]:
    return [pid for pid in processes_of(campaign) if pid != controller]


def shoot(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def progress(campaign: Path) -> int:
    """How far a campaign is: results so far, and a tick for each training step that was written down."""
    results = sum(1 for _ in campaign.glob("candidates/*/attempts/*/result.json")) + (campaign / "prepare").exists()
    steps = sum(path.read_bytes().count(b"\n") for path in campaign.glob("candidates/*/attempts/*/curves.jsonl"))
    return results + steps


def killed_run(campaign: Path, cache: Path, total: int, kills: int, seed: int, options: tuple[str, ...] = (),
               say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Run the campaign to its end with `kills` kills on the way, at moments drawn from `seed`: when its progress (of
    `total`) reaches the drawn point, and a fraction of a second later. What was killed, and when."""
    draw, done = random.Random(seed), []
    points = sorted(draw.randrange(int(0.95 * total)) for _ in range(kills))
    run = start(campaign, cache, *options)
    for number, point in enumerate(points):
        victim, delay = VICTIMS[(seed + number) % len(VICTIMS)], draw.uniform(0, 1.0)
        wait(lambda: progress(campaign) >= point or run.poll() is not None, f"progress {point} of {total}")
        time.sleep(delay)
        if victim != "controller":
            wait(lambda: job_processes(campaign, run.pid) or run.poll() is not None, "a job to kill")
        jobs = by_kind(job_processes(campaign, run.pid))
        picked = [draw.choice(jobs[draw.choice(sorted(jobs))])] if victim != "controller" and jobs else []
        targets = ([run.pid] if victim != "job" else []) + picked
        if draw.random() < 0.5:
            targets.reverse()
        names = [describe(pid, run.pid) for pid in targets]
        for pid in targets:
            shoot(pid)
        done.append({"at": progress(campaign), "killed": names})
        say(f"{campaign.name}: at {done[-1]['at']} of {total}: killed {', '.join(names) or 'nothing (no job ran)'}")
        if run.pid in targets or run.poll() is not None:
            run.wait()
            run = start(campaign, cache, *options)
    code = run.wait(timeout=LIMIT_S)
    assert code == 0, f"{campaign} ended with {code}: {campaign.with_name(campaign.name + '.log').read_text()[-3000:]}"
    return done


def by_kind(pids: list[int]) -> dict[str, list[int]]:
    """Of a job's processes: all workers, all supervisors, all launchers. A worker may have helpers; each kind is hit as often."""
    found: dict[str, list[int]] = {}
    for pid in sorted(pids):
        found.setdefault(kind_of(command(pid)), []).append(pid)
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def kind_of(arguments: str) -> str:
    """The launcher runs `submitit.local._local`, the supervisor `submitit.core._submit`."""
    return "worker" if "poise_hpc.worker" in arguments else "launcher" if "submitit.local" in arguments else "supervisor"


def describe(pid: int, controller: int) -> str:
    if pid == controller:
        return "controller"
    if not (arguments := command(pid)):
        return "gone"
    kind = kind_of(arguments)
    attempt = next((part for part in arguments.replace("\0", "/").split("/") if part.startswith(("train-", "check-", "evaluate-", "prepare-"))), "")
    return f"{kind} {attempt}".strip()


def wait(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end, f"after {LIMIT_S:g} s: {what} not reached"
        time.sleep(0.02)


def left_over(campaign: Path) -> list[str]:
    """What a clean end does not leave: processes, jobs without result, half-made folders that count."""
    wait(lambda: not processes_of(campaign), "the end of every process")
    opened = Campaign.open(campaign)
    faults = [f"{a.folder} has no result" for id in opened.ids() for a in load_attempts(opened.candidates / id) if a.result is None]
    for id in opened.ids():
        won = [(a.stage, a.unit) for a in load_attempts(opened.candidates / id) if a.outcome is Outcome.SUCCEEDED]
        faults += [f"{id}: {stage} {unit} was done {won.count((stage, unit))} times" for stage, unit in set(won) if won.count((stage, unit)) > 1]
    faults += [f"{id} has no record" for id in opened.ids() if id not in opened.archived_ids()]
    faults += [f"{id} has no folder" for id in opened.archived_ids() if id not in opened.ids()]
    return faults


def differences(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[str]:
    """Between two archives (helpers_drive.archive_of): which candidate differs in what."""
    out = [f"{id}: only in one of them" for id in one.keys() ^ other.keys()]
    for id in one.keys() & other.keys():
        out += [f"{id}: {field}" for field in one[id] if one[id][field] != other[id][field]]
    return out
