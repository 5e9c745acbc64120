"""One algorithm package without a campaign: check it here, train it, evaluate weights; in a job's isolation.

    python -m poise_hpc.standalone train PACKAGE --out DIR [--config FILE] [--seed N] [--cache-dir DIR]
    python -m poise_hpc.standalone evaluate WEIGHTS --out DIR [--config FILE] [--cache-dir DIR]

The same program on every rank of a job (slurm/train.sbatch, slurm/evaluate.sbatch), or one process by hand. Each start is
an attempt below DIR that resumes from the earlier ones; DIR/train.json or DIR/scores.json is the end. Exit codes: 0 done,
75 saved after a stop signal and to be repeated, 1 failed, 2 wrong call.

Not covered: two jobs at a time with one DIR.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import config as configuration
from . import files, jobs, packages
from .algorithms.load import DECLARE
from .config import Config
from .jobspec import limits
from .settings import overlay
from .types import Outcome, PoiseError, Stage, UsageError

AGAIN = 75  # EX_TEMPFAIL


def check(folder: Path) -> dict[str, Any]:
    """The static gate, the contract checks, and whether `add` would take its proposal.json; `{"outcome", "cause", "message", "checks": [...]}`.
    A single file is an algorithm.py."""
    with packages.folder_of(folder) as package, tempfile.TemporaryDirectory(prefix="poise-check-") as scratch:
        result = alone(Stage.CHECK, package, Path(scratch))
        listed = files.read_json(Path(scratch) / "checks.json") or {}
        data = {"package": str(folder), "outcome": result["outcome"], "cause": result["cause"], "message": result["message"],
                "walls": result["walls"], **listed}
        if (package / "proposal.json").exists():
            fault = _fault_of_proposal(package)
            data["checks"] = [*data.get("checks", []), {"name": "proposal.json", "passed": not fault, "message": fault, "seconds": 0.0}]
            if fault and data["outcome"] == Outcome.SUCCEEDED:
                data |= {"outcome": str(Outcome.CANDIDATE_ERROR), "cause": "proposal", "message": fault}
        return data


def _fault_of_proposal(package: Path) -> str:
    """Why `add` would not take its proposal.json; "" if it would."""
    try:
        packages.read_proposal(packages.stated(package), package)
    except UsageError as error:
        return str(error)
    return ""


def alone(kind: str, folder: Path, attempt: Path, **more: Any) -> dict[str, Any]:
    """The result of a job on one package, within a check's limits, run here and now."""
    config = Config()
    files.write_json(attempt / "job.json", {
        "kind": str(kind), "package": os.path.abspath(folder), "config": config.dump(), "threads": 1, "ranks": 1,
        "limits": limits(config, Stage.CHECK, []), **more})
    # Also inside a Slurm allocation, whose variables would make this one rank of many.
    jobs.run_attempt(str(attempt), jobs.Place(0, 1, 0, f"pid-{os.getpid()}", 0))
    result = files.read_json(attempt / "result.json")
    if result["outcome"] == Outcome.PREEMPTED:
        raise PoiseError(f"{folder}: the {kind} was interrupted and says nothing about it. Give the same command again")
    return result


def submissions(root: Path, config: Config, site_file: Path | None, keeper: Path) -> dict[str, Any]:
    """What each stage's submission of a campaign at `root`, there or not, looks like: the exact sbatch text, or the local command.
    Without a site file that of the campaign `keeper` holds. Creates nothing."""
    from . import jobspec
    from .campaign import Campaign
    from . import site as sites
    from .cluster.slurm import SlurmCluster

    kept = keeper / "site.yaml"
    site = sites.load(site_file) if site_file else sites.load(kept) if kept.exists() else sites.Site(scheduler="local")
    scripts = {}
    for stage in (Stage.PREPARE, Stage.CHECK, Stage.TRAIN, Stage.EVALUATE):
        units = jobspec.units(config, stage)
        if not units:  # the training job evaluates
            continue
        owner = jobspec.HOME if stage is Stage.PREPARE else "cNNNN"
        folder = Path(os.path.abspath(root)) / (owner if stage is Stage.PREPARE else f"candidates/{owner}")
        attempt = folder / "attempts" / jobspec.attempt_name(stage, units[0], 1)
        if site.scheduler == "local":
            scripts[str(stage)] = f"# on this host: {jobspec.ranks(config, stage)} process(es) of jobs.run_attempt({str(attempt)!r})"
        else:
            prefix = jobspec.job_prefix(Campaign.open(root)) if (root / "campaign.json").exists() else f"poise-{jobspec.label(root)}-CREATED-"
            scripts[str(stage)] = SlurmCluster(site, prefix).script(attempt, f"{prefix}{owner}-{attempt.name}", stage, jobspec.ranks(config, stage),
                                                                    min(len(units), site.max_array))
    return {"campaign": str(root), "scripts": scripts}


def dry_run_text(data: dict[str, Any]) -> str:
    return "\n".join(f"### {stage}\n{text}" for stage, text in data["scripts"].items())


def check_text(data: dict[str, Any]) -> str:
    names: dict[str, list[str]] = {}  # of the checks that hit one and the same fault, under its message
    for c in data.get("checks", []):
        names.setdefault(c["message"] or c["name"], []).append(c["name"])
    lines = [f"pass  {c['name']}" if c["passed"] else f"FAIL  {', '.join(names.pop(c['message']))}: {c['message']}"
             for c in data.get("checks", []) if c["passed"] or c["message"] in names]
    if data["outcome"] != Outcome.SUCCEEDED and not any(not c["passed"] for c in data.get("checks", [])):
        lines.append(f"{data['cause']}: {data['message']}")
    if data.get("switchable") == []:
        lines.append(f"hint: it has no mechanism that can be switched off, so `poise-hpc ablate` will have nothing to do; {DECLARE}")
    lines.append({Outcome.SUCCEEDED: "passes: it may enter a campaign", Outcome.CANDIDATE_ERROR: f"fails ({data['cause']})"}.get(
        data["outcome"], f"not checked ({data['cause']}): that is this machine's fault, not the package's"))
    return "\n".join(lines)


