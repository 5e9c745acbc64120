"""A site file: what one cluster offers and how it wants to be asked. Typed and strict (section.py).

A campaign's config says what a job *needs* (ranks, run-time limits), the site file what the cluster *has*: the same
campaign moves between clusters by another site file. `sbatch_parameters` turns both into what submitit renders.

    python -m poise_hpc.site options SITE STAGE   sbatch options, one a line: for the wrappers in slurm/
    python -m poise_hpc.site setup SITE           shell lines that a job runs first

Not covered: an account or qos per partition (write two site files), heterogeneous jobs, clusters other than Slurm.
"""
from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from . import settings
from .isolation import CACHES
from .section import Positive, Section, Tuple, validate
from .types import UsageError

Word = Annotated[str, Field(pattern=r"^\S+$")]           # one #SBATCH value: no blanks, no line ends
Other = Word | Literal[""] | None  # of one stage: other than the site's, none, or the site's
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]

# Compute nodes have no internet: without these, libraries wait for time-outs or report usage.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
           "DO_NOT_TRACK": "1"}
SECRET = {"KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "CREDENTIALS"}
RESERVE_S = 20  # of the warning time: a job that was ended because it did not end still has to say so
EARLY_S = 60  # Slurm sends the warning signal up to a minute early (sbatch(1), --signal)
# sbatch options that the site's own fields, or the framework, decide.
OWNED = {"account": "account", "array": None, "chdir": None, "constraint": "constraint", "cpus-per-task": "cpus_per_rank",
         "error": None, "exclude": "exclude", "exclusive": "exclusive", "gpus-per-node": "gpus", "gres": "gres",
         "job-name": None, "mem": "mem_gb_per_rank", "no-requeue": "requeue", "nodes": "nodes", "ntasks": "ranks_per_node",
         "ntasks-per-node": "ranks_per_node", "open-mode": None, "output": None, "partition": "partitions", "qos": "qos",
         "requeue": "requeue", "reservation": "reservation", "signal": "signal_lead_s", "time": "stages", "wckey": "wckey"}


class Gpus(Section):
    per_node: Positive                  # what a node has
    request: Literal["gpus_per_node", "gres"] = "gpus_per_node"  # older sites know only --gres=gpu:N
    type: Word | None = None            # "a100", as Slurm calls it
    device: Word | None = None          # "h100", for estimates: see planning/devices.py; None: by `type`
    memory_gb: Annotated[float, Field(gt=0)] | None = None  # GiB of one GPU; None: that device's. `poise-hpc run` refuses what cannot fit


class Use(Section):
    """What a job of one stage asks for beside its ranks. None: as the site says; "": none."""

    time_min: Positive                  # walltime; shorter jobs start earlier, and training resumes
    gpu: bool = True                    # one GPU a rank, where the site has any
    partitions: Annotated[tuple[Word, ...], Tuple] | None = None
    account: Word | None = None
    qos: Other = None
    constraint: Other = None
    reservation: Other = None
    exclusive: bool | None = None
    cpus: Positive | None = None        # of one process
    mem_gb: Annotated[float, Field(gt=0)] | None = None  # of one process


class Stages(Section):
    check: Use = Use(time_min=10, gpu=False)
    prepare: Use = Use(time_min=60)
    train: Use = Use(time_min=240)
    evaluate: Use = Use(time_min=60)
    controller: Use = Use(time_min=1440, gpu=False, constraint="", reservation="", exclusive=False, cpus=1, mem_gb=4)  # slurm/controller*.sbatch
    serve: Use = Use(time_min=480)      # slurm/vllm-server.sbatch: one process, the ranks of a whole node

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, value: Any) -> Any:
        """A stage that is given in part keeps the rest of its defaults."""
        if not isinstance(value, dict):
            return value
        defaults = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {name: defaults[name] | given if name in defaults and isinstance(given, dict) else given for name, given in value.items()}


