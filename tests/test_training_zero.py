"""ZeRO stages, numbers of ranks and ways to save memory: all the same gradient."""
from __future__ import annotations

from pathlib import Path

import helpers_training as h
import pytest
import torch
from transformers import AutoModelForCausalLM

from poise_hpc import config
from poise_hpc.settings import read
from poise_hpc.training import checkpoint
from poise_hpc.training.engine import Engine
from poise_hpc.training.policy import Policy
from poise_hpc.training.ranks import Ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lean")
    for processes in [h.spawn(world, "lean", str(folder / f"{world}.pt")) for world in (1, 2)]:
        h.finish(processes)
    return {world: torch.load(folder / f"{world}.pt", weights_only=False) for world in (1, 2)}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_lean_gradients_are_the_plain_ones(found, kind, world, stage):
    """Head in pieces, layers recomputed, microbatches of 40 tokens, cut inside groups, with an entropy term."""
    plain, lean = found[1][kind, "float32", None], found[world][kind, "float32", stage]
    assert lean["row"]["gradient_norm"] == pytest.approx(plain["row"]["gradient_norm"], rel=1e-4)
    assert lean["row"]["loss"] == pytest.approx(plain["row"]["loss"], abs=1e-5)
    assert lean["gradient"].keys() == plain["gradient"].keys()
    for name, g in plain["gradient"].items():
        torch.testing.assert_close(lean["gradient"][name], g, atol=5e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_bfloat16_gradients_point_the_same_way(found, world, stage):
    """Sampled by bfloat16 weights, too: the rows are those of the plain run in bfloat16."""
    results = found[1]["qwen2", "bfloat16", None], found[world]["qwen2", "bfloat16", stage]
    plain, lean = (torch.cat([g.flatten() for g in r["gradient"].values()]) for r in results)  # clipped: the direction
    assert torch.cosine_similarity(plain, lean, dim=0) > 0.995
    assert results[1]["row"]["gradient_norm"] == pytest.approx(results[0]["row"]["gradient_norm"], rel=0.03)


@pytest.mark.parametrize("stage", range(4))
def test_many_microbatches_add_up_in_bfloat16(stage):
    """64 microbatches against the float32 sum of their gradients, each of a backward of its own. Summed in bfloat16 it is off by 8e-3."""
    h.start_alone()
    policies = [Policy(h.tiny_model("qwen2").to(torch.bfloat16), 1.0) for _ in range(2)]
    engine = Engine(policies[0], h.make_config({"zero_stage": stage, "gradient_clip": 1e9}).train, "bfloat16", Ranks())
    wanted, draw = torch.zeros(sum(p.numel() for p in policies[1].parameters())), torch.Generator().manual_seed(0)
    for _ in range(64):
        batch = [[2, 3, 4]], torch.zeros(4, dtype=torch.long), torch.randint(3, 16, (4, 6), generator=draw), torch.full((4,), 6)
        A = torch.randn(4, 1, generator=draw)
        engine.backward((engine(*batch)[0] * A).sum())
        policies[1].zero_grad()
        (policies[1](*batch)[0] * A).sum().backward()
        wanted += torch.cat([p.grad.flatten().float() for p in policies[1].parameters()])
    engine.step(1e-9)
    found = torch.cat([10 * engine._whole(p, "exp_avg").flatten() for _, p in engine._parameters()])
    assert (found - wanted).norm() < 3e-3 * wanted.norm()  # ZeRO-1 rounds the sum once


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_spread_weights_are_saved_whole_and_never_held_whole(kind, tmp_path):
    """ZeRO-3 with a sampler that has weights of its own. GPT-2's head is its embedding."""
    h.start_alone()
    start = h.tiny_model(kind)
    start.save_pretrained(tmp_path / "start")
    engine = Engine(Policy(h.tiny_model(kind), 1.0), h.make_config({"zero_stage": 3}).train, "float32", Ranks(), sampled=False)
    name, _ = checkpoint.snapshot(tmp_path, 1, engine.model, engine.weights(), tmp_path / "start")
    saved, wanted = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "snapshots" / name, tmp_path / "start"))
    assert saved.keys() == wanted.keys() and all(saved[k].equal(wanted[k]) for k in wanted)
    assert sum(p.numel() for m in engine._engine.modules() for p in m.parameters(recurse=False)) == 0
    with pytest.raises(AssertionError, match="sampled=False"):
        engine.full_model()


FRAGMENTS = sorted((Path(__file__).parents[1] / "configs" / "deepspeed").glob("*.yaml"))


@pytest.fixture(scope="module")
def plain():
    h.start_alone()
    return {k: v for k, v in h.make_trainer(h.make_config()).step(0)[0].items() if k != "components"}


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda p: p.stem)
def test_fragments_train_and_resume(plain, tmp_path, path):
    """As they are shipped, offload included; in float32, so that there is something to compare with."""
    train = read(path)["train"]
    trainer, resumed = (h.make_trainer(h.make_config(train)) for _ in range(2))
    row = trainer.step(0)[0]
    assert {k: v for k, v in row.items() if k != "components"} == pytest.approx(plain, rel=1e-4, abs=1e-5)
    trainer.engine.save(tmp_path)
    resumed.engine.load(tmp_path)
    assert resumed.step(1)[0] == trainer.step(1)[0]


def test_fragments_are_laid_over_a_config(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"base: [{FRAGMENTS[0].parents[1] / 'math_grpo.yaml'}, {FRAGMENTS[-1]}]\ntrain: {{steps: 9}}\n")
    loaded = config.load(tmp_path / "mine.yaml").train
    assert (loaded.zero_stage, loaded.steps, loaded.learning_rate) == (3, 9, 1e-6)
    assert loaded.deepspeed["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_no_whole_weights_lie_beside_the_update(monkeypatch):
    """Under ZeRO-3 the transformers engine samples from whole weights, and leaves nothing of them for the update."""
    h.start_alone()
    trainer, seen = h.make_trainer(h.make_config({"zero_stage": 3})), {}
    for name in ("sample", "update"):
        real = getattr(trainer, name)

        def watched(*args, name=name, real=real):
            seen.setdefault(name, []).append(sum(p.numel() for p in trainer.engine._copy.parameters()))
            return real(*args)

        monkeypatch.setattr(trainer, name, watched)
    trainer.step(0)
    assert seen == {"sample": [h.tiny_model("qwen2").num_parameters()], "update": [0] * 4}
