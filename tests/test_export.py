"""Exports: the folder, refusals, and the proof in the target trainers themselves. Those in verl want a Python that has it:
POISE_VERL_PYTHON, or this one."""
from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers_campaign import campaign
from helpers_drive import drive

from poise_hpc import archive, cli
from poise_hpc.agent.recipe import make
from poise_hpc.agent.render import render
from poise_hpc.algorithms import load, seeds
from poise_hpc.export import create, step, targets, vectors, vendor
from poise_hpc.types import UsageError

ROOT = Path(__file__).parents[1]
STATEFUL = ("running-baseline", "entropy-target")  # parts of the offline catalogue
NAMES = [*seeds.SEEDS, "c0061", *STATEFUL]
REFUSED = {("verl", "dapo"): "leaves completions out", **{("verl", name): "keeps a state" for name in STATEFUL}}
VERL = os.environ.get("POISE_VERL_PYTHON") or (sys.executable if importlib.util.find_spec("verl") else None)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl (extra `test`)")
needs_verl = pytest.mark.skipif(VERL is None, reason="needs verl: POISE_VERL_PYTHON")


def code_of(name: str) -> dict[str, str]:
    if name == "c0061":
        return load.read_package(ROOT / "docs/data/discovery/c0061")
    return {"algorithm.py": render(make([name]), "T-GRPO") if name in STATEFUL else seeds.source(name)}


MEASURED: dict[str, tuple[dict, dict, bytes]] = {}


def measured_here(code, scratch, weight_cap):
    """`create.measure` without the walls of a job, and once for each code."""
    key = json.dumps([code, weight_cap])
    if key not in MEASURED:
        for name, text in code.items():
            (scratch / name).write_text(text)
        payload = vectors.run({"package": str(scratch), "weight_cap": weight_cap}, scratch)
        MEASURED[key] = payload["facts"], payload["versions"], (scratch / vectors.FILE).read_bytes()
    return MEASURED[key]


