"""`poise-hpc doctor`: would a campaign run here? Looks from this machine and, with a Slurm site file, from two nodes of a
tiny job, where `probe.py` answers. Every finding that is not ok says how to cure it.

Not covered: quotas of groups and projects, the speed of network and disks, limits of a QOS other than on jobs in the queue.
"""
from __future__ import annotations

import getpass
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from . import config as configuration
from . import files, probe, scheduler
from . import site as sites
from .cluster import clean_environment
from .config import Config
from .scheduler import SchedulerSilent
from .site import Site
from .types import PoiseError

FREE_GB, FREE_INODES = 20, 100_000  # a campaign of 100 small candidates; weights of large models come on top
SKEW_S = 5.0
STAGES = ("check", "prepare", "train", "evaluate", "controller", "serve")
GRACE_S = 60  # a training step and a checkpoint of a model of some size
LINKS = 3  # jobs that a chain of controllers has in the queue beside those of its campaign, and one to spare
Call = Callable[[list[str]], str]


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    cure: str = ""


def examine(site_file: Path | None, config_file: Path | None, folder: Path, job: bool, wait_min: float, say: Callable[[str], None],
            call: Call = scheduler.run) -> dict[str, Any]:
    """All findings. `folder` is where campaigns are to be; the job's files go into a temporary folder there."""
    site = sites.load(site_file) if site_file else Site(scheduler="local")
    config = configuration.load(config_file) if config_file else Config()
    findings = [*machine(config), *storage(folder), *quota(folder, call), *isolation_here(), *agent(config)]
    if site.scheduler == "slurm":
        slurm = list(scheduling(site, config, call))
        findings += slurm
        if job and not any(f.level == "fail" for f in slurm):
            findings += in_a_job(site, config, folder, wait_min, say, call)
    elif problem := probe.answer(lambda: probe.problems(config.dump())) is not True:
        findings += [Finding("fail", "model and data", str(problem), "see the message; `poise-hpc data` imports problem sets")]
    return {"findings": [asdict(f) for f in findings], "failed": sum(f.level == "fail" for f in findings)}


def text(data: dict[str, Any]) -> str:
    lines = []
    for f in data["findings"]:
        lines.append(f"{f['level']:4}  {f['name']}: {f['text']}" + (f"\n        cure: {f['cure']}" if f["cure"] else ""))
    return "\n".join([*lines, f"{data['failed']} problem(s) to cure" if data["failed"] else "nothing stands in the way"])


# --- this machine


def machine(config: Config) -> Iterator[Finding]:
    from .campaign import versions
    from .rollout.base import wants_vllm

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
    from . import llm

    wanted = {m for models in config.agent.models.values() for m in models}
    try:
        served = set(llm.served_models(config.agent))
    except PoiseError as error:
        yield Finding("fail", "agent", str(error), "check agent.base_url, the key and this machine's way to the internet")
        return
    if missing := sorted(wanted - served):
        yield Finding("warn", "agent", f"the endpoint does not list {', '.join(missing)}; it lists {', '.join(sorted(served)[:10])}", "correct agent.models")
    else:
        yield Finding("ok", "agent", f"the endpoint answers and serves {', '.join(sorted(wanted))}")


# --- the scheduler, from here


def scheduling(site: Site, config: Config, call: Call) -> Iterator[Finding]:
    missing = [name for name in ("sbatch", "squeue", "scancel", "scontrol", "srun") if shutil.which(name) is None]
    if missing:
        yield Finding("fail", "slurm", f"not on PATH: {', '.join(missing)}", "work on a login node, or load the site's Slurm module")
        return
    try:
        facts = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", call(["scontrol", "show", "config"]), re.MULTILINE))
        partitions = {p["PartitionName"]: p for p in map(_pairs, call(["scontrol", "--oneliner", "show", "partition"]).splitlines()) if "PartitionName" in p}
    except SchedulerSilent as silent:
        yield Finding("fail", "slurm", str(silent), "is slurmctld up? `scontrol ping`; a private cluster needs SLURM_CONF")
        return
    yield Finding("ok", "slurm", f"version {facts.get('SLURM_VERSION', '?')}, as {getpass.getuser()}; partitions {', '.join(sorted(partitions))}")
    yield from limits(site, facts)
    for stage in STAGES:
        for finding in (*partition(site, stage, partitions), *accepted(site, config, stage, call)):
            # Nothing of a campaign waits for the server: it matters to who starts one.
            yield replace(finding, level="warn") if stage == "serve" and finding.level == "fail" else finding
    yield accounting(call)
    yield from submit_limit(site, call)


