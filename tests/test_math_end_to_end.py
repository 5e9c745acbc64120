"""Natural language all the way: a tiny Qwen2 with its own tokenizer, through supervisor and worker, as jobs."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers_text import TEMPLATE, math_options, model_folder, parities, write_rows
from safetensors.torch import load_file

from poise_hpc import config as configuration
from poise_hpc import data, files
from poise_hpc.algorithms import seeds
from poise_hpc.evaluation.job import unpack
from poise_hpc.evaluation.metrics import merge
from poise_hpc.jobspec import limits
from poise_hpc.settings import overlay
from poise_hpc.tasks.base import load_task
from poise_hpc.types import Stage

SMALL = {"rollout": {"prompts": 4, "group_size": 4}, "train": {"steps": 3, "epochs": 1, "minibatches": 2, "learning_rate": 1e-2},
         "jobs": {"heartbeat_s": 1.0}}

# GRPO, and in the first step a request to stop, as Slurm sends it before the walltime.
PREEMPTED = """
import os, signal
from dataclasses import dataclass
from poise_hpc.algorithms.grpo import GRPO

@dataclass(frozen=True)
class Preempted(GRPO):
    def advantages(self, rollouts, state):
        if rollouts.step == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().advantages(rollouts, state)

ALGORITHM = Preempted()
"""


def run_job(folder: Path, name: str, conf: configuration.Config, attempt: str | None = None, **spec) -> dict:
    """One attempt, as the scheduler would start it: a supervisor for each rank."""
    path, stage = folder / (attempt or name), Stage(name)
    path.mkdir(parents=True)
    files.write_json(path / "job.json", {"kind": name, "config": conf.dump(), "seed": 0, "threads": 1, "resume": [],
                                         "cache_dir": str(folder / "cache"), "limits": limits(conf, stage, [])} | spec)
    ranks = conf.jobs.ranks if stage is Stage.TRAIN else 1
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
    running = [subprocess.Popen(
        [sys.executable, "-c", "import sys; from poise_hpc.jobs import run_attempt; run_attempt(sys.argv[1])", str(path)],
        env=env | {"SUBMITIT_LOCAL_NTASKS": str(ranks), "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_GLOBALID": str(rank),
                   "SUBMITIT_LOCAL_LOCALID": str(rank)}) for rank in range(ranks)]
    assert [process.wait(timeout=280) for process in running] == [0] * ranks
    return files.read_json(path / "result.json") | {"log": (path / "log.out").read_text()}


def package(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "algorithm.py").write_text(text)
    return str(folder)


def succeeded(result: dict) -> dict:
    assert result["outcome"] == "succeeded", result["log"]
    return result["payload"]


def weights_of(attempt: Path, payload: dict) -> dict[str, str]:
    return {at: str(attempt / path) for at, path in payload["snapshots"].items()}


@dataclass(frozen=True)
class Course:
    """A campaign's first jobs, with its problem sets and its model: what training starts from."""

    folder: Path
    config: dict
    given: dict

    def with_(self, stage: int, ranks: int) -> configuration.Config:
        return configuration.parse(overlay(self.config, {"train": {"zero_stage": stage}, "jobs": {"ranks": ranks}}))

    def first_step(self, stage: int, ranks: int) -> tuple[dict, dict[str, torch.Tensor], Path]:
        """Train until the request to stop: the curves' row, the gradient of the one update, and the attempt."""
        attempt = self.folder / f"zero{stage}x{ranks}"
        result = run_job(self.folder, "train", self.with_(stage, ranks), attempt.name, **self.given)
        assert result["outcome"] == "preempted" and "after step 1 of 3" in result["message"], result["log"]
        checkpoint, gradient = attempt / "checkpoints" / "step-000001", {}
        for part in sorted((checkpoint / "engine").glob("*.safetensors")):
            # AdamW's first moment after one update is 0.1 g
            gradient |= {name: 10 * value for name, value in load_file(part).items() if name.endswith("/exp_avg")}
        return files.read_json(checkpoint / "trainer.json")["rows"][0], gradient, attempt


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Course:
    folder = tmp_path_factory.mktemp("mathematics")
    sets, model = folder / "sets", model_folder(folder / "model", taught=40, problems=parities)
    (folder / "short.txt").write_text(TEMPLATE)
    # Answers that the rules cannot compare with a number: where math-verify is installed, its processes run inside the job's walls.
    roots = [row | {"answer": r"\sqrt{" + row["answer"] + "}"} for row in parities(6, 300)]
    for name, rows in (("drill", [row for level in range(1, 6) for row in parities(20, level, level)]), ("exam", parities(12, 100)), ("roots", roots)):
        data.import_file(name, write_rows(folder / f"{name}.jsonl", rows), sets)
    options = math_options(sets, verifier="auto", template=str(folder / "short.txt"), max_new_tokens=12,
                           reward={"correct": 1.0, "format": 0.1, "length": 0.5},
                           splits={"exam": {"selection": "exam"}, "roots": {"selection": "roots"}})
    config = overlay(SMALL, {
        "task": {"name": "math", "options": options}, "model": {"source": "path", "path": str(model)}, "train": {"minibatches": 1},
        "evaluate": {"at": [1.0], "score": "final", "benchmarks": {
            "greedy": {"split": "exam", "problems": 12, "samples": 1, "temperature": 0.0, "metrics": {"acc@1": 0.5}},
            "sampled": {"split": "roots", "problems": 6, "samples": 4, "metrics": {"pass@4": 0.5}}}}})
    prepared = succeeded(run_job(folder, "prepare", configuration.parse(config)))
    return Course(folder, config, {"package": package(folder / "package", PREEMPTED), **{k: prepared[k] for k in ("model", "data_sha256")}})


