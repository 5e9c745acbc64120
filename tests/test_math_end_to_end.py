"""Natural language all the way: a tiny Qwen2 with its own tokenizer, through supervisor and worker, as jobs."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_text import TEMPLATE, generated, math_options, model_folder, problem_sets, write_rows

from poise_hpc import config as configuration
from poise_hpc import data, files
from poise_hpc.algorithms import grpo
from poise_hpc.evaluation.job import unpack
from poise_hpc.evaluation.metrics import merge
from poise_hpc.jobspec import limits
from poise_hpc.tasks.base import load_task
from poise_hpc.types import Stage

SMALL = {"rollout": {"prompts": 4, "group_size": 4}, "train": {"steps": 3, "epochs": 1, "minibatches": 2, "learning_rate": 1e-2},
         "jobs": {"heartbeat_s": 1.0}}


def run_job(folder: Path, name: str, conf: configuration.Config, **spec) -> dict:
    """One attempt, as the scheduler would start it."""
    attempt = folder / name
    attempt.mkdir()
    stage = Stage(name)
    files.write_json(attempt / "job.json", {"kind": name, "config": conf.dump(), "seed": 0, "threads": 1, "resume": [],
                                            "cache_dir": str(folder / "cache"), "limits": limits(conf, stage, [])} | spec)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
    subprocess.run([sys.executable, "-c", "import sys; from poise_hpc.jobs import run_attempt; run_attempt(sys.argv[1])", str(attempt)],
                   env=env, check=True, timeout=280)
    result = files.read_json(attempt / "result.json")
    return result | {"log": (attempt / "log.out").read_text()}


def package(folder: Path) -> Path:
    (folder / "package").mkdir()
    (folder / "package" / "algorithm.py").write_text(Path(grpo.__file__).read_text())
    return folder / "package"


def through(folder: Path, conf: configuration.Config) -> tuple[dict, dict, dict]:
    prepared = run_job(folder, "prepare", conf)
    assert prepared["outcome"] == "succeeded", prepared["log"]
    given = {"package": str(package(folder)), **{k: prepared["payload"][k] for k in ("model", "data_sha256")}}
    trained = run_job(folder, "train", conf, **given)
    assert trained["outcome"] == "succeeded", trained["log"]
    weights = {at: str(folder / "train" / path) for at, path in trained["payload"]["snapshots"].items()}
    evaluated = run_job(folder, "evaluate", conf, **given, weights=weights, purpose="selection")
    assert evaluated["outcome"] == "succeeded", evaluated["log"]
    return given, trained, evaluated


def test_mathematics_from_problem_set_to_score(tmp_path):
    sets, model = problem_sets(tmp_path / "sets"), model_folder(tmp_path / "model", taught=80)
    (tmp_path / "short.txt").write_text(TEMPLATE)
    # Answers that the rules cannot compare with a number: where math-verify is installed, its processes run inside the job's walls.
    roots = [row | {"answer": r"\sqrt{" + row["answer"] + "}"} for row in generated(6, 300)]
    data.import_file("roots", write_rows(tmp_path / "roots.jsonl", roots), sets)
    options = math_options(sets, verifier="auto", template=str(tmp_path / "short.txt"), max_new_tokens=12,
                           reward={"correct": 1.0, "format": 0.1, "length": 0.5},
                           splits={"exam": {"selection": "exam"}, "roots": {"selection": "roots"}})
    conf = configuration.parse(SMALL | {
        "task": {"name": "math", "options": options}, "model": {"source": "path", "path": str(model)},
        "evaluate": {"at": [1.0], "score": "final", "benchmarks": {
            "greedy": {"split": "exam", "problems": 12, "samples": 1, "temperature": 0.0, "metrics": {"acc@1": 0.5}},
            "sampled": {"split": "roots", "problems": 6, "samples": 4, "metrics": {"pass@4": 0.5}}}}})
    given, trained, evaluated = through(tmp_path, conf)

    rows = list(files.read_lines(tmp_path / "train" / "curves.jsonl"))
    assert len(rows) == 3 and rows[0]["components"].keys() == {"correct", "format", "length", "grader_failed"}
    assert rows[0]["trained_rows"] > 0 and rows[0]["gradient_norm"] > 0
    # R = correct + 0.1 format + 0.5 length, also of the means
    c = rows[0]["components"]
    assert 0 < c["format"] <= 1
    assert rows[0]["reward"] == pytest.approx(c["correct"] + 0.1 * c["format"] + 0.5 * c["length"], abs=1e-6)

    elements = [json.loads((tmp_path / "evaluate" / name).read_text()) for name in evaluated["payload"]["elements"]]
    assert merge(elements, conf.evaluate.benchmarks)["final"] >= 0.0
    by_name = {e["benchmark"]: e for e in elements}
    assert len(by_name["greedy"]["correct"]) == 12 and by_name["sampled"]["n"] == 4
    assert all(e["data_sha256"] == given["data_sha256"] and e["components"]["grader_failed"] == 0.0 for e in elements)
    completions = unpack(tmp_path / "evaluate" / "elements" / "1-sampled.npz")
    assert len(completions) == 24 and isinstance(load_task(conf).show(completions[0]), str)

    data.import_file("exam", write_rows(tmp_path / "other.jsonl", generated(12, 9)), sets, replace=True)
    (tmp_path / "late").mkdir()
    refused = run_job(tmp_path / "late", "evaluate", conf, **given, weights={"1": str(tmp_path / "train" / "snapshots" / "step-000003")},
                      purpose="selection")
    assert refused["outcome"] == "infra_error" and "have changed since this campaign was prepared" in refused["message"]


@pytest.mark.slow
def test_logic_from_puzzle_to_score(tmp_path):
    conf = configuration.parse(SMALL | {
        "task": {"name": "logic", "options": {"max_new_tokens": 12, "max_prompt_tokens": 450, "train": [2, 2], "template": "plain-boxed",
                                              "reward": {"length": 0.5}, "splits": {"small": [2, 2], "medium": [3, 3]}}},
        "model": {"source": "path", "path": str(model_folder(tmp_path / "model"))},
        "evaluate": {"at": [0.5, 1.0], "benchmarks": {
            "small": {"split": "small", "problems": 4, "samples": 2, "metrics": {"acc@1": 0.5}},
            "medium": {"split": "medium", "problems": 4, "samples": 2, "metrics": {"pass@2": 0.5}}}}})
    _, trained, evaluated = through(tmp_path, conf)
    assert len(evaluated["payload"]["elements"]) == 4 and trained["payload"]["steps"] == 3
