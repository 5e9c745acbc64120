"""The evaluation job: saved weights on benchmarks, one element per (point, benchmark).

    elements/<at>-<benchmark>.json   counts per problem; written last, so it announces the element
    elements/<at>-<benchmark>.npz    the raw completions

All candidates answer the same prompts with the same random numbers: a sample's stream is keyed by (purpose, benchmark,
problem, sample) and by nothing of the training run. Elements that an earlier attempt finished are taken over, and chunks of
an unfinished one: a killed evaluation loses one chunk at most.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import config as configuration
from .. import files, worker
from ..config import Benchmark, Config
from ..tasks.base import Grade, Problem, Task, file_sha256, load_task, weights_sha256
from ..types import CandidateError, PoiseError
from . import chunks

if TYPE_CHECKING:
    from ..rollout.base import RolloutEngine

ROWS_AT_ONCE = 1024  # completions of a chunk: computed together, and what a kill loses


def run(job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    """Evaluate job["weights"] {point: folder} on every benchmark of the config, or on the (point, benchmark) pairs of
    job["only"]. Payload: the elements' names."""
    config = configuration.parse(job["config"])
    task = load_task(config, job.get("data_sha256"))
    data_sha256 = task.data_sha256()
    folders = [Path(folder) for folder in (*job.get("resume", ()), attempt_dir)]
    out = attempt_dir / "elements"
    out.mkdir(exist_ok=True)
    (attempt_dir / "chunks").mkdir(exist_ok=True)
    pairs = job.get("only") or [[at, name] for at in job["weights"] for name in config.evaluate.benchmarks]
    names, total = [], len(pairs)
    for at, folder in job["weights"].items():
        weights, engine = "", None
        for name, benchmark in config.evaluate.benchmarks.items():
            if [at, name] not in pairs:
                continue
            weights = weights or weights_sha256(Path(folder))
            key = f"{at}-{name}"
            wanted = {"at": at, "benchmark": name, "split": benchmark.split, "n": benchmark.samples, "purpose": job["purpose"],
                      "engine": config.evaluation_engine, "temperature": benchmark.temperature, "weights_sha256": weights, "data_sha256": data_sha256}
            problems = task.problems(benchmark.split, job["purpose"], benchmark.problems)
            wanted["problem_ids"] = [p.id for p in problems]
            if not any(take_over(source / "elements", out, key, wanted) for source in folders):
                if worker.stop_requested():
                    raise worker.Stopped(f"{len(names)} of {total} elements done")
                engine = engine or load_engine(config, Path(folder))
                element(engine, task, benchmark, problems, wanted, key, folders)
            names.append(f"elements/{key}.json")
            worker.progress("evaluate", len(names), total, at=at, benchmark=name)
    return {"elements": names}


def take_over(source: Path, out: Path, key: str, wanted: dict[str, Any]) -> bool:
    """Copy a whole element of an earlier attempt that answers the same question; False if there is none."""
    try:
        found = files.read_json(source / f"{key}.json")
    except files.CorruptFile:
        return False
    raw = source / f"{key}.npz"
    if found is None or any(found.get(k) != v for k, v in wanted.items()) or not raw.is_file() or file_sha256(raw) != found["npz_sha256"]:
        return False
    if source != out:
        files.write_atomic(out / raw.name, raw.read_bytes())
        files.write_json(out / f"{key}.json", found)
    return True


def load_engine(config: Config, folder: Path) -> RolloutEngine:
    """A sampler with the weights in `folder`."""
    import torch

    model = load_model(config, folder)
    if config.evaluation_engine == "vllm":
        from ..rollout import vllm_engine

        engine = vllm_engine.engine(folder, config.model.dtype, 1, config.rollout.vllm)
        engine.load_weights(model)  # it may hold an earlier point's; and this proves that it computes what transformers does
        return engine
    from ..rollout.hf_engine import HFEngine

    return HFEngine(model.to("cuda" if torch.cuda.is_available() else "cpu"), ROWS_AT_ONCE)