@pytest.fixture(scope="module")
def plain(course) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """The first step with ZeRO-0 on one rank, against which the others are held."""
    return course.first_step(0, 1)


@pytest.fixture(scope="module")
def scored(course, plain) -> Path:
    """The plain run taken up again and finished, and an evaluation job of its weights."""
    conf = course.with_(0, 1)
    trained = succeeded(run_job(course.folder, "train", conf, "finished", **course.given, resume=[str(plain[2])]))
    evaluated = run_job(course.folder, "evaluate", conf, **course.given, weights=weights_of(course.folder / "finished", trained), purpose="selection")
    assert succeeded(evaluated)["elements"] == ["elements/1-greedy.json", "elements/1-sampled.json"]
    return course.folder / "evaluate"


def test_mathematics_from_problem_set_to_score(course, plain, scored):
    rows = list(files.read_lines(course.folder / "finished" / "curves.jsonl"))
    assert len(rows) == 3 and rows[0] == plain[0] and rows[0]["components"].keys() == {"correct", "format", "length", "grader_failed"}
    assert rows[0]["trained_rows"] > 0 and rows[0]["gradient_norm"] > 0
    # R = correct + 0.1 format + 0.5 length, also of the means
    c = rows[0]["components"]
    assert 0 < c["correct"] < 1 and 0 < c["format"] <= 1
    assert rows[0]["reward"] == pytest.approx(c["correct"] + 0.1 * c["format"] + 0.5 * c["length"], abs=1e-6)

    conf = course.with_(0, 1)
    elements = [json.loads(path.read_text()) for path in sorted((scored / "elements").glob("*.json"))]
    by_name = {e["benchmark"]: e for e in elements}
    right, found = by_name["greedy"]["correct"], by_name["sampled"]["correct"]
    assert len(right) == 12 and len(found) == 6 and by_name["sampled"]["n"] == 4 and 0 < sum(right) < 12
    assert merge(elements, conf.evaluate.benchmarks)["final"] == pytest.approx(50 * sum(right) / 12 + 50 * sum(n > 0 for n in found) / 6)
    assert all(e["data_sha256"] == course.given["data_sha256"] and e["components"]["grader_failed"] == 0.0 for e in elements)
    completions = unpack(scored / "elements" / "1-sampled.npz")
    assert len(completions) == 24 and isinstance(load_task(conf).show(completions[0]), str)


def same_step(one: tuple[dict, dict, Path], other: tuple[dict, dict, Path]) -> None:
    assert flat(one[0]) == pytest.approx(flat(other[0]), rel=1e-4, abs=1e-5)
    assert one[1].keys() == other[1].keys() and max(float(g.abs().max()) for g in one[1].values()) > 0.01
    for name, g in other[1].items():
        torch.testing.assert_close(one[1][name], g, atol=5e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def flat(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "components"} | row["components"]


def test_weights_spread_over_two_ranks_learn_the_same(course, plain, scored):
    """ZeRO-3 on two ranks against ZeRO-0 on one: gradients, then curves, final weights and every completion of the evaluation, which
    the training job does itself here."""
    spread = course.first_step(3, 2)
    same_step(spread, plain)
    finished = course.folder / "finished-3x2"
    trained = succeeded(run_job(course.folder, "train", course.with_(3, 2), finished.name, **course.given, resume=[str(spread[2])], purpose="selection"))
    for row, wanted in zip(*(files.read_lines(course.folder / name / "curves.jsonl") for name in (finished.name, "finished")), strict=True):
        assert flat(row) == pytest.approx(flat(wanted), rel=1e-3, abs=1e-4)
    for name in trained["elements"]:
        one, other = (folder / name for folder in (finished, scored))
        assert unpack(one.with_suffix(".npz")) == unpack(other.with_suffix(".npz"))
        assert files.read_json(one)["correct"] == files.read_json(other)["correct"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2)])
def test_gradients_are_equal_over_stages_and_ranks(course, plain, stage, ranks):
    same_step(course.first_step(stage, ranks), plain)


def test_problems_that_have_changed_are_refused(course, scored, tmp_path):
    sets = shutil.copytree(course.folder / "sets", tmp_path / "sets")
    data.import_file("exam", write_rows(tmp_path / "other.jsonl", parities(12, 9)), sets, replace=True)
    conf = configuration.parse(overlay(course.config, {"task": {"options": {"data": str(sets)}}}))
    refused = run_job(tmp_path, "evaluate", conf, **course.given, purpose="selection",
                      weights={"1": str(course.folder / "finished" / "snapshots" / "step-000003")})
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
    prepared = succeeded(run_job(tmp_path, "prepare", conf))
    given = {"package": package(tmp_path / "package", seeds.source("grpo")), **{k: prepared[k] for k in ("model", "data_sha256")}}
    trained = succeeded(run_job(tmp_path, "train", conf, **given))
    evaluated = run_job(tmp_path, "evaluate", conf, **given, weights=weights_of(tmp_path / "train", trained), purpose="selection")
    assert len(succeeded(evaluated)["elements"]) == 4 and trained["steps"] == 3
