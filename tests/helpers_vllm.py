"""What the tests on vLLM share. One vLLM engine fits into a process, so each test runs a script of its own:

    run("conform", FOLDER, KIND)            the conformance check
    run("self_check", FOLDER)               the self-check, with broken syncs
    run("group", FOLDER)                    how much of its prompt each completion of a group found computed
    run("parallel", FOLDER, ranks=2)        one engine over two ranks
    run("train", ATTEMPT..., ranks=N)       training jobs with their evaluations, as a worker does them
"""
from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install 'poise_hpc[vllm]' (several GB)")


def run(*arguments: object, ranks: int = 1) -> str:
    """Output of the script, run by `ranks` processes together."""
    from helpers_training import free_port, rendezvous

    port, environment = free_port(), os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS)}
    started = [subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=environment | rendezvous(rank, ranks, port),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(ranks)]
    outputs = [process.communicate(timeout=1200)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    return outputs[0]


def model(kind: str = "qwen2", vocab: int = 16) -> Any:
    """vLLM's attention on a CPU wants heads of a multiple of 32."""
    from helpers_models import tiny_model

    return tiny_model(kind, vocab=vocab, hidden=128, layers=1)


def _engine(folder: str, kind: str = "qwen2", **settings: Any) -> tuple[Any, Any]:
    from poise_hpc.rollout import vllm_engine

    made = model(kind)
    made.save_pretrained(folder)
    return vllm_engine.engine(Path(folder), "float32", **settings), made


def conform(folder: str, kind: str) -> None:
    from poise_hpc.rollout import conformance

    engine, made = _engine(folder, kind)
    engine.can_rest = True  # on a CPU the worker keeps its memory, but engine and scheduler go through sleep and wake
    conformance.check(engine, made)
    print("conforms")


def self_check(folder: str) -> None:
    """A sync that loads nothing, and one that loses a tensor."""
    import torch

    from poise_hpc.rollout import vllm_engine
    from poise_hpc.types import PoiseError

    engine, made = _engine(folder)
    engine.load_weights(made)
    real, whole = engine.llm.collective_rpc, vllm_engine.each_weight
    engine.llm.collective_rpc = lambda *a, **k: None
    with torch.no_grad():
        made.lm_head.weight.add_(1e-4 * torch.randn_like(made.lm_head.weight))  # too little to disagree visibly
    for expected in ("still samples from the old weights", "disagree after the weight sync"):
        try:
            engine.load_weights(made)
        except PoiseError as error:
            assert expected in str(error), error
        else:
            raise AssertionError(f"not noticed: {expected}")
        engine.llm.collective_rpc = real
        vllm_engine.each_weight = lambda m, w: ((n, p) for n, p in whole(m, w) if "mlp" not in n)
        with torch.no_grad():
            made.model.layers[0].mlp.up_proj.weight.mul_(-1)
    vllm_engine.each_weight = whole
    engine.load_weights(made)  # and a whole sync cures it
    print("noticed")


def group(folder: str) -> None:
    """Two prompts of 40 tokens, in cache blocks of 32 (on a CPU they are of 128)."""
    engine, made = _engine(folder, options={"block_size": 32})
    engine.load_weights(made)
    real, cached = engine.llm.generate, []

    def generate(*args: Any, **kwargs: Any) -> Any:
        outputs = real(*args, **kwargs)
        cached.extend(out.num_cached_tokens for out in outputs)
        return outputs

    engine.llm.generate = generate
    engine.generate([list(range(2, 12)) * 4, list(range(3, 13)) * 4], 4, temperature=1.0, keys=[1, 2], max_new_tokens=6, eos_id=1, pad_id=0)
    print(json.dumps(cached))


def parallel(folder: str) -> None:
    """Two ranks that hold one engine: what one process draws, and each rank gets its own part."""
    import torch

    from poise_hpc.rollout import vllm_engine
    from poise_hpc.training import engine as training

    ranks = training.start()
    made = model("qwen2")
    if ranks.rank == 0:
        made.save_pretrained(folder)
    torch.distributed.barrier()
    engine = vllm_engine.engine(Path(folder), "float32", tensor_parallel=ranks.world)
    engine.load_weights(made)
    prompts, keys = [[2, 3, 4], [5, 6, 7, 8, 2], [3, 3]], [1, 2, 3]
    mine = slice(0, 2) if ranks.rank == 0 else slice(2, 3)
    if ranks.world == 1:
        mine = slice(0, 3)
    drawn = engine.generate(prompts[mine], 4, temperature=0.7, keys=keys[mine], max_new_tokens=6, eos_id=1, pad_id=0)
    parts = ranks.gather([drawn.tokens[i, :n].tolist() for i, n in enumerate(drawn.length.tolist())])
    nothing = engine.generate([], 4, temperature=0.7, keys=[], max_new_tokens=6, eos_id=1, pad_id=0) if ranks.rank else \
        engine.generate(prompts[:1], 4, temperature=0.7, keys=keys[:1], max_new_tokens=6, eos_id=1, pad_id=0)
    assert len(nothing.tokens) == (0 if ranks.rank else 4)
    if ranks.rank == 0:
        print(json.dumps({"drawn": [row for part in parts for row in part]}))
    torch.distributed.barrier()


def train(*attempts: str) -> None:
    """Training jobs and the evaluations of their snapshots, one after another; they share the process's engine. An attempt
    named "stopped" is asked to stop in its third step."""
    from poise_hpc import worker
    from poise_hpc.training import engine, loop

    real = loop.Trainer.step

    def step(self: Any, number: int) -> Any:
        worker._stop.requested = number == 2 and folder.name == "stopped"
        return real(self, number)

    loop.Trainer.step, engine.start = step, functools.cache(engine.start)
    for folder in map(Path, attempts):
        try:
            payload = worker.train(json.loads((folder / "job.json").read_text()), folder)
        except worker.Stopped as stopped:
            payload = {"stopped": str(stopped)}
        if os.environ["RANK"] == "0":
            (folder / "payload.json").write_text(json.dumps(payload))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    {"conform": conform, "self_check": self_check, "group": group, "parallel": parallel, "train": train}[what](*rest)
    sys.stdout.flush()
    os._exit(0)  # as a worker ends: vLLM's teardown has nothing to add