def load_model(config: Config, folder: Path) -> Any:
    """Unreadable weights are ours to explain; NaN in them is the candidate's."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.model.dtype), local_files_only=True,
                                                       output_loading_info=True)
    if info["missing_keys"]:  # transformers would go on with random values
        raise PoiseError(f"the weights in {folder} lack {', '.join(sorted(info['missing_keys'])[:5])}: the snapshot is not whole")
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise CandidateError("nonfinite-weights", f"training ended with NaN or infinite values in {len(bad)} tensors, first {bad[0]}")
    return model.eval()


def element(engine: RolloutEngine, task: Task, benchmark: Benchmark, problems: Sequence[Problem], wanted: dict[str, Any], key: str,
            folders: Sequence[Path]) -> None:
    """Sample, grade and write one element. `folders`: the attempts of this unit, the present one last."""
    started, n, attempt = time.monotonic(), benchmark.samples, folders[-1]
    completions: list[list[int]] = [[] for _ in range(n * len(problems))]
    truncated = [False] * len(completions)
    parts, done = chunks.split([len(p.prompt) for p in problems], max(1, ROWS_AT_ONCE // n)), 0
    for number, indices in enumerate(parts):
        name, part = f"chunks/{key}-{number}.npz", [problems[i] for i in indices]
        question = wanted | {"problem_ids": [p.id for p in part]}
        drawn = next((found for folder in folders if (found := chunks.read(folder / name, question))), None)
        if drawn is None:
            if number and worker.stop_requested():
                raise worker.Stopped(f"{done} of {len(problems)} problems of {key} done")
            drawn = sample(engine, task, benchmark, part, wanted)
            if len(parts) > 1:
                chunks.write(attempt / name, question, drawn)
        for place, i in enumerate(indices):
            completions[i * n:(i + 1) * n] = drawn[0][place * n:(place + 1) * n]
            truncated[i * n:(i + 1) * n] = drawn[1][place * n:(place + 1) * n]
        done += len(part)
        worker.progress("evaluate", done, len(problems), at=wanted["at"], benchmark=wanted["benchmark"])
    grades = task.grade([p for p in problems for _ in range(n)], completions, truncated)
    raw = attempt / "elements" / f"{key}.npz"
    files.write_atomic(raw, pack(completions, truncated, grades))
    files.write_json(raw.with_name(f"{key}.json"), wanted | {
        **per_problem(n, completions, truncated, grades), "seconds": time.monotonic() - started, "npz_sha256": file_sha256(raw)})
    for number in range(len(parts)):
        (attempt / f"chunks/{key}-{number}.npz").unlink(missing_ok=True)


def sample(engine: RolloutEngine, task: Task, benchmark: Benchmark, problems: Sequence[Problem], wanted: dict[str, Any]) -> chunks.Drawn:
    from ..rollout.base import stream_key

    rollouts = engine.generate([p.prompt for p in problems], benchmark.samples, temperature=benchmark.temperature,
                               max_new_tokens=task.max_new_tokens, eos_id=task.eos_id, pad_id=task.pad_id,
                               keys=[stream_key("evaluate", wanted["purpose"], wanted["benchmark"], p.id) for p in problems])
    rows = zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True)
    return [row[:length] for row, length in rows], rollouts.truncated.tolist()


def per_problem(n: int, completions: Sequence[Sequence[int]], truncated: Sequence[bool], grades: Sequence[Grade]) -> dict[str, Any]:
    """Counts out of n for each problem, mean lengths in tokens, and the means of the reward's components. Row i * n + j is
    sample j of problem i."""
    def sums(values: Sequence[int]) -> list[int]:
        return [sum(values[i:i + n]) for i in range(0, len(values), n)]

    return {"correct": sums([int(g.correct) for g in grades]), "valid": sums([int(g.valid) for g in grades]),
            "truncated": sums([int(t) for t in truncated]), "mean_length": [s / n for s in sums([len(c) for c in completions])],
            "components": {name: sum(g.components[name] for g in grades) / len(grades) for name in (grades[0].components if grades else ())}}


def pack(completions: Sequence[Sequence[int]], truncated: Sequence[bool], grades: Sequence[Grade]) -> bytes:
    """Compressed npz: `tokens` of all rows in a row, `offsets` (N + 1,), and per row `truncated`, `valid`, `correct`."""
    return chunks.compress(completions, truncated, valid=np.array([g.valid for g in grades]), correct=np.array([g.correct for g in grades]))


def unpack(path: Path) -> list[list[int]]:
    """The completions of an element."""
    with np.load(path) as data:
        return chunks.decompress(data)
