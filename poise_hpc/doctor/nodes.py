"""What the nodes see: `probe.py` in a tiny job, and what its reports mean."""
from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from .. import files, probe
from .. import site as sites
from ..cluster.submission import clean_environment
from ..config import Config
from ..scheduler import SchedulerSilent
from ..site import Site
from .finding import Call, Finding
from .here import walls_finding
from .slurm import cure_of

SKEW_S = 5.0
SETUP = "setup-failed.txt"


def in_a_job(site: Site, config: Config, folder: Path, wait_min: float, say: Callable[[str], None], call: Call) -> list[Finding]:
    """Run the probe on two nodes (one, if the site has no more), one process each, and judge what it saw."""
    nodes = min(2, site.nodes)
    small = site.model_copy(update={"nodes": nodes, "ranks_per_node": 1})
    with tempfile.TemporaryDirectory(prefix="poise-doctor-", dir=folder) as scratch:
        where = Path(scratch)
        files.write_json(where / "asked.json", {"config": config.dump()})
        (where / "records").mkdir()
        from ..archive import rebuild

        rebuild(where)
        script = where / "probe.sh"
        script.write_text("\n".join(["#!/bin/bash", *notice_failures(site.setup, where / SETUP), *sites.setup_lines(site)[len(site.setup):],
                                     f"srun --kill-on-bad-exit=1 {sites.python_command(site)} -m poise_hpc.probe {shlex.quote(scratch)}", ""]), encoding="utf-8")
        options = sites.sbatch_options(small, "train", nodes)
        try:
            with clean_environment():  # perhaps this is a job itself
                job = call(["sbatch", "--parsable", *options, "--time=10", "--signal=USR1@0", "--job-name=poise-doctor",
                            f"--output={scratch}/log.out", str(script)]).strip().partition(";")[0]
        except SchedulerSilent as silent:
            return [Finding("fail", "job", f"sbatch refused it: {silent}", cure_of(str(silent)))]
        say(f"job {job}: two minutes once it runs; waiting up to {wait_min:g} min for the queue (ctrl-c cancels it)")
        try:
            reports = wait(where, nodes, job, wait_min, call, site.result_lag_s)
        finally:
            try:
                call(["scancel", job])
            except SchedulerSilent:
                pass  # it has ended
        if len(reports) < nodes:
            log = where / "log.out"
            seen = log.read_text(errors="replace")[-1500:] if log.exists() else "it did not start, or its files are not visible here"
            return [Finding("fail", "job", f"{len(reports)} of {nodes} nodes answered within {wait_min:g} min; {seen}",
                            "is this folder shared with the nodes, and does `setup` of the site file bring Python there?")]
        return [*judge(reports, site, probe.clock_offset_s(where)), *set_up(where)]


def notice_failures(setup: Sequence[str], path: Path) -> list[str]:
    """A site's set-up lines; those that fail are written down. The jobs' own scripts go on after them, too, and a training job may
    then fail for want of a module an hour later."""
    note = f'[ ${{#BASH_SOURCE[@]}} -gt 1 ] || printf "%s\\n" "$BASH_COMMAND" >>{shlex.quote(str(path))}'  # not of what a sourced script does inside
    return [f"trap {shlex.quote(note)} ERR", *setup, "trap - ERR"] if setup else []


def set_up(folder: Path) -> Iterator[Finding]:
    if (folder / SETUP).exists():
        failed = (folder / SETUP).read_text(errors="replace").splitlines()
        said = (folder / "log.out").read_text(errors="replace").splitlines()[:len(failed)]
        yield Finding("warn", "setup", f"failed in the job: {'; '.join(failed)} ({' | '.join(said)})", "setup of the site file: jobs go on without what these lines should bring")