def alone() -> dict[str, str]:
    """The environment of a process that has no part in a rendezvous of other tests here."""
    here = ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in here} | {"TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(create, "measure", measured_here)


def run_exported(target: str, python: str, root: Path) -> dict[str, Any]:
    """Every algorithm that can be exported to `target`, and how the test in its folder went; for "train.py" what the last one's printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create, "measure", measured_here)
        for name in NAMES:
            if (target, name) not in REFUSED:
                create.package(code_of(name), target, root / name, {"name": name})
    done = subprocess.run([python, str(ROOT / "tests/run_exported.py"), *(str(p) for p in sorted(root.iterdir()))],
                          capture_output=True, text=True, env=alone() | {"CUDA_VISIBLE_DEVICES": ""}, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def in_trl(tmp_path_factory):
    return run_exported("trl", sys.executable, tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def in_verl(tmp_path_factory):
    return run_exported("verl", VERL, tmp_path_factory.mktemp("verl"))


# --- every algorithm, in the trainer's own code


@needs_trl
@pytest.mark.parametrize("name", NAMES)
def test_in_trl_it_computes_the_same(in_trl, name):
    assert in_trl[name]["code"] == 0 and "2 passed" in in_trl[name]["text"], in_trl[name]["text"]


@needs_trl
def test_the_training_script_of_an_export_runs(in_trl):
    assert "'train_runtime'" in in_trl["train.py"]


@needs_verl
@pytest.mark.parametrize("name", [n for n in NAMES if ("verl", n) not in REFUSED])
def test_in_verl_it_computes_the_same(in_verl, name):
    assert in_verl[name]["code"] == 0 and "27 passed" in in_verl[name]["text"], in_verl[name]["text"]


@pytest.mark.parametrize("target", ["trl", "verl"])
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_is_exported_or_refused_with_its_reason(here, tmp_path, target, name):
    folder = tmp_path / "plug"
    if reason := REFUSED.get((target, name)):
        with pytest.raises(UsageError, match=reason):
            create.package(code_of(name), target, folder, {"name": name})
        assert not any(tmp_path.iterdir())
        return
    create.package(code_of(name), target, folder, {"name": name})
    for path in folder.rglob("*.py"):
        imports = [ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not [line for line in imports if line.split()[1].startswith("poise_hpc")], path
    assert "$" not in (folder / "README.md").read_text().replace("$PWD", "")


# --- trained for real


@pytest.fixture(scope="module", params=["grpo", "everything"])
def recorded(request, tmp_path_factory):
    pytest.importorskip("trl")
    import helpers_export
    import helpers_training

    if not torch.distributed.is_initialized():
        helpers_training.start_alone()
    folder = tmp_path_factory.mktemp(request.param)
    return folder, helpers_export.record(request.param, folder)


@needs_trl
def test_trl_trains_as_ours_does(recorded, tmp_path):
    """Three generation batches, four microbatches, two updates each: every loss, gradient norm, weight, and the state."""
    import helpers_export

    folder, ours = recorded
    trainer = helpers_export.make_trl(folder, tmp_path)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(rows) == len(ours["loss"]) == 6
    torch.testing.assert_close([r["loss"] for r in rows], ours["loss"], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close([float(r["grad_norm"]) for r in rows], ours["norm"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(trainer.model.state_dict()), ours["weights"], rtol=1e-4, atol=5e-6)
    assert trainer.algorithm_state == pytest.approx(ours["state"], abs=1e-6)
    before = dict(trainer.algorithm_state)
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite() and trainer.algorithm_state == before  # evaluation teaches nothing


@needs_trl
def test_a_resumed_run_ends_where_the_whole_one_does(recorded, tmp_path):
    import helpers_export

    folder, ours = recorded
    first = helpers_export.make_trl(folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "algorithm_state.json").read_text()) == first.algorithm_state
    second = helpers_export.make_trl(folder, tmp_path / "second")
    second.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(dict(second.model.state_dict()), ours["weights"], rtol=1e-4, atol=5e-6)
    (checkpoint / "algorithm_state.json").unlink()
    with pytest.raises(FileNotFoundError, match="was not written by AlgorithmTrainer"):
        helpers_export.make_trl(folder, tmp_path / "third").train(resume_from_checkpoint=str(checkpoint))


@needs_trl
@pytest.mark.parametrize("recorded", ["everything"], indirect=True)
def test_two_ranks_of_trl_train_like_one(recorded):
    folder, ours = recorded
    done = subprocess.run([sys.executable, str(ROOT / "tests/helpers_export.py"), str(folder), "2"], capture_output=True, text=True,
                          env=alone() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(dict(torch.load(folder / "weights-2.pt")), ours["weights"], rtol=1e-4, atol=5e-6)


@needs_trl
@pytest.mark.parametrize(("change", "reason"), [
    ({"loss_type": "grpo"}, "the algorithm decides this"), ({"scale_rewards": "none"}, "the algorithm decides this"),
    ({"mask_truncated_completions": True}, "the algorithm decides this"), ({"beta": 0.1}, "no use for a reference model"),
    ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 8}, "would mix generation batches")])
def test_settings_that_trl_would_ignore_are_refused(change, reason, tmp_path):
    from trl import GRPOConfig

    from poise_hpc.algorithms.grpo import GRPO
    from poise_hpc.export.trl import check

    check(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), GRPO())
    with pytest.raises(ValueError, match=reason):
        check(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **change), GRPO())


# --- the folder


def test_imports_lead_to_the_copies():
    text = ("from poise_hpc.algorithms.base import (\n    Algorithm,  # the interface\n)\nfrom poise_hpc.algorithms import ops\n"
            "import poise_hpc.algorithms.grpo as g\nfrom .helper import x\nimport math\nname = 'from poise_hpc.algorithms.ops import y'\n")
    assert vendor.rewritten(text, ".._poise_hpc") == (
        "from .._poise_hpc.base import (\n    Algorithm,  # the interface\n)\nfrom .._poise_hpc import ops\n"
        "from .._poise_hpc import grpo as g\nfrom .helper import x\nimport math\nname = 'from poise_hpc.algorithms.ops import y'\n")
    assert vendor.needed([text]) == {"base", "ops", "grpo"}
    with pytest.raises(UsageError, match=r"imports poise_hpc.algorithms.gone, which this version"):
        vendor.needed(["from poise_hpc.algorithms.gone import x\n"])


def test_a_package_of_several_modules_and_a_seed_it_builds_on(here, tmp_path):
    code = {"algorithm.py": "from dataclasses import dataclass\nfrom poise_hpc.algorithms.dapo import DAPO\nfrom .helper import CLIP\n\n\n"
            "@dataclass(frozen=True)\nclass Mine(DAPO):\n    clip_high: float = CLIP\n\n\nALGORITHM = Mine()\n", "helper.py": "CLIP = 0.4\n"}
    create.package(code, "trl", tmp_path / "x", {"name": "Mine 2 / \u03b8"})
    done = subprocess.run([sys.executable, "-c", "import sys; sys.modules['poise_hpc'] = None\nfrom poise_mine_2 import ALGORITHM, READS\n"
                           "print(ALGORITHM.clip_high, type(ALGORITHM).__mro__[1].__module__, sorted(READS))"],
                          capture_output=True, text=True, cwd=tmp_path / "x")
    assert done.stdout.split(" ", 2) == ["0.4", "poise_mine_2._poise_hpc.dapo", "['components.correct']\n"], done.stderr


FACTS = {"class": "X", "reduction": "token-mean", "needs": [], "mechanisms": [], "state": False, "leaves_out": False, "advantages_read": [],
         "loss_read": [], "components_read": []}


@pytest.mark.parametrize(("change", "reason"), [
    ({"state": True}, "keeps a state"), ({"leaves_out": True}, "leaves completions out"), ({"advantages_read": ["reward", "progress"]}, "advantages read progress"),
    ({"loss_read": ["logp", "entropy"]}, "loss reads entropy"), ({"needs": ["ref_logp"]}, "needs ref_logp")])
def test_what_verl_has_no_place_for(change, reason):
    assert targets.refusals("verl", FACTS) == [] and targets.refusals("trl", FACTS | change) == []
    (said,) = targets.refusals("verl", FACTS | change)
    assert reason in said


def test_what_an_adapter_must_be_told():
    facts = FACTS | {"components_read": ["correct"], "advantages_read": ["components", "valid", "max_length"]}
    assert targets.reads("trl", facts) == ["components.correct", "valid"]
    assert targets.reads("verl", facts) == ["components.correct", "valid", "max_length"]
    step.required(frozenset({"components.correct", "valid"}), {"correct": 1}, "format", "")
    with pytest.raises(ValueError, match="the reward component 'correct' and `valid`, .* do so"):
        step.required(frozenset({"components.correct", "valid"}), {}, None, "do so")
    with pytest.raises(ValueError, match="reads the reward component 'format'; `components` gives correct"):
        step.Components({"correct": torch.zeros(1)})["format"]


def test_facts_are_what_an_algorithm_does():
    from helpers_export import Everything

    facts = vectors.facts(Everything())
    assert facts["state"] and facts["leaves_out"] and facts["needs"] == ["entropy", "ref_logp"] and facts["components_read"] == ["correct", "format"]
    assert {"valid", "truncated", "progress", "logp_old", "logp_ref", "entropy"} <= set(facts["advantages_read"])
    assert {"progress", "logp_ref", "entropy"} <= set(facts["loss_read"]) and "reward" not in facts["loss_read"]
    assert len(targets.refusals("verl", facts)) == 4


def test_stored_states_are_those_after_each_step(tmp_path):
    """By hand: b <- 0.9 b + 0.1 mean R, from the first mean on."""
    _, _, stored = measured_here(code_of("running-baseline"), tmp_path, 2.0)
    (tmp_path / "read.npz").write_bytes(stored)
    arrays = np.load(tmp_path / "read.npz")
    means = [float(arrays[f"{i}/reward"].mean()) for i in range(3)]
    b = [means[0], 0.9 * means[0] + 0.1 * means[1]]
    b.append(0.9 * b[1] + 0.1 * means[2])
    assert [s["baseline"] for s in json.loads(arrays["meta"].tobytes())["states"]] == pytest.approx(b) and len(set(b)) == 3


def test_a_state_may_differ_by_rounding_in_the_exported_test():
    tree = ast.parse((ROOT / "poise_hpc/export/templates/trl/test_equivalence.py.in").read_text().replace("$beta", "0.0").replace("$plugin", "plugin"))
    names: dict[str, Any] = {"pytest": pytest}
    exec(ast.unparse([n for n in tree.body if "CLOSE =" in ast.unparse(n) or getattr(n, "name", "") == "compare_state"]), names)
    want = {"rate": 0.4796, "last": [0.1, None], "seen": 3}
    names["compare_state"]({"rate": 0.47960001, "last": [0.1, None], "seen": 3}, want)
    for other in ({"rate": 0.4958}, {"last": [0.1]}, {"last": [0.2, None]}, {"seen": 4}, {"more": 1}):
        with pytest.raises(AssertionError):
            names["compare_state"](want | other, want)


# --- the command


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    root = campaign(tmp_path_factory.mktemp("search") / "c", search={"candidates": 1}).root
    drive(root)
    return root


def invoke(*words: object):
    return CliRunner().invoke(cli.main, ["export", *map(str, words)])


def test_the_command_in_the_isolation_of_a_job(searched, tmp_path):
    done = invoke(searched, "c0001", "--to", "trl", tmp_path / "plug", "--json")
    assert done.exit_code == 0, done.output
    said, written = json.loads(done.stdout), json.loads((tmp_path / "plug/provenance.json").read_text())
    entry = archive.read(searched / "records/c0001.h5")
    assert said["files"] == sorted(str(p.relative_to(tmp_path / "plug")) for p in (tmp_path / "plug").rglob("*") if p.is_file())
    assert written["origin"]["record_sha256"] == archive.identity(searched / "records/c0001.h5") and written["origin"]["campaign"] == searched.name
    assert written["code_sha256"] == load.manifest(searched / "candidates/c0001")
    assert (tmp_path / "plug/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["plug"]
    assert "needs TRL and pytest: `pip install trl==1.16.0 pytest`" in (tmp_path / "plug/README.md").read_text()
    assert "The test needs TRL and pytest: `pip install trl==1.16.0 pytest`, or `scripts/setup.sh test`" in create.text(said)
    again = invoke(searched, "c0001", "--to", "trl", tmp_path / "plug")
    assert again.exit_code == 2 and "is there already; give a new or an empty folder" in again.output


def test_what_cannot_be_exported_is_said_and_nothing_is_written(searched, tmp_path):
    for words, reason in (((searched, "c0007", "--to", "trl"), "no archive entry"), ((searched, "c0001", "--to", "openrlhf"), "no place to register")):
        done = invoke(*words, tmp_path / "plug")
        assert done.exit_code == 2 and reason in done.output, done.output
    assert not any(tmp_path.iterdir())


def test_a_fault_of_the_algorithm_is_named(tmp_path):
    code = {"algorithm.py": seeds.source("grpo").replace("return Advantages(", "return Advantages(float('nan') * ")}
    with pytest.raises(create.PoiseError, match="nonfinite-advantage"):
        create.package(code, "trl", tmp_path / "x", {"name": "x"})
    assert not any(tmp_path.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    create.write(tmp_path / "empty", {"a/b": b"1"})
    assert (tmp_path / "empty/a/b").read_bytes() == b"1"
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError):
        create.write(tmp_path / "new", {"a": b"1"})
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
