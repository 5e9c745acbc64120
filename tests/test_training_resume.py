"""A run goes on from its checkpoint: with as many ranks to the bit, with another number to rounding."""
from __future__ import annotations

import json

import helpers_training as h
import pytest
import torch

from poise_hpc import files
from poise_hpc.training import checkpoint
from poise_hpc.types import PoiseError


@pytest.fixture(scope="module")
def alone():
    h.start_alone()


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.engine.full_model().parameters()])


@pytest.mark.parametrize("dtype, stage", [("float32", 0), ("float32", 2), ("float32", 3), ("bfloat16", 0), ("bfloat16", 3)])
def test_state_that_was_saved_is_all_there_is(alone, tmp_path, dtype, stage):
    conf = h.make_config({"zero_stage": stage}, model={"dtype": dtype})
    first, second = h.make_trainer(conf), h.make_trainer(conf)
    for step in range(2):
        first.step(step)
    first.engine.save(tmp_path)
    second.engine.load(tmp_path)
    assert weights(second).equal(weights(first))
    assert second.step(2)[0] == first.step(2)[0] and weights(second).equal(weights(first))


def test_a_checkpoint_before_the_first_update_does_not_count_one(alone, tmp_path):
    conf = h.make_config({"zero_stage": 2})
    first, second, undisturbed = (h.make_trainer(conf) for _ in range(3))
    first.engine.save(tmp_path)
    second.engine.load(tmp_path)
    rows = [t.step(0)[0] for t in (first, second, undisturbed)]
    assert rows[0] == rows[1] == rows[2] and weights(first).equal(weights(undisturbed)) and weights(second).equal(weights(undisturbed))


def test_another_zero_stage_goes_on_too(alone, tmp_path):
    rows = []
    first = h.make_trainer(h.make_config({"zero_stage": 3}))
    first.step(0)
    first.engine.save(tmp_path)
    for stage in range(3):
        trainer = h.make_trainer(h.make_config({"zero_stage": stage}))
        trainer.engine.load(tmp_path)
        rows.append({k: v for k, v in trainer.step(1)[0].items() if k != "components"})
    assert rows[1] == pytest.approx(rows[0], rel=1e-4, abs=1e-5) and rows[2] == pytest.approx(rows[0], rel=1e-4, abs=1e-5)


def test_weights_of_another_model_are_refused(alone, tmp_path):
    trainer = h.make_trainer(h.make_config())
    trainer.step(0)
    trainer.engine.save(tmp_path)
    with pytest.raises(PoiseError, match="tensors of another model"):
        h.make_trainer(h.make_config(), kind="gpt2").engine.load(tmp_path)


def curves(attempt):
    return [{k: v for k, v in row.items() if k != "components"} for row in files.read_lines(attempt / "curves.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    attempt = h.write_job(tmp_path_factory.mktemp("undisturbed"), h.make_config())
    h.finish(h.spawn(1, "job", str(attempt)))
    return curves(attempt)


@pytest.mark.parametrize("stage, before, after", [
    (0, 2, 1), (2, 1, 2),
    *(pytest.param(stage, *ranks, marks=pytest.mark.slow) for stage in range(4) for ranks in ((1, 2), (2, 1)) if (stage, *ranks) not in ((0, 2, 1), (2, 1, 2))),
])
def test_another_number_of_ranks_goes_on(undisturbed, tmp_path, stage, before, after):
    conf = h.make_config({"zero_stage": stage})
    first = h.write_job(tmp_path, conf, "first")
    h.finish(h.spawn(before, "job", str(first), "update:18"), wanted=None)  # in step 4, after the checkpoint of step 4
    second = h.write_job(tmp_path, conf, "second", resume=[first])
    out = h.finish(h.spawn(after, "job", str(second)))
    assert f"with {after} ranks instead of {before}: equal to rounding" in out
    rows = curves(second)
    assert len(rows) == len(undisturbed) == 6
    for row, wanted in zip(rows, undisturbed):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert json.loads((second / "payload.json").read_text())["steps"] == 6


def test_ranks_alone_do_not_make_another_recipe(alone, tmp_path):
    from poise_hpc.training.ranks import Ranks

    trainer, recipe = h.make_trainer(h.make_config()), {"ranks": 4, "seed": 3}
    trainer.step(0)
    checkpoint.save(tmp_path, checkpoint.Progress(1, recipe, {}, [], {}), trainer.engine, Ranks())
    assert checkpoint.newest([tmp_path], recipe | {"ranks": 8}) is not None
    assert checkpoint.newest([tmp_path], recipe | {"seed": 4}) is None
