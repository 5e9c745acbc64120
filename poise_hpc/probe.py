"""The doctor's eyes on the compute nodes: one process a node, under srun. Writes FOLDER/node-<rank>.json; judges nothing.

    python -m poise_hpc.probe FOLDER

Every question is answered on its own: a node where torch does not load can still tell about its files.
"""
from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import files, isolation, jobs

PATIENCE_S = 90.0  # for the other nodes' files: NFS may show them a minute late


def main(folder: Path) -> int:
    me = jobs.place()
    asked = files.read_json(folder / "asked.json") or {}
    report: dict[str, Any] = {"rank": me.rank, "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "login_file": bool(asked)}
    for name, question in {
        "versions": versions, "clock_offset_s": lambda: clock_offset_s(folder), "see_others_s": lambda: see_others_s(folder, me),
        "link_won": lambda: files.create_exclusive(folder / "contested.json", {"rank": me.rank}), "hdf5": lambda: hdf5(folder),
        "scratch": scratch, "walls": walls, "problems": lambda: problems(asked["config"]), "gpus": gpus, "all_reduce": lambda: all_reduce(me),
    }.items():
        report[name] = answer(question)
    if asked["config"]["search"]["proposer"] == "llm":
        report["endpoint"] = answer(lambda: endpoint(asked["config"]["agent"]))
    if me.local_rank == 0:
        jobs.remove_caches(os.environ.get("POISE_JOB_CACHE", ""))
    files.write_json(folder / f"node-{me.rank}.json", report)
    return 0


def answer(question: Callable[[], Any]) -> Any:
    """The answer, or {"error"}: whatever goes wrong on a node is a finding."""
    try:
        return question()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def versions() -> dict[str, str]:
    from .campaign import versions as packages

    return {"python": ".".join(map(str, sys.version_info[:3])), **packages()}


def clock_offset_s(folder: Path) -> float:
    """This host's clock minus the file server's."""
    path = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    before = time.time()
    path.write_text("x")
    offset = (before + time.time()) / 2 - path.stat().st_mtime
    path.unlink()
    return round(offset, 3)


def see_others_s(folder: Path, me: jobs.Place) -> float:
    """Seconds until the files of all other ranks could be read here."""
    files.write_json(folder / f"hello-{me.rank}.json", {"time": time.time()})
    begun = time.monotonic()
    for rank in range(me.ranks):
        while files.read_json(folder / f"hello-{rank}.json") is None:
            if time.monotonic() - begun > PATIENCE_S:
                raise TimeoutError(f"rank {rank}'s file did not show within {PATIENCE_S:g} s")
            time.sleep(0.1)
    return round(time.monotonic() - begun, 1)


def hdf5(folder: Path) -> bool:
    from .archive import check_index

    check_index(folder)
    return True


def scratch() -> dict[str, Any]:
    path = Path(os.environ["POISE_JOB_CACHE"])
    path.mkdir(parents=True, exist_ok=True, mode=0o700)  # the batch script makes it on the first node only
    (path / "probe").write_text("x")
    free_gb = round(shutil.disk_usage(path).free / 1e9, 1)
    (path / "probe").unlink()
    return {"path": str(path), "free_gb": free_gb}


def walls() -> dict[str, bool]:
    return {"network": bool(isolation.network_prefix(1)), "files": isolation.landlock_abi() >= 1}


def problems(config: dict[str, Any]) -> bool:
    """Model folder and every benchmark's problems, as the prepare job would want them."""
    from .config import parse
    from .tasks.base import load_task, weights_sha256

    parsed = parse(config)
    task = load_task(parsed)
    if parsed.model.source == "path":
        weights_sha256(Path(parsed.model.path or ""))
    for benchmark in parsed.evaluate.benchmarks.values():
        task.problems(benchmark.split, parsed.evaluate.purpose, benchmark.problems)
    return True


def endpoint(agent: dict[str, Any]) -> str:
    """The LLM endpoint's host takes connections from here. Nothing is asked: no key is on a node."""
    from urllib.parse import urlsplit

    path = agent["base_url_file"]
    url = urlsplit(Path(path).expanduser().read_text().strip() if path else agent["base_url"])
    place = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    socket.create_connection(place, timeout=10).close()
    return f"{place[0]}:{place[1]}"


def gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def all_reduce(me: jobs.Place) -> dict[str, Any]:
    """Sum of ones over the nodes, on the device that training uses."""
    import torch
    from torch import distributed

    cuda, begun = torch.cuda.is_available(), time.monotonic()
    distributed.init_process_group("nccl" if cuda else "gloo", init_method=f"tcp://{me.nodes[0] if me.nodes else '127.0.0.1'}:{jobs.port_of(me)}",
                                   rank=me.rank, world_size=me.ranks, timeout=timedelta(seconds=120))
    one = torch.ones(1, device="cuda" if cuda else "cpu")
    distributed.all_reduce(one)
    total = int(one.item())
    distributed.destroy_process_group()
    return {"sum": total, "backend": "nccl" if cuda else "gloo", "seconds": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
