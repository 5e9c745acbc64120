"""The evaluation job: saved weights on benchmarks, one element per (point, benchmark), or one chunk of one (parts.py).

    elements/<at>-<benchmark>.json        counts per problem; written last, so it announces the element
    elements/<at>-<benchmark>.npz         the raw completions
    elements/<at>-<benchmark>@<k>.json    of chunk k alone, with its .npz: the controller puts the element together

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
from . import chunks, parts
from .parts import Chunk

if TYPE_CHECKING:
    from ..rollout.base import RolloutEngine


def run(job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    """Evaluate job["weights"] {point: folder} on every benchmark of the config, or what job["only"] names: (point, benchmark)
    pairs, or with a third, one chunk of it. Payload: the names of what was written."""
    config = configuration.parse(job["config"])
    task = load_task(config, job.get("data_sha256"))
    data_sha256 = task.data_sha256()
    folders = [Path(folder) for folder in (*job.get("resume", ()), attempt_dir)]
    out = attempt_dir / "elements"
    out.mkdir(exist_ok=True)
    (attempt_dir / "chunks").mkdir(exist_ok=True)
    asked = job.get("only") or [[at, name] for at in job["weights"] for name in config.evaluate.benchmarks]
    names: list[str] = []
    loaded, engine, hashed = "", None, {}
    for at, name, *only in asked:
        folder, benchmark = job["weights"][at], config.evaluate.benchmarks[name]
        hashed[folder] = hashed.get(folder) or weights_sha256(Path(folder))
        wanted = {"at": at, "benchmark": name, "split": benchmark.split, "n": benchmark.samples, "purpose": job["purpose"],
                  "engine": config.evaluation_engine, "temperature": benchmark.temperature, "weights_sha256": hashed[folder], "data_sha256": data_sha256}
        problems = task.problems(benchmark.split, job["purpose"], benchmark.problems)
        cut = parts.cut([len(p.prompt) for p in problems], benchmark.samples, config.evaluate.chunk_completions)
        if only:
            wanted |= {"of": len(cut), "places": sorted(cut[only[0]].problems), "first": cut[only[0]].first, "samples": cut[only[0]].n}
            cut = [cut[only[0]]]
        wanted["problem_ids"] = [problems[place].id for place in wanted.get("places", range(len(problems)))]
        key = parts.CUT.join([f"{at}-{name}", *map(str, only)])
        if not any(take_over(source / "elements", out, key, wanted) for source in folders):
            if worker.stop_requested():
                raise worker.Stopped(f"{len(names)} of {len(asked)} elements done")
            if engine is None or loaded != folder:
                loaded, engine = folder, load_engine(config, Path(folder))
            element(engine, task, benchmark, problems, cut, wanted, key, folders)
        names.append(f"elements/{key}.json")
        worker.progress("evaluate", len(names), len(asked), at=at, benchmark=name)
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

    return HFEngine(model.to("cuda" if torch.cuda.is_available() else "cpu"), config.evaluate.chunk_completions)


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


def element(engine: RolloutEngine, task: Task, benchmark: Benchmark, problems: Sequence[Problem], cut: Sequence[Chunk], wanted: dict[str, Any],
            key: str, folders: Sequence[Path]) -> None:
    """Sample, grade and write these chunks: an element, or its part. `folders`: the attempts of this unit, the present one last."""
    started, samples, attempt = time.monotonic(), benchmark.samples, folders[-1]
    drawn: dict[int, tuple[list[int], bool]] = {}  # row of the element -> completion, and was it truncated
    total = sum(len(chunk.problems) * chunk.n for chunk in cut)
    for number, chunk in enumerate(cut):
        name = f"chunks/{key}-{number}.npz"
        question = wanted | {"problem_ids": [problems[i].id for i in chunk.problems], "first": chunk.first, "samples": chunk.n}
        found = next((found for folder in folders if (found := chunks.read(folder / name, question))), None)
        if found is None:
            if number and worker.stop_requested():
                raise worker.Stopped(f"{len(drawn)} of {total} completions of {key} done")
            found = sample(engine, task, benchmark, problems, chunk, wanted)
            if len(cut) > 1:
                chunks.write(attempt / name, question, found)
        drawn |= zip(chunk.rows(samples), zip(*found, strict=True), strict=True)
        worker.progress("evaluate", len(drawn), total, at=wanted["at"], benchmark=wanted["benchmark"])
    rows = sorted(drawn)
    completions, truncated = [drawn[row][0] for row in rows], [drawn[row][1] for row in rows]
    grades = task.grade([problems[row // samples] for row in rows], completions, truncated)
    n = total // len(wanted["problem_ids"])
    counts = count(n, completions, truncated, grades)
    raw = attempt / "elements" / f"{key}.npz"
    files.write_atomic(raw, pack(completions, truncated, grades))
    files.write_json(raw.with_name(f"{key}.json"), wanted | (counts if "of" in wanted else parts.figures(counts, n)) | {
        "seconds": time.monotonic() - started, "npz_sha256": file_sha256(raw)})
    for number in range(len(cut)):
        (attempt / f"chunks/{key}-{number}.npz").unlink(missing_ok=True)


def sample(engine: RolloutEngine, task: Task, benchmark: Benchmark, problems: Sequence[Problem], chunk: Chunk, wanted: dict[str, Any]) -> chunks.Drawn:
    from ..rollout.base import stream_key

    asked = [problems[i] for i in chunk.problems]
    rollouts = engine.generate([p.prompt for p in asked], chunk.n, temperature=benchmark.temperature,
                               max_new_tokens=task.max_new_tokens, eos_id=task.eos_id, pad_id=task.pad_id,
                               keys=[stream_key("evaluate", wanted["purpose"], wanted["benchmark"], p.id) for p in asked], first=chunk.first)
    rows = zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True)
    return [row[:length] for row, length in rows], rollouts.truncated.tolist()


def count(n: int, completions: Sequence[Sequence[int]], truncated: Sequence[bool], grades: Sequence[Grade]) -> dict[str, Any]:
    """For each problem the sums over its n completions, and the exact sums of the reward's components. Row i * n + j is sample j of
    problem i."""
    def sums(values: Sequence[int]) -> list[int]:
        return [sum(values[i:i + n]) for i in range(0, len(values), n)]

    return {"correct": sums([int(g.correct) for g in grades]), "valid": sums([int(g.valid) for g in grades]),
            "truncated": sums([int(t) for t in truncated]), "length": sums([len(c) for c in completions]),
            "components": {name: parts.total(g.components[name] for g in grades) for name in grades[0].components}}


def pack(completions: Sequence[Sequence[int]], truncated: Sequence[bool], grades: Sequence[Grade]) -> bytes:
    """Compressed npz: `tokens` of all rows in a row, `offsets` (N + 1,), and per row `truncated`, `valid`, `correct`."""
    return chunks.compress(completions, truncated, valid=np.array([g.valid for g in grades]), correct=np.array([g.correct for g in grades]))


def unpack(path: Path) -> list[list[int]]:
    """The completions of an element."""
    with np.load(path) as data:
        return chunks.decompress(data)