class Site(Section):
    scheduler: Literal["slurm", "local"] = "slurm"
    partitions: Annotated[tuple[Word, ...], Tuple] = ()  # Slurm takes the one that starts first; (): its default
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None          # "a100&ib"
    exclude: Word | None = None             # "gpu[03,07]"
    reservation: Word | None = None
    wckey: Word | None = None
    exclusive: bool = False                 # whole nodes, with all their memory
    nodes: Positive = 1                     # of one training job, at most
    ranks_per_node: Positive = 1            # processes on one node, at most; with GPUs one each
    gpus: Gpus | None = None
    gres: Annotated[tuple[Word, ...], Tuple] = ()  # beside GPUs: ["lscratch:100"]
    cpus_per_rank: Positive = 1
    mem_gb_per_rank: Annotated[float, Field(gt=0)] | None = None  # None: the partition's default
    stages: Stages = Stages()
    signal_lead_s: Annotated[int, Field(ge=60)] = 180  # warning before the walltime: a training step and a checkpoint fit
    requeue: bool = True                    # after preemption or node failure Slurm starts the same job again
    max_array: Positive = 1000              # elements of one job array; `scontrol show config`: MaxArraySize - 1
    max_parallel: Positive = 16             # elements of one array that run at a time
    max_submit: Positive = 200              # jobs and array elements of a campaign in the queue
    poll_s: Annotated[int, Field(ge=1)] = 30   # between two scheduler queries for all jobs together; sites ask for 30 or more
    result_lag_s: Annotated[int, Field(ge=0)] = 60  # a file written on a node may be seen here so much later (NFS)
    python: Line | None = None              # interpreter on the compute nodes; None: the controller's own
    container: Line | None = None           # command before it: "apptainer exec --nv image.sif"
    setup: Annotated[tuple[Line, ...], Tuple] = ()     # shell: module load, source venv/bin/activate
    environment: dict[str, str] = {}        # taken literally
    cache_dir: Line = "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/poise-$SLURM_JOB_ID"  # shell, on the node: local to the job
    sbatch: dict[str, str | int | float | bool] = {}  # any other option: {"mail-type": "FAIL"}; true: no value, false: left out

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.replace("_", "a").isalnum() or name[0].isdigit():
                raise ValueError(f"{name!r} is not a variable's name")
            if SECRET & set(name.upper().split("_")):
                raise ValueError(f"{name} sounds like a secret; jobs run candidate code and never get one")
        return value

    @field_validator("sbatch")
    @classmethod
    def _extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, setting in value.items():
            if key.replace("_", "-") in OWNED:
                field = OWNED[key.replace("_", "-")]
                raise ValueError(f"{key!r} is set " + (f"by the site's '{field}'" if field else "by the pipeline itself"))
            if key.startswith("-") or not key.replace("-", "a").isalnum() or "\n" in str(setting):
                raise ValueError(f"{key!r}: an option's long name without dashes in front, and one line, was wanted")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Site:
        useless = [name for name, field in Site.model_fields.items() if name != "scheduler" and getattr(self, name) != field.default]
        if self.scheduler == "local" and useless:
            raise ValueError(f"scheduler 'local' has no use for: {', '.join(useless)}")
        if self.gpus and self.ranks_per_node > self.gpus.per_node:
            raise ValueError(f"ranks_per_node ({self.ranks_per_node}) must not exceed gpus.per_node ({self.gpus.per_node}): "
                             "a rank has a GPU of its own")
        for name in Stages.model_fields:
            time_s = 60 * getattr(self.stages, name).time_min
            if time_s <= self.signal_lead_s + EARLY_S:
                raise ValueError(f"stages.{name}.time_min: {time_s // 60} min is over before work begins, with a warning "
                                 f"signal_lead_s + {EARLY_S} s = {self.signal_lead_s + EARLY_S} s before its end")
        return self


def parse(data: Any, where: str = "site") -> Site:
    return validate(Site, data, where)


def load(path: Path) -> Site:
    """Site from a YAML file; `base: other.yaml` works as in a config."""
    return parse(settings.read(path), str(path))