def wait(folder: Path, nodes: int, job: str, wait_min: float, call: Call, lag_s: float, sleep: Callable[[float], None] = time.sleep) -> list[dict[str, Any]]:
    """The nodes' reports, as soon as all are there; fewer when the job has ended without them, `lag_s` ago, or time is up."""
    paths, over = [folder / f"node-{rank}.json" for rank in range(nodes)], 0
    for second in range(int(wait_min * 60)):
        if all(path.exists() for path in paths) or over > lag_s:
            break
        if over or second % 15 == 14:
            try:
                over += not call(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip() if not over else 1
            except SchedulerSilent as silent:
                over += "Invalid job id" in str(silent)
        sleep(1.0)
    return [report for path in paths if (report := files.read_json(path)) is not None]


def judge(reports: list[dict[str, Any]], site: Site, offset_here_s: float) -> Iterator[Finding]:
    from ..campaign import versions

    names = [r["host"] for r in reports]
    errors = lambda key: [f"{r['host']}: {r[key]['error']}" for r in reports if isinstance(r[key], dict) and "error" in r[key]]  # noqa: E731
    yield Finding("ok", "job", f"ran on {', '.join(names)}")

    def check(name: str, key: str, good: Callable[[], str | Finding], cure: str, level: Literal["warn", "fail"] = "fail") -> Finding:
        if wrong := errors(key):
            return Finding(level, name, "; ".join(wrong), cure)
        said = good()
        return said if isinstance(said, Finding) else Finding("ok", name, said)

    def same_versions() -> str | Finding:
        mine = {"python": ".".join(map(str, sys.version_info[:3])), **versions()}
        differs = sorted({f"{r['host']}: {k} {r['versions'].get(k) or 'missing'}, here {v or 'missing'}" for r in reports for k, v in mine.items() if r["versions"].get(k) != v})
        return Finding("fail", "versions", "; ".join(differs), "the same environment on nodes and login node: python, setup and container of the site file") if differs else "equal here and there"

    def clocks() -> str | Finding:
        offsets = {"here": offset_here_s} | {r["host"]: r["clock_offset_s"] for r in reports}
        said = ", ".join(f"{k} {v:+.1f} s" for k, v in offsets.items())
        apart = max(offsets.values()) - min(offsets.values())
        return Finding("warn", "clocks", f"{apart:.1f} s apart ({said} against the file server)", "tell the administrators; ages of heartbeats and locks are off by as much") if apart > SKEW_S else said

    def lag() -> str | Finding:
        worst = max(r["see_others_s"] for r in reports)
        return Finding("warn", "visibility", f"a node saw the other's file after {worst:g} s", f"result_lag_s: {round(2 * worst)} or more") if worst > site.result_lag_s else f"nodes see each other's files within {worst:g} s"

    def exclusive() -> str | Finding:
        won = sum(r["link_won"] for r in reports)
        return "one of the nodes won" if won == 1 else Finding("fail", "exclusive creation", f"{won} nodes created one file exclusively", "another file system: two jobs could claim one attempt")

    def summed() -> str | Finding:
        found = reports[0]["all_reduce"]
        if any(r["all_reduce"]["sum"] != len(reports) for r in reports):
            return Finding("fail", "all-reduce", f"the sum of {len(reports)} ones was {found['sum']}", "the nodes' network; environment: {NCCL_DEBUG: INFO}")
        return f"{found['backend']} over {len(reports)} node(s), {found['seconds']:g} s with set-up"

    def devices() -> str | Finding:
        wanted = site.gpus is not None and site.stages.train.gpu
        if wanted and not all(r["gpus"] for r in reports):
            return Finding("fail", "gpus", "torch sees none on " + ", ".join(r["host"] for r in reports if not r["gpus"]), "gpus of the site file, the driver, a torch built for CUDA")
        return ", ".join(sorted({g for r in reports for g in r["gpus"]})) or "none asked for"

    yield check("versions", "versions", same_versions, "python, setup and container of the site file")
    yield check("visibility", "see_others_s", lag, "the folder must be shared by all nodes (--folder)")
    yield check("exclusive creation", "link_won", exclusive, "a file system with hard links (--folder)")
    yield check("hdf5", "hdf5", lambda: "a file written here is readable there", "the same h5py there; HDF5_USE_FILE_LOCKING=FALSE in environment of the site file")
    yield check("clocks", "clock_offset_s", clocks, "the folder must be writable on the nodes")
    yield check("job cache", "scratch", lambda: f"{reports[0]['scratch']['path']}, {min(r['scratch']['free_gb'] for r in reports):g} GB free",
                "cache_dir of the site file: a folder on the nodes' own disk")
    yield check("model and data", "problems", lambda: "the nodes load the task's problems offline", "see the message; model.path and data must lie on shared storage")
    yield check("all-reduce", "all_reduce", summed, "environment of the site file: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME (`ip -br link` on a node)")
    yield check("gpus", "gpus", devices, "torch must load on the nodes")
    if "endpoint" in reports[0]:
        yield check("agent there", "endpoint", lambda: f"{reports[0]['endpoint']} can be reached from the nodes: the controller may be a job", level="warn",
                    cure="run the controller where there is a way to the endpoint (a login node), not by slurm/controller*.sbatch")
    yield check("isolation there", "walls", lambda: walls_finding("isolation there", {k: all(r["walls"][k] for r in reports) for k in ("network", "files")}), "")