def limits(site: Site, facts: dict[str, str]) -> Iterator[Finding]:
    array = int(facts.get("MaxArraySize", "1001"))
    if site.max_array >= array:
        yield Finding("fail", "arrays", f"max_array is {site.max_array}, the cluster's MaxArraySize {array}", f"max_array: {array - 1}")
    if (jobs := int(facts.get("MaxJobCount", "10000"))) < site.max_submit:
        yield Finding("fail", "jobs", f"max_submit is {site.max_submit}, the cluster's MaxJobCount {jobs}", f"max_submit: {jobs // 10}")
    if site.requeue and facts.get("JobRequeue") == "0":
        yield Finding("warn", "requeue", "JobRequeue is 0 here; the site file asks for --requeue, which overrules it where the site permits", "requeue: false, if jobs are refused")
    user_signal = "preempt_send_user_signal" in facts.get("SlurmctldParameters", "") + facts.get("PreemptParameters", "")
    if facts.get("PreemptMode", "OFF") != "OFF" and not user_signal:
        yield Finding("warn", "preemption", "preempted jobs get no warning signal but TERM, and KillWait "
                      f"{facts.get('KillWait', '?')} to save", "training then falls back to its last checkpoint: keep train.checkpoint_every small")


def partition(site: Site, stage: str, partitions: dict[str, dict[str, str]]) -> Iterator[Finding]:
    use = sites.use(site, stage)
    default = tuple(n for n, p in partitions.items() if p.get("Default") == "YES")
    for name in (site.partitions if use.partitions is None else use.partitions) or default:
        found = partitions.get(name)
        if found is None:
            yield Finding("fail", f"{stage}: partition", f"there is no {name}; there are {', '.join(sorted(partitions))}", f"correct partitions or stages.{stage}.partitions")
            continue
        if found.get("State") != "UP":
            yield Finding("warn", f"{stage}: partition", f"{name} is {found.get('State')}", "jobs wait until it is UP; name another one as well")
        longest = minutes(found.get("MaxTime", "UNLIMITED"))
        if longest is not None and use.time_min > longest:
            yield Finding("fail", f"{stage}: partition", f"{name} allows {longest} min, time_min is {use.time_min}", f"stages.{stage}.time_min: {longest}; training resumes by itself")
        nodes = found.get("MaxNodes", "UNLIMITED")
        if stage == "train" and nodes.isdigit() and site.nodes > int(nodes):
            yield Finding("fail", "train: partition", f"{name} allows {nodes} nodes a job, the site file says {site.nodes}", f"nodes: {nodes}")
        if found.get("PreemptMode", "OFF") not in ("OFF", "SUSPEND") and stage == "train" and (grace := int(found.get("GraceTime", "0"))) < GRACE_S:
            yield Finding("warn", "train: partition", f"{name} is preemptable with a GraceTime of {grace} s: little time to save at preemption",
                          "keep train.checkpoint_every small")


def accepted(site: Site, config: Config, stage: str, call: Call) -> Iterator[Finding]:
    """What Slurm itself says to a job of this stage: account, qos, resources. Nothing is submitted."""
    try:
        options = sites.sbatch_options(site, stage, config.jobs.ranks if stage == "train" else 1)
        with clean_environment():
            call(["sbatch", "--test-only", *options, "--wrap=true"])
    except (SchedulerSilent, PoiseError) as error:
        said = str(error)
        yield Finding("fail", f"{stage}: accepted", said, cure_of(said))
    else:
        yield Finding("ok", f"{stage}: accepted", f"sbatch would take it: {' '.join(o for o in options if o.startswith(('--partition', '--nodes', '--ntasks', '--time')))}")


def cure_of(said: str) -> str:
    for pattern, cure in (("partition", "partitions: `sinfo` lists them"), ("account", "account: `sacctmgr show assoc user=$USER` lists yours"),
                          ("qos", "qos: `sacctmgr show assoc user=$USER format=account,qos`"), ("gres|gpu", "gpus: {request: gres}, or another type"),
                          ("memory", "mem_gb_per_rank: `sinfo -o '%P %m'` shows what nodes have"), ("ranks do not fit", ""),
                          ("node count|node configuration|not available", "nodes, ranks_per_node, cpus_per_rank: `sinfo -o '%P %D %c %m %G'`"),
                          ("time limit", "stages.*.time_min"), ("wckey", "wckey: name yours")):
        if re.search(pattern, said, re.IGNORECASE):
            return cure
    return "correct the site file"