def layout(site: Site, ranks: int) -> tuple[int, int]:
    """(nodes, ranks on each): as few nodes as hold `ranks`, all equally full."""
    nodes = -(-ranks // site.ranks_per_node)
    if nodes > site.nodes or ranks % nodes:
        raise UsageError(f"{ranks} ranks do not fit this site: {site.nodes} node(s) of at most {site.ranks_per_node} ranks, equally "
                         "full; change jobs.ranks in the config, or nodes and ranks_per_node in the site file")
    return nodes, ranks // nodes


def check_ranks(site: Site, ranks: int, together: int) -> None:
    """UsageError if this site has no room for a training job's ranks, or not on one node for those that hold one sampler `together`."""
    each = layout(site, ranks)[1] if site.scheduler == "slurm" else ranks
    if each % together:
        raise UsageError(f"rollout.tensor_parallel: {together} ranks of one node hold a sampler together, and this site has {each} ranks on each "
                         "node: a number that divides it was wanted, or another ranks_per_node in the site file")


def use(site: Site, stage: str) -> Use:
    if stage not in Stages.model_fields:
        raise UsageError(f"unknown stage '{stage}'; known: {', '.join(Stages.model_fields)}")
    return getattr(site.stages, stage)


def sbatch_parameters(site: Site, stage: str, ranks: int = 1, avoid: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of submitit's `SlurmExecutor.update_parameters` for a job of `stage` with `ranks` processes, on other nodes
    than `avoid`.

    The walltime is an int: submitit's signal handler calculates with it.
    """
    if site.scheduler != "slurm":
        raise UsageError("the site file says scheduler 'local': nothing is submitted to Slurm")
    asked = use(site, stage)
    nodes, tasks = layout(site, ranks)
    share = site.ranks_per_node if stage == "serve" else 1  # ranks whose resources one process gets
    partitions, exclusive = either(asked.partitions, site.partitions) or (), bool(either(asked.exclusive, site.exclusive))
    cpus = asked.cpus or site.cpus_per_rank * share
    memory_gb = tasks * (asked.mem_gb or site.mem_gb_per_rank * share) if asked.mem_gb or site.mem_gb_per_rank else None
    extra = {key.replace("_", "-"): value for key, value in site.sbatch.items() if value is not False}
    extra |= {"requeue" if site.requeue else "no-requeue": True} | ({"reservation": reservation} if (reservation := either(asked.reservation, site.reservation)) else {})
    found = {
        "partition": ",".join(partitions) or None, "account": asked.account or site.account, "qos": either(asked.qos, site.qos),
        "constraint": either(asked.constraint, site.constraint), "exclude": ",".join(filter(None, [site.exclude, *avoid])) or None, "exclusive": exclusive or None,
        "time": asked.time_min, "nodes": nodes, "ntasks_per_node": tasks, "cpus_per_task": cpus,
        "mem": _memory(memory_gb, exclusive), **_gpus(site, asked, tasks * share),
        "signal_delay_s": site.signal_lead_s, "array_parallelism": site.max_parallel, "stderr_to_stdout": True,
        "setup": setup_lines(site),
        # Since 22.05 srun no longer takes this from sbatch: the ranks of a node would share one CPU.
        # kill-on-bad-exit: when one rank's supervisor dies, the others would wait in their next collective.
        # wait: a site's own WaitTime would end rank 0, which evaluates alone, soon after the others are done.
        "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", "--wait=0"],
        "additional_parameters": extra,
    }
    # wckey even if None: submitit's default is "submitit", which sites that account by wckeys refuse.
    return {key: value for key, value in found.items() if value is not None} | {"wckey": site.wckey}


def sbatch_options(site: Site, stage: str, ranks: int = 1) -> list[str]:
    """The same as command-line options of sbatch, for the wrappers, whose batch shell gets the signal (`B:`)."""
    found = sbatch_parameters(site, stage, ranks)
    found |= found.pop("additional_parameters") | {"signal": f"B:USR1@{site.signal_lead_s}"}
    for name in ("signal_delay_s", "array_parallelism", "stderr_to_stdout", "setup", "srun_args"):
        del found[name]
    return [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
            for key, value in sorted(found.items()) if value is not None]


def setup_lines(site: Site) -> list[str]:
    """Shell lines a job runs first: the site's own, then caches, offline switches and variables."""
    return [*site.setup,
            f'export POISE_JOB_CACHE="{site.cache_dir}"',
            'mkdir -p -m 700 "$POISE_JOB_CACHE"',
            f"export POISE_JOB_GRACE_S={site.signal_lead_s - RESERVE_S}",
            f"export POISE_JOB_VARIABLES={shlex.quote(' '.join(site.environment))}",
            *(f'export {name}="$POISE_JOB_CACHE/{folder}"' for name, folder in CACHES.items()),
            *(f"export {name}={shlex.quote(value)}" for name, value in (OFFLINE | site.environment).items())]


def python_command(site: Site) -> str:
    """The interpreter on a compute node, as shell words: submitit's `SlurmExecutor(python=...)`."""
    python = shlex.quote(site.python or sys.executable)
    return f"{site.container} {python}" if site.container else python


def either(asked: Any, general: Any) -> Any:
    """A stage's own word, or the site's. "" is a word: none."""
    return general if asked is None else asked or None


def _memory(gb: float | None, exclusive: bool) -> str | None:
    """Of one node. Slurm's units are powers of two; 0 is all that the node has."""
    if gb is None:
        return "0" if exclusive else None
    return f"{round(gb * 1024)}M"


def _gpus(site: Site, asked: Use, count: int) -> dict[str, Any]:
    gres, found = list(site.gres), {}
    if site.gpus is not None and asked.gpu:
        kind = f"{site.gpus.type}:" if site.gpus.type else ""
        if site.gpus.request == "gres":
            gres.insert(0, f"gpu:{kind}{count}")
        else:
            found["gpus_per_node"] = f"{kind}{count}"
    return found | ({"gres": ",".join(gres)} if gres else {})


def main(arguments: list[str]) -> int:
    """Print options or set-up lines for the shell. Exit code 2: the site file or the call is wrong."""
    try:
        match arguments:
            case ["options", path, stage]:
                site = load(Path(path))
                print("\n".join(sbatch_options(site, stage, site.nodes * site.ranks_per_node if stage == "train" else 1)))
            case ["setup", path]:
                print("\n".join(setup_lines(load(Path(path)))))
            case ["python", path]:
                print(python_command(load(Path(path))))
            case _:
                raise UsageError("python -m poise_hpc.site options SITE STAGE | setup SITE | python SITE")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
