"""The training job as a process: several ranks, kills, damaged checkpoints, stop requests."""
from __future__ import annotations

import gc
import json
import shutil
import signal
from pathlib import Path

import helpers_training as h
import pytest
import torch

from poise_hpc import files, worker
from poise_hpc.tasks.base import file_sha256, weights_sha256
from poise_hpc.training import checkpoint, job
from poise_hpc.types import CandidateError, PoiseError

CURVES = "curves.jsonl"


def start(attempt: Path, *kill: str, world: int = 1):
    return h.spawn(world, "job", str(attempt), *kill)


def result(attempt: Path) -> tuple[bytes, str]:
    return (attempt / CURVES).read_bytes(), json.loads((attempt / "payload.json").read_text())["weights_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("it's a \"job\"\nwith a nasty path")
    attempt = h.write_job(folder, h.make_config(evaluate={"at": [0.34, 1.0]}))
    h.finish(start(attempt))
    return attempt


def test_ranks_and_microbatches_do_not_change_the_gradient(tmp_path):
    """1 rank x 1 microbatch against 2 ranks x several, for ZeRO 0-3: 8 updates each."""
    running = [h.spawn(world, "ranks", str(tmp_path / f"{world}.pt")) for world in (1, 2)]
    for processes in running:
        h.finish(processes)
    alone, together = (torch.load(tmp_path / f"{world}.pt", weights_only=False) for world in (1, 2))
    assert len(alone[0]["gradients"]) == 8
    for a, b in zip(alone[0]["gradients"], together[0]["gradients"]):
        for p, q in zip(a, b):
            torch.testing.assert_close(q, p, atol=5e-6, rtol=1e-4)
    for stage in range(4):
        for other in (together[stage], alone[stage]):
            torch.testing.assert_close(other["logits"], alone[0]["logits"], atol=2e-4, rtol=1e-4)
            for row, wanted in zip(other["rows"], alone[0]["rows"]):
                assert row.keys() == wanted.keys()
                assert {k: v for k, v in row.items() if k != "components"} == pytest.approx(
                    {k: v for k, v in wanted.items() if k != "components"}, rel=1e-4, abs=1e-5)


def test_what_a_run_leaves(undisturbed):
    rows, payload = list(files.read_lines(undisturbed / CURVES)), json.loads((undisturbed / "payload.json").read_text())
    assert [r["step"] for r in rows] == list(range(6))
    assert {"reward", "acc", "valid", "truncated", "length", "entropy", "kl_old", "clip_fraction", "gradient_norm", "zero_variance",
            "advantage_mean", "advantage_std", "advantage_max", "ess", "trained_rows", "loss", "components"} <= rows[0].keys()
    assert payload["snapshots"] == {"0.34": "snapshots/step-000002", "1": "snapshots/step-000006"} and payload["steps"] == 6
    assert payload["versions"]["cpu"] and payload["versions"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert payload["versions"]["threads"] == "1"
    assert sorted(p.name for p in (undisturbed / "snapshots").iterdir()) == ["step-000002", "step-000006"]
    assert not (undisturbed / "checkpoints").exists()  # the run is over
    assert sum(1 for _ in files.read_lines(undisturbed / "timings.jsonl")) == 6 and payload["timings"]["wall"] > 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(undisturbed / "snapshots" / "step-000006")
    assert any(not p.equal(q) for p, q in zip(model.parameters(), h.tiny_model("gpt2").parameters()))


@pytest.mark.parametrize("kills", [
    ("update:10", "save:1"),            # in a step before the first checkpoint's next; before a checkpoint
    ("_sync:9",),                       # while a checkpoint or snapshot is written
], ids=["step", "save"])
def test_killed_and_started_again_is_bit_identical(undisturbed, tmp_path, kills):
    conf, attempts = h.make_config(evaluate={"at": [0.34, 1.0]}), []
    for number, kill in enumerate((*kills, None)):
        attempts.append(h.write_job(tmp_path, conf, f"train-s0-{number}", resume=attempts[:]))
        h.finish(start(attempts[-1], *([kill] if kill else [])), wanted=-signal.SIGKILL if kill else 0)
    assert result(attempts[-1]) == result(undisturbed)
    assert (attempts[-1] / "snapshots" / "step-000002").is_dir()  # carried over: the attempt is complete in itself


def test_same_attempt_goes_on_after_a_requeue(undisturbed, tmp_path):
    attempt = h.write_job(tmp_path, h.make_config(evaluate={"at": [0.34, 1.0]}))
    h.finish(start(attempt, "update:18"), wanted=-signal.SIGKILL)  # in step 4, after the checkpoint of step 4
    assert [p.name for p in (attempt / "checkpoints").iterdir()] == ["step-000004"]
    assert "resumed from" in h.finish(start(attempt))
    assert result(attempt) == result(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_resume_bit_identically(tmp_path, stage):
    conf = h.make_config({"zero_stage": stage}, jobs={"ranks": 2})
    whole = h.write_job(tmp_path, conf, "whole")
    h.finish(start(whole, world=2))
    first = h.write_job(tmp_path, conf, "first")
    h.finish(start(first, "update:18", world=2), wanted=None)
    assert (first / "checkpoints").is_dir()
    second = h.write_job(tmp_path, conf, "second", resume=[first])
    assert "resumed from" in h.finish(start(second, world=2))
    assert result(second) == result(whole)


@pytest.mark.slow
@pytest.mark.parametrize("call", [*(f"update:{n}" for n in range(1, 25, 3)), *(f"_sync:{n}" for n in range(1, 11, 2))])
def test_kill_anywhere(undisturbed, tmp_path, call):
    attempt = h.write_job(tmp_path, h.make_config(evaluate={"at": [0.34, 1.0]}))
    h.finish(start(attempt, call), wanted=-signal.SIGKILL)
    h.finish(start(attempt))
    assert result(attempt) == result(undisturbed)


# --- in this process: checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """An attempt that was asked to stop: after its first step it saves and says so."""
    attempt = h.write_job(tmp_path_factory.mktemp("stopped"), h.make_config())
    h.start_alone()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(worker.Stopped, match="after step 1 of 6"):
        patch.setattr(worker, "stop_requested", lambda: True)
        job.run(json.loads((attempt / "job.json").read_text()), attempt)
    return attempt


def copy(attempt: Path, to: Path) -> tuple[Path, Path, dict]:
    shutil.copytree(attempt, to)
    folder = to / "checkpoints" / "step-000001"
    return to, folder, json.loads((folder / "trainer.json").read_text())["recipe"]


def test_newest_whole_checkpoint_wins(stopped, tmp_path, capsys):
    a, folder, recipe = copy(stopped, tmp_path / "a")
    b, _, _ = copy(stopped, tmp_path / "b")
    assert checkpoint.newest([a, b], recipe)[0].parts[-3] == "b"  # of equals, the later attempt's
    later = b / "checkpoints" / "step-000002"
    shutil.copytree(folder, later)
    (later / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest([a, b], recipe)[0] == b / "checkpoints" / "step-000001"
    assert f"passed over {later}: no manifest.json: it was not completed" in capsys.readouterr().out
    assert checkpoint.newest([tmp_path / "none"], recipe) is None


@pytest.mark.parametrize("damage, message", [
    (lambda f: flip(next((f / "engine").iterdir())), "missing or damaged"),
    (lambda f: (f / "trainer.json").unlink(), "trainer.json is missing or damaged"),
    (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "manifest.json").write_text("[1]"), "unreadable"),
])
def test_damaged_checkpoints_are_named_and_passed_over(stopped, tmp_path, capsys, damage, message):
    attempt, folder, recipe = copy(stopped, tmp_path / "a")
    damage(folder)
    assert checkpoint.newest([attempt], recipe) is None
    out = capsys.readouterr().out
    assert message in out and str(folder) in out


def test_a_checkpoint_of_another_recipe_is_not_used(stopped, tmp_path, capsys):
    attempt, _, recipe = copy(stopped, tmp_path / "a")
    assert checkpoint.newest([attempt], recipe | {"seed": 4, "ranks": 2}) is None
    assert "made with another seed" in capsys.readouterr().out


def test_a_checkpoint_whose_snapshot_has_no_weights_is_passed_over(stopped, tmp_path, capsys):
    attempt, folder, recipe = copy(stopped, tmp_path / "a")
    trainer = json.loads((folder / "trainer.json").read_text()) | {"snapshots": {"step-000001": "0" * 64}}
    files.write_json(folder / "trainer.json", trainer)
    files.write_json(folder / checkpoint.MANIFEST, files.read_json(folder / checkpoint.MANIFEST) | {"trainer.json": file_sha256(folder / "trainer.json")})
    (attempt / "snapshots" / "step-000001").mkdir(parents=True)
    assert checkpoint.newest([attempt], recipe) is None
    assert "its snapshot step-000001 is missing or damaged" in capsys.readouterr().out


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_model_that_is_not_whole_is_refused(stopped, tmp_path):
    from safetensors.torch import load_file, save_file

    spec = json.loads((stopped / "job.json").read_text())
    shutil.copytree(spec["model"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("transformer.h.0.mlp.c_fc.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "attempt").mkdir()
    with pytest.raises(PoiseError, match="lacks transformer.h.0.mlp.c_fc.weight"):
        job.run(spec | {"model": str(tmp_path / "model")}, tmp_path / "attempt")


def test_a_package_that_does_not_import_is_the_candidates_fault(stopped, tmp_path):
    (tmp_path / "algorithm.py").write_text("import nothing_of_that_name\n")
    spec = json.loads((stopped / "job.json").read_text()) | {"package": str(tmp_path)}
    with pytest.raises(CandidateError):
        job.run(spec, tmp_path)


def test_no_other_code_is_trained_than_was_proposed(tmp_path):
    (tmp_path / "algorithm.py").write_text(h.PACKAGE)
    with pytest.raises(files.CorruptFile, match="algorithm.py is not what its manifest says"):
        job.make_trainer(h.make_config(), {"package": str(tmp_path), "manifest": {"algorithm.py": "0" * 64}}, None)


def held() -> int:
    """Bytes of all tensors that Python knows of."""
    gc.collect()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    return sum(storages.values())


@pytest.mark.parametrize("stage", range(4))
def test_what_evaluates_next_has_the_memory(tmp_path, stage):
    h.start_alone()
    attempt, before = h.write_job(tmp_path, h.make_config({"zero_stage": stage, "steps": 1})), held()
    job.run(json.loads((attempt / "job.json").read_text()), attempt)
    share = sum(p.numel() for p in h.tiny_model("gpt2").parameters()) if stage == 3 else 0  # that one rank of one has
    assert held() - before <= 24 * share


def test_a_run_that_was_stopped_in_its_evaluation_is_not_trained_again(tmp_path, monkeypatch):
    from poise_hpc.evaluation import job as evaluation

    h.start_alone()
    conf = h.make_config({"steps": 3, "checkpoint_every": 8})  # no step is a multiple: only the end is saved
    first = h.write_job(tmp_path, conf, "train-s0-1", purpose="selection")
    second = h.write_job(tmp_path, conf, "train-s0-2", purpose="selection", resume=[first])

    def stopped(spec, attempt):
        raise worker.Stopped("0 of 1 elements done")

    monkeypatch.setattr(evaluation, "run", stopped)
    with pytest.raises(worker.Stopped):
        worker.train(json.loads((first / "job.json").read_text()), first)
    monkeypatch.setattr(evaluation, "run", lambda spec, attempt: {"elements": [], "weights": spec["weights"]})
    payload = worker.train(json.loads((second / "job.json").read_text()), second)
    assert not (second / "timings.jsonl").exists()  # no step was made again
    assert (second / CURVES).read_bytes() == (first / CURVES).read_bytes() and payload["steps"] == 3
    assert payload["weights"]["1"] == str(second / "snapshots" / "step-000003")
    assert payload["weights_sha256"] == weights_sha256(first / "snapshots" / "step-000003") == weights_sha256(second / "snapshots" / "step-000003")
    assert not (second / "checkpoints").exists()  # the run is over


def test_snapshot_steps():
    assert job.snapshot_steps(h.make_config({"steps": 6}, evaluate={"at": [0.01, 0.5, 1.0]})) == {"0.01": 1, "0.5": 3, "1": 6}


# --- screening

@pytest.mark.parametrize("kill", [None, "save:1", "_sync:4"], ids=["whole", "before the rung's checkpoint", "in it"])
def test_a_promoted_run_is_bit_identical(undisturbed, tmp_path, kill):
    """To the rung at step 2, then to the end: the snapshot of the rung is the run's own, curves and weights are the same."""
    conf, attempts = h.make_config({"checkpoint_every": 4}, evaluate={"at": [0.34, 1.0]}), []
    for name in ["train-s0@0.34-1"] * bool(kill) + ["train-s0@0.34-2", "train-s0-1"]:
        until = {"until": "0.34"} if "@" in name else {}
        attempts.append(h.write_job(tmp_path, conf, name, resume=attempts[:], **until))
        first = kill and len(attempts) == 1
        h.finish(start(attempts[-1], *([kill] if first else [])), wanted=-signal.SIGKILL if first else 0)
    rung, last = attempts[-2:]
    payload = json.loads((rung / "payload.json").read_text())
    assert payload["steps"] == 2 and payload["snapshots"] == {"0.34": "snapshots/step-000002"}
    assert payload["weights_sha256"] == weights_sha256(undisturbed / "snapshots" / "step-000002")
    assert sum(1 for _ in files.read_lines(rung / CURVES)) == 2 and sum(1 for _ in files.read_lines(last / "timings.jsonl")) == 4  # not made again
    assert result(last) == result(undisturbed) and weights_sha256(last / "snapshots" / "step-000002") == payload["weights_sha256"]