def accounting(call: Call) -> Finding:
    try:
        call(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID", "--jobs=1"])
    except SchedulerSilent as silent:
        return Finding("warn", "accounting", f"{silent}: why a job vanished cannot be told", "nothing is lost: results are read from files")
    return Finding("ok", "accounting", "sacct answers")


def submit_limit(site: Site, call: Call) -> Iterator[Finding]:
    """How many jobs the account's associations and the QOS allow in the queue."""
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    try:
        lines = call([*show, "assoc", f"user={getpass.getuser()}", "format=Account,MaxSubmit"]).splitlines()
        allowed = [limit for account, _, limit in (line.partition("|") for line in lines) if site.account in (None, account)]
        for qos in sorted({q for stage in STAGES if (q := sites.either(sites.use(site, stage).qos, site.qos))}):
            allowed += call([*show, "qos", qos, "format=MaxSubmitPU,MaxSubmitPA,GrpSubmit"]).replace("|", "\n").split()
    except SchedulerSilent:
        return  # no accounting: no such limits
    found = [int(n) for n in allowed if n.isdigit()]
    if found and min(found) < site.max_submit + LINKS:
        yield Finding("warn", "jobs", f"you may have {min(found)} jobs in the queue, max_submit is {site.max_submit}",
                      f"max_submit: {max(min(found) - LINKS, 1)}, which leaves room for the controller's own; until then refused submissions are repeated later")


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


def minutes(limit: str) -> int | None:
    """Slurm's [days-]hours:minutes:seconds; None: without limit."""
    if limit in ("UNLIMITED", "INFINITE", "NONE"):
        return None
    days, _, clock = limit.rpartition("-")
    hours, mins, _ = (int(part) for part in clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + mins


def _pairs(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


# --- inside a job


def in_a_job(site: Site, config: Config, folder: Path, wait_min: float, say: Callable[[str], None], call: Call) -> list[Finding]:
    """Run the probe on two nodes (one, if the site has no more), one process each, and judge what it saw."""
    nodes = min(2, site.nodes)
    small = site.model_copy(update={"nodes": nodes, "ranks_per_node": 1})
    with tempfile.TemporaryDirectory(prefix="poise-doctor-", dir=folder) as scratch:
        where = Path(scratch)
        files.write_json(where / "asked.json", {"config": config.dump()})
        (where / "records").mkdir()
        from .archive import rebuild

        rebuild(where)
        script = where / "probe.sh"
        script.write_text("\n".join(["#!/bin/bash", *sites.setup_lines(site),
                                     f"srun --kill-on-bad-exit=1 {sites.python_command(site)} -m poise_hpc.probe {sites.shlex.quote(scratch)}", ""]))
        options = sites.sbatch_options(small, "train", nodes)
        try:
            with clean_environment():  # perhaps this is a job itself
                job = call(["sbatch", "--parsable", *options, "--time=10", "--signal=USR1@0", "--job-name=poise-doctor",
                            f"--output={scratch}/log.out", str(script)]).strip().partition(";")[0]
        except SchedulerSilent as silent:
            return [Finding("fail", "job", f"sbatch refused it: {silent}", cure_of(str(silent)))]
        say(f"job {job}: two minutes once it runs; waiting up to {wait_min:g} min for the queue (ctrl-c cancels it)")
        try:
            reports = wait(where, nodes, job, wait_min, call)
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
        return list(judge(reports, site, probe.clock_offset_s(where)))


def wait(folder: Path, nodes: int, job: str, wait_min: float, call: Call, sleep: Callable[[float], None] = time.sleep) -> list[dict[str, Any]]:
    """The nodes' reports, as soon as all are there; fewer when the job has ended without them or time is up."""
    paths, over = [folder / f"node-{rank}.json" for rank in range(nodes)], 0
    for second in range(int(wait_min * 60)):
        if all(path.exists() for path in paths) or over > 60:
            break
        if over or second % 15 == 14:
            try:
                over += not call(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip() if not over else 1
            except SchedulerSilent as silent:
                over += "Invalid job id" in str(silent)
        sleep(1.0)
    return [report for path in paths if (report := files.read_json(path)) is not None]


def judge(reports: list[dict[str, Any]], site: Site, offset_here_s: float) -> Iterator[Finding]:
    from .campaign import versions

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
