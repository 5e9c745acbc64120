"""What Slurm says, asked from here: partitions, limits, and whether it would take each stage's jobs. Nothing is submitted."""
from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace

from .. import site as sites
from ..cluster.submission import clean_environment
from ..config import Config
from ..scheduler import SchedulerSilent
from ..site import Site
from ..types import PoiseError
from .finding import Call, Finding

STAGES = ("check", "prepare", "train", "evaluate", "controller", "serve")
GRACE_S = 60  # a training step and a checkpoint of a model of some size
LINKS = 3  # jobs that a chain of controllers has in the queue beside those of its campaign, and one to spare


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
                          ("node count|node configuration|not available", "nodes, ranks_per_node, cpus_per_rank, mem_gb_per_rank, gpus: no node has as much; `sinfo -o '%P %D %c %m %G'`"),
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


def minutes(limit: str) -> int | None:
    """Slurm's [days-]hours:minutes:seconds; None: without limit."""
    if limit in ("UNLIMITED", "INFINITE", "NONE"):
        return None
    days, _, clock = limit.rpartition("-")
    hours, mins, _ = (int(part) for part in clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + mins


def _pairs(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
