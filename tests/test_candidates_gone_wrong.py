"""Candidates that go wrong in training, past every check, in one real campaign: each is archived with its cause, and the
search goes on. What the checks themselves catch stands in tests/test_checks.py and tests/test_gate.py."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import helpers_jobs
import pytest
from click.testing import CliRunner
from helpers_drive import archive_of
from helpers_kill import TINY, left_over

from poise_hpc import cli, files, inside, jobs, worker
from poise_hpc.algorithms import checks, load
from poise_hpc.algorithms.seeds import SEEDS
from poise_hpc.training import candidate
from poise_hpc.types import CandidateError, Outcome

PACKAGE = '''"""REINFORCE with the group's mean as baseline, and a fault."""
from dataclasses import dataclass
from typing import Any

import torch
from poise_hpc.algorithms.base import Advantages, Algorithm, PolicyBatch, RolloutBatch


@dataclass(frozen=True)
class Faulty(Algorithm):
    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        value = rollouts.reward - rollouts.reward.mean()
        if rollouts.progress == 0.25 and rollouts.step == 1:
            {fault}
        return Advantages(value)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> torch.Tensor:
        return -batch.logp * batch.advantage


ALGORITHM = Faulty()
'''
FAULTS = {  # name -> (code, cause, what the message must hold)
    "raises": ("raise ValueError('no such luck')", "raised", "no such luck"),
    "hangs": ("while True: pass", "hang", "algorithm.py\", line 14 in advantages"),
    "nan": ("value = value * float('nan')", "nonfinite-advantage", "NaN or infinite"),
    "shape": ("value = value[1:]", "wrong-shape", "(16,) was wanted"),
    "eats": ("value = value + torch.ones(2**33).sum()", "raised", "memory"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_is_evidence_with_its_cause(tmp_path):
    change = "base: {base}\nsearch: {{candidates: 0, train_seeds: [0]}}\njobs: {{silent_min: 0.7, memory_gb: 4.0, max_parallel: 3}}\n"
    (tmp_path / "config.yaml").write_text(change.format(base=json.dumps(str(TINY))))
    root, runner = tmp_path / "c", CliRunner()

    def call(*arguments):
        result = runner.invoke(cli.main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output

    call("run", root, "--config", tmp_path / "config.yaml", "--cache-dir", tmp_path / "cache")
    for name, (code, _, _) in FAULTS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "algorithm.py").write_text(PACKAGE.replace("{fault}", code))
        call("add", root, folder)
    call("run", root)
    found = {e["name"]: e for e in archive_of(root).values()}
    assert found.keys() == {"GRPO", *FAULTS}
    for name, (_, cause, message) in FAULTS.items():
        entry = found[name]
        assert (entry["outcome"], entry["cause"]) == (Outcome.CANDIDATE_ERROR, cause), (name, entry["cause"], entry["message"])
        assert message in entry["message"], (name, entry["message"])
        assert entry["score"] is None and entry["reflection"]["verdict"] == "failed"
    assert left_over(root) == []
    assert len(list(root.glob("candidates/*/attempts/train-s0-2"))) == 0  # a candidate's fault is not repeated


# --- blame, without a campaign

def test_what_passes_by_every_except_is_still_the_candidates(tmp_path, monkeypatch):
    (tmp_path / "algorithm.py").write_text("def f():\n    raise SystemExit(3)\n")
    namespace: dict = {}
    exec(compile((tmp_path / "algorithm.py").read_text(), str(tmp_path / "algorithm.py"), "exec"), namespace)
    monkeypatch.setattr(worker, "work_of_a_test", lambda job, attempt: namespace["f"](), raising=False)
    monkeypatch.setitem(worker.WORK, "train", "poise_hpc.worker:work_of_a_test")
    blamed = worker.run({"kind": "train", "package": str(tmp_path)}, tmp_path)
    assert (blamed["outcome"], blamed["cause"]) == (Outcome.CANDIDATE_ERROR, "exited")
    ours = worker.run({"kind": "train", "package": str(tmp_path / "other")}, tmp_path)
    assert (ours["outcome"], ours["cause"]) == (Outcome.INFRA_ERROR, "SystemExit")


DUMP = 'Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n  File "{file}", line 7 in token_loss\n'


@pytest.mark.parametrize(("name", "dumped"), [("plain", "plain"), ("new\nline é∂", "new\\x0aline \\xe9\\u2202")])
@pytest.mark.parametrize(("code", "blamed"), [(-signal.SIGSEGV, "crashed"), (1, "exited"), (-signal.SIGKILL, "")])
def test_an_end_inside_candidate_code_is_its_fault(tmp_path, name, dumped, code, blamed):
    (tmp_path / name).mkdir()
    job = {"limits": {}, "package": str(tmp_path / name)}
    (tmp_path / "stack-0.txt").write_text(DUMP.format(file=f"{tmp_path}/{dumped}/algorithm.py"))
    result = jobs.Supervisor(job, tmp_path, jobs.Place(0, 1, 0, "1", 0))._classify_alone(code)
    assert (result["outcome"], result["cause"]) == ((Outcome.CANDIDATE_ERROR, blamed) if blamed else (Outcome.INFRA_ERROR, "worker-died"))
    (tmp_path / "stack-0.txt").write_text(DUMP.format(file="/usr/lib/python3/torch/x.py"))
    ours = jobs.Supervisor(job, tmp_path, jobs.Place(0, 1, 0, "1", 0))._classify_alone(code)
    assert ours["outcome"] == Outcome.INFRA_ERROR


@pytest.mark.parametrize(("package", "outcome", "cause"), [
    (helpers_jobs.HERE, Outcome.CANDIDATE_ERROR, "exited"), ("/another/package", Outcome.INFRA_ERROR, "worker-died")])
def test_a_real_worker_that_leaves_without_a_word(tmp_path, package, outcome, cause):
    """Its `os._exit` is called by a module in HERE: once that is the candidate's package, once it is not."""
    attempt = helpers_jobs.write_job(tmp_path / "a", "exits", 3)
    files.write_json(attempt / "job.json", files.read_json(attempt / "job.json") | {"package": package})
    jobs_run = [sys.executable, str(Path(helpers_jobs.HERE) / "helpers_jobs.py"), str(attempt)]
    subprocess.run(jobs_run, env=os.environ | {"PYTHONPATH": helpers_jobs.HERE}, timeout=120)
    result = files.read_json(attempt / "result.json")
    assert (result["outcome"], result["cause"]) == (outcome, cause), result
    assert "exit code 3" in result["message"] and ("in exits" in result["message"]) == (cause == "exited")


@pytest.mark.parametrize(("turn", "outcome", "cause"), [
    ("candidate's", Outcome.CANDIDATE_ERROR, "exited"), ("ours", Outcome.INFRA_ERROR, "worker-died")])
def test_an_exit_from_c_code_is_whose_turn_it_was(tmp_path, turn, outcome, cause):
    attempt = helpers_jobs.write_job(tmp_path / "a", "leaves_in_c", turn)
    jobs_run = [sys.executable, str(Path(helpers_jobs.HERE) / "helpers_jobs.py"), str(attempt)]
    subprocess.run(jobs_run, env=os.environ | {"PYTHONPATH": helpers_jobs.HERE}, timeout=120)
    result = files.read_json(attempt / "result.json")
    assert (result["outcome"], result["cause"]) == (outcome, cause), result
    assert "exit code 3" in result["message"] and "Traceback" not in (attempt / "log.out").read_text()


@pytest.mark.parametrize("do", ["trains", "trains and raises", "loads", "checks"])
def test_every_call_into_candidate_code_says_so(tmp_path, monkeypatch, do):
    shared = inside.byte()
    monkeypatch.setenv(inside.VARIABLE, str(shared))
    seen = []

    def look(*arguments):
        seen.append(inside.was(shared))
        raise ValueError if "raises" in do else CandidateError("x", "enough")

    if do == "loads":
        (tmp_path / "algorithm.py").write_text("import os\nfrom poise_hpc import inside\nassert inside.was(int(os.environ[inside.VARIABLE]))\n1 / 0\n")
        with pytest.raises(CandidateError, match="ZeroDivisionError"):
            load.load(tmp_path)
    elif do == "checks":
        monkeypatch.setattr(checks, "CHECKS", (checks.Check("looks", "", look),))
        assert "enough" in checks.run_checks(SEEDS["grpo"])[0].message
    else:
        with pytest.raises(CandidateError):
            candidate.call("it", look)
    assert seen in ([True], []) and bool(seen) == (do != "loads") and not inside.was(shared)


def test_what_refuses_a_batch_that_no_training_makes_is_not_blamed(tmp_path):
    """The response report changes `length` alone, against the mask; this package asserts the contract."""
    package = tmp_path / "package"
    package.mkdir()
    text = PACKAGE.replace("{fault}", "pass").replace("rollouts.reward.mean()", "rollouts.reward.mean()\n        assert (rollouts.length == rollouts.mask.sum(1)).all()")
    (package / "algorithm.py").write_text(text)
    result = worker.run({"kind": "check", "package": str(package)}, tmp_path)
    assert result["outcome"] == Outcome.SUCCEEDED, result
    response = result["payload"]["response"]
    assert response["length"] == 1.0 and response["reward"] > 0 and response["logp_rollout"] == 0.0


def test_a_package_behind_a_symbolic_link_is_recognized(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    (tmp_path / "stack-0.txt").write_text(DUMP.format(file=f"{tmp_path}/real/algorithm.py"))
    supervisor = jobs.Supervisor({"limits": {}, "package": str(tmp_path / "link")}, tmp_path, jobs.Place(0, 1, 0, "1", 0))
    assert "token_loss" in supervisor._candidate_frames()
