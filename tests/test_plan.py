"""`poise-hpc plan`: what fits, what does not and the ways out, and predictions that learn from a campaign's own runs."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from poise_hpc import config as configuration
from poise_hpc import files
from poise_hpc import site as sites
from poise_hpc.campaign import Campaign
from poise_hpc.cli import main
from poise_hpc.planning import measured, plan, text
from poise_hpc.planning.devices import GIB
from poise_hpc.settings import overlay
from poise_hpc.types import UsageError

CONFIGS = Path(__file__).parents[1] / "configs"
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}


@pytest.fixture
def qwen(tmp_path):
    """The paper's model without weights."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return tmp_path / "config.json"


def site(**gpus):
    return sites.parse({"ranks_per_node": 8, "gpus": {"per_node": 8} | gpus})


def changed(name, **sections):
    return configuration.parse(overlay(configuration.load(CONFIGS / name).dump(), sections))


@pytest.mark.parametrize("name", ["math_grpo.yaml", "math_small.yaml", "math_confirm.yaml"])
def test_the_shipped_configs_fit_the_gpus_they_are_for(name, qwen):
    found = plan.plan(changed(name), site(device="h100"), model=qwen)["memory"]
    assert found["fits"] and not found["tight"], plan.refusal(found)


def test_what_cannot_fit_is_refused_with_ways_out_that_do(qwen):
    config = changed("math_grpo.yaml", train={"microbatch_tokens": 65536})
    found = plan.plan(config, site(device="h100"), model=qwen)["memory"]
    assert found["fits"] is False and found["worst"] == "backward"
    said = plan.refusal(found)
    assert "activations" in said and "train.microbatch_tokens" in said and "GiB a rank" in said
    assert 1 <= len(found["ways_out"]) <= 3
    assert all(way["peak"] <= 79 * GIB for way in found["ways_out"])
    seconds = [way["run_seconds"] for way in found["ways_out"]]
    assert seconds == sorted(seconds)
    sets = [set(way["change"].split(", ")) for way in found["ways_out"]]
    assert not any(a < b for a in sets for b in sets)


def test_no_way_out_is_said_too(qwen):
    found = plan.plan(changed("math_small.yaml"), site(memory_gb=2), model=qwen)["memory"]
    assert found["ways_out"] == [] and "smaller model" in plan.refusal(found)


def test_unknown_memory_is_neither_refused_nor_promised(qwen):
    data = plan.plan(changed("math_small.yaml"), site(), model=qwen)
    assert data["memory"]["fits"] is None and "whether it fits is unknown" in text.text(data)
    assert any("A100" in a for a in data["assumed"])


def test_check_before_a_run(tmp_path, qwen):
    config = changed("math_small.yaml", model={"path": str(tmp_path)}, train={"microbatch_tokens": 65536})
    with pytest.raises(UsageError, match="--force submits nevertheless"):
        plan.check(config, site(memory_gb=79))
    assert "warning" in plan.check(config, site(memory_gb=79), force=True)
    assert plan.check(config, site(memory_gb=2000)) == ""
    assert plan.check(config, site()) == ""  # the site says nothing about its GPUs


# --- cost


def campaign_with(root, runs):
    """A campaign whose runs took `runs`: (candidate, seconds of rollout, of the update)."""
    config = configuration.parse({"train": {"steps": 2}, "search": {"candidates": 3, "train_seeds": [0]}})
    campaign = Campaign.create(root, config, cache_dir="/nowhere")
    for id, rollout, update in runs:
        folder = campaign.candidates / id / "attempts" / "train-s0-1"
        folder.mkdir(parents=True)
        files.write_json(campaign.candidates / id / "proposal.json", {})
        files.write_json(folder / "intent.json", {"name": "x", "index": None})
        for step in range(2):
            files.append_line(folder / "curves.jsonl", {"length": 10.0, "trained_rows": 64, "groups_sampled": 16})
            files.append_line(folder / "timings.jsonl", {"step": step})
        files.write_json(folder / "result.json", {
            "outcome": "succeeded", "cause": "", "message": "", "restart": 0, "ranks": 1, "run_seconds": rollout + update + 5.0,
            "payload": {"steps": 2, "timings": {"rollout": rollout, "grade": 0.0, "wall": rollout + update}}})
    return campaign


def test_runs_are_read_part_by_part(tmp_path):
    found, = measured.runs(campaign_with(tmp_path / "c", [("c0001", 3.0, 4.0)]))
    assert found.seconds == {"start": pytest.approx(5.0), "rollout": 3.0, "update": 4.0}
    assert (found.length, found.trained) == (10.0, 0.5)