# --- train and evaluate: one process a rank


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m poise_hpc.standalone", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "evaluate"))
    parser.add_argument("source", type=Path, help="train: an algorithm package, or the name of a seed; evaluate: a folder with weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="YAML; defaults are the base lab")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, default=Path(os.environ.get("POISE_CACHE_DIR", Path.home() / ".cache" / "poise_hpc")))
    given, me = parser.parse_args(arguments), jobs.place()
    # Until a supervisor listens there is nothing to save. Ranks above 0 never speak for the job.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(AGAIN if me.rank == 0 else 0))
    try:
        if me.rank > 0:
            return _follow(given.out, me) if given.what == "train" else 0
        return _lead(given, me)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PoiseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _lead(given: argparse.Namespace, me: jobs.Place) -> int:
    """Rank 0: write down what is to be done, do it, say how it ended."""
    config = configuration.load(given.config) if given.config else Config()
    config = configuration.parse(overlay(config.dump(), {"jobs": {"ranks": me.ranks if given.what == "train" else 1}}))
    out = Path(os.path.abspath(given.out))
    earlier = sorted((out / "attempts").glob(f"{given.what}-s{given.seed}-*"), key=lambda p: p.stat().st_mtime)
    cache = os.path.abspath(given.cache_dir)
    prepared = _attempt(out / "attempts" / f"prepare-{time.time_ns()}", jobs.Place(0, 1, 0, me.job_id, 0), {
        **_common(config, Stage.PREPARE, 1), "cache_dir": cache, "writable": [cache]})
    if prepared["outcome"] != Outcome.SUCCEEDED:
        return _end(prepared)
    spec = {**_common(config, Stage(given.what), me.ranks), "model": prepared["payload"]["model"], "data_sha256": prepared["payload"]["data_sha256"],
            "seed": given.seed, "resume": [str(path) for path in earlier]}
    if given.what == "train":
        spec["package"] = str(_package(given.source, out))
    else:
        spec |= {"weights": {"1": os.path.abspath(given.source)}, "purpose": config.evaluate.purpose}
    attempt = out / "attempts" / f"{given.what}-s{given.seed}-{time.time_ns()}"
    attempt.mkdir(parents=True)
    files.write_json(out / f"job-{me.job_id}-{me.restart}.json", {"attempt": str(attempt), "spec": spec})  # the other ranks wait for it
    result = _attempt(attempt, me if given.what == "train" else jobs.Place(0, 1, 0, me.job_id, 0), spec)
    if result["outcome"] == Outcome.SUCCEEDED:
        _finish(given.what, out, attempt, config, result["payload"])
    return _end(result)


def _follow(out: Path, me: jobs.Place) -> int:
    """A rank above 0. While rank 0 prepares the model this waits; if rank 0 dies, srun ends it (--kill-on-bad-exit)."""
    while (told := files.read_json(out / f"job-{me.job_id}-{me.restart}.json")) is None:
        time.sleep(0.2)
    jobs.run_attempt(told["attempt"], me)
    return 0


def _attempt(attempt: Path, me: jobs.Place, spec: dict[str, Any]) -> dict[str, Any]:
    attempt.mkdir(parents=True, exist_ok=True)
    files.write_json(attempt / "job.json", spec)
    said = jobs.run_attempt(str(attempt), me)
    result = files.read_json(attempt / "result.json")
    if result is None:  # the scheduler started this job elsewhere
        raise PoiseError(f"{attempt}: {said}")
    return result | {"attempt": str(attempt)}


def _common(config: Config, stage: Stage, ranks: int) -> dict[str, Any]:
    return {"kind": str(stage), "config": config.dump(), "ranks": ranks, "threads": config.jobs.threads, "attempt": 1,
            "campaign": "", "candidate": "", "limits": limits(config, stage, [])}


def _package(source: Path, out: Path) -> Path:
    """The package's folder; a seed's name becomes one."""
    from .algorithms.seeds import SEEDS
    from .algorithms.seeds import source as code

    if (source / "algorithm.py").is_file():
        return source.absolute()
    if str(source) not in SEEDS:
        raise UsageError(f"{source} holds no algorithm.py, and no seed has that name; seeds: {', '.join(SEEDS)}")
    folder = out / "package"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "algorithm.py", code(str(source)))
    return folder


def _finish(what: str, out: Path, attempt: Path, config: Config, payload: dict[str, Any]) -> None:
    if what == "train":
        files.write_json(out / "train.json", payload | {"attempt": str(attempt), "weights": {at: str(attempt / p) for at, p in payload["snapshots"].items()}})
        print(f"trained {payload['steps']} steps; weights: {attempt / payload['snapshots'][f'{1.0:g}']}")
        return
    from .evaluation import metrics

    scores = metrics.merge([files.read_json(attempt / name) for name in payload["elements"]], config.evaluate.benchmarks)["points"]["1"]
    files.write_json(out / "scores.json", scores | {"attempt": str(attempt)})
    print("\n".join(f"{name:24} {value:6.2f}" for name, value in {"overall": scores["overall"], **scores["benchmarks"]}.items()))


def _end(result: dict[str, Any]) -> int:
    if result["outcome"] == Outcome.SUCCEEDED:
        return 0
    print(f"{result['outcome']}: {result['cause']}: {result['message']}\nlog: {result['attempt']}/log.out", file=sys.stderr)
    return AGAIN if result["outcome"] == Outcome.PREEMPTED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
