"""The vLLM engine for real, on a CPU, where vLLM is installed (CI does not install it)."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_lab import tiny
from helpers_vllm import model, needs_vllm, run

from poise_hpc import config, files
from poise_hpc.settings import overlay

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_conforms(kind, tmp_path):
    assert "conforms" in run("conform", tmp_path, kind)


def test_a_sync_that_fails_silently_is_noticed(tmp_path):
    assert "noticed" in run("self_check", tmp_path)


def test_a_groups_prompt_is_computed_once(tmp_path):
    assert run("group", tmp_path).splitlines()[-1] == "[0, 32, 32, 32, 0, 32, 32, 32]"


def left_behind() -> set[Path]:
    """What a sampler over several ranks leaves in shared memory; the next one would stumble over it."""
    return set(Path("/dev/shm").glob("-tp:0-*cpushm_*"))


def test_two_ranks_hold_one_engine(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    deep = tmp_path / ("x" * 100)  # as long as an attempt's own temporary folder
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    before = left_behind()
    alone, together = (json.loads(next(line for line in run("parallel", tmp_path / name, ranks=ranks).splitlines() if line.startswith("{")))
                       for name, ranks in (("one", 1), ("two", 2)))
    for path in left_behind() - before:
        path.unlink()
    assert alone == together


SHORTER = """
from dataclasses import dataclass, replace
from poise_hpc.algorithms.grpo import GRPO

@dataclass(frozen=True)
class Shorter(GRPO):
    def advantages(self, rollouts, state):  # a random model earns no reward; its completions differ in length
        return super().advantages(replace(rollouts, reward=-rollouts.length.float()), state)

ALGORITHM = Shorter()
"""


def attempt(folder: Path, name: str, resume: Path | None = None, zero_stage: int = 0, ranks: int = 1) -> Path:
    """A training attempt on the tiny lab's problems with a random Qwen2, which evaluates its own snapshots."""
    start, package, path = folder / "model", folder / "package", folder / name
    if not start.exists():
        model(vocab=21).save_pretrained(start)
        package.mkdir()
        (package / "algorithm.py").write_text(SHORTER)
    path.mkdir()
    conf = config.parse(overlay(tiny().dump(), {
        "model": {"source": "path", "path": str(start), "options": {}}, "rollout": {"engine": "vllm"}, "train": {"zero_stage": zero_stage},
        "jobs": {"ranks": ranks}}))
    files.write_json(path / "job.json", {
        "kind": "train", "config": conf.dump(), "seed": 3, "threads": 1, "model": str(start), "package": str(package),
        "resume": [str(resume)] if resume else [], "purpose": "selection"})
    return path


def curves(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "curves.jsonl").read_text().splitlines()]


def outcome(path: Path) -> tuple[list[dict], str, dict]:
    payload = files.read_json(path / "payload.json")
    elements = {name: files.read_json(path / name) for name in payload["elements"]}
    return curves(path), payload["weights_sha256"], {name: {k: v for k, v in e.items() if k != "seconds"} for name, e in elements.items()}


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole, stopped, three = attempt(tmp_path, "whole"), attempt(tmp_path, "stopped"), attempt(tmp_path, "three", zero_stage=3)
    again = attempt(tmp_path, "again", resume=stopped)
    run("train", whole, stopped, again, three)
    assert "after step 3 of 4" in files.read_json(stopped / "payload.json")["stopped"]
    assert outcome(again) == outcome(whole)
    rows = outcome(whole)[0]
    assert len(rows) == 4 and all(row["gradient_norm"] > 0.01 and 0.99 < row["ess"] <= 1 for row in rows)  # one policy, two engines
    assert {e["engine"] for e in outcome(whole)[2].values()} == {"vllm"}
    # Parameters that are gathered one by one: the same completions of the first step, the same gradient.
    first, spread = rows[0], curves(three)[0]
    assert spread["length"] == first["length"] and spread["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-4)


def test_weights_spread_over_two_ranks_arrive(tmp_path):
    """ZeRO-3 on two ranks; a weight that did not arrive would end the run."""
    path = attempt(tmp_path, "three", zero_stage=3, ranks=2)
    run("train", path, ranks=2)
    assert len(curves(path)) == 4


def test_a_campaign_of_the_lab(tmp_path):
    """The whole path with isolation, through the command line."""
    from click.testing import CliRunner

    from poise_hpc.cli import main

    tiny = Path(__file__).parent.parent / "configs/tiny.yaml"
    (tmp_path / "c.yaml").write_text(files.dumps({
        "base": str(tiny), "model": {"options": {"heads": 1}}, "rollout": {"engine": "vllm"}, "search": {"candidates": 0, "train_seeds": [0]},
        "jobs": {"train_min": 20.0, "prepare_min": 20.0, "check_min": 20.0}}))
    assert config.load(tmp_path / "c.yaml").evaluation_engine == "vllm"
    done = CliRunner().invoke(main, ["run", str(tmp_path / "campaign"), "--config", str(tmp_path / "c.yaml"), "--cache-dir", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    found = next((tmp_path / "campaign/candidates/c0000/attempts").glob("train-*"))
    assert (tmp_path / "campaign/records/c0000.h5").is_file()
    assert {files.read_json(path)["engine"] for path in (found / "elements").glob("*.json")} == {"vllm"}