def test_a_resumed_run_is_no_measure(tmp_path):
    campaign = campaign_with(tmp_path / "c", [("c0001", 3.0, 4.0)])
    timings = campaign.candidates / "c0001/attempts/train-s0-1/timings.jsonl"
    timings.write_text(timings.read_text().splitlines()[1] + "\n")  # it began with step 1
    assert measured.runs(campaign) == []


def test_predictions_learn_from_the_campaigns_runs(tmp_path):
    campaign = campaign_with(tmp_path / "c", [(f"c{i:04d}", 30.0, 40.0) for i in range(4)])
    cost = plan.plan(campaign.config, campaign=campaign)["cost"]
    assert cost["seconds"]["rollout"]["measured"] == 30.0
    assert cost["seconds"]["rollout"]["predicted"] == pytest.approx(30.0, rel=0.1)
    assert cost["seconds"]["update"]["predicted"] == pytest.approx(40.0, rel=0.1)
    assert cost["seconds"]["evaluate"]["runs"] == 0 and cost["seconds"]["evaluate"]["factor"] == 1.0
    assert cost["error"]["predicted_factor"] < cost["error"]["assumed_factor"]
    parts = {name: x["predicted"] for name, x in cost["seconds"].items()}
    assert cost["candidate_hours"] == pytest.approx(sum(parts.values()) / 3600)  # one seed, one rank
    unsure = {name: x["spread"] for name, x in cost["seconds"].items()}
    assert unsure["rollout"] < cost["spread"] < unsure["evaluate"]  # measured, all, never measured
    assert cost["campaign_hours"] == pytest.approx(4 * cost["candidate_hours"])


def test_a_run_longer_than_its_limit_is_said(tmp_path):
    config = configuration.parse({"jobs": {"train_min": 0.01}})
    assert "jobs.train_min allows 0.01" in text.text(plan.plan(config))


def test_what_a_rung_has_used():
    """Rung 1: a start, a quarter of 100 s of training and one of three evaluations, 10 s each. Rung 2: the first seed starts again, a
    second one comes; both have half of the training and two evaluations. And the check."""
    config = configuration.parse({"search": {"train_seeds": [0, 1, 2]}, "screen": {"rungs": [{"at": 0.25}, {"at": 0.5, "seeds": 2}]}})
    seconds = {"start": 7.0, "rollout": 60.0, "update": 40.0, "evaluate": 30.0, "check": 5.0}
    assert plan.rung_hours(config, seconds) == pytest.approx([(7 + 25 + 10 + 5) / 3600, (2 * 7 + 50 + 20 + 7 + 50 + 20 + 5) / 3600])
    assert "no further than a rung has used" in text.text(plan.plan(config))


# --- the command


def test_command_exit_codes_and_json(tmp_path, qwen):
    (tmp_path / "site.yaml").write_text("ranks_per_node: 8\ngpus: {per_node: 8, memory_gb: 8}\n")
    arguments = ["plan", str(CONFIGS / "math_grpo.yaml"), "--site", str(tmp_path / "site.yaml"), "--model", str(qwen)]
    refused = CliRunner().invoke(main, [*arguments, "--json"])
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["memory"]["fits"] is False
    lab = CliRunner().invoke(main, ["plan", str(CONFIGS / "tiny.yaml")])
    assert lab.exit_code == 0 and "it fits into 8 GiB" in lab.stdout and "assumed:" in lab.stdout
    first, cost = lab.stdout.splitlines()[0], json.loads(CliRunner().invoke(main, ["plan", str(CONFIGS / "tiny.yaml"), "--json"]).stdout)["cost"]
    assert first.startswith(f"it fits into 8 GiB; {cost['left']} candidates to come take about {cost['left_hours']:.2g} core-hours, 90 % within ")
    assert "\n     0.000  " not in lab.stdout and "context" in lab.stdout
    assert CliRunner().invoke(main, ["plan", *arguments[1:]]).stdout.startswith("does not fit: ")
    assert CliRunner().invoke(main, ["plan", "--config", str(CONFIGS / "tiny.yaml")]).stdout == lab.stdout  # as `run` has it
    for twice in ([], [str(CONFIGS / "tiny.yaml"), "--config", str(CONFIGS / "tiny.yaml")]):
        refused = CliRunner().invoke(main, ["plan", *twice])
        assert refused.exit_code == 2 and "plan needs one of CONFIG, --config CONFIG and CAMPAIGN" in refused.stderr


def test_a_model_that_is_not_there_is_named():
    refused = CliRunner().invoke(main, ["plan", str(CONFIGS / "math_grpo.yaml")])
    assert refused.exit_code == 2 and "no config.json" in refused.stderr
