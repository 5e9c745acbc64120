"""The lab's start model, and the cache of start models."""
from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from helpers_lab import silent, tiny
from poise_hpc.tasks import base, cache, chain_model
from poise_hpc.tasks.base import Problem, load_task, run_prepare, weights_sha256
from poise_hpc.tasks.cache import prepared_model
from poise_hpc.tasks.chain import FACTS, ID, MAX_NEW_TOKENS, PROMPT_TOKENS, SYMBOLS, Chain, Mix, fact, purpose_of
from poise_hpc.tasks.chain_model import STYLES, ModelOptions, tokens, trace, warm_start, wrong_table
from poise_hpc.types import PoiseError

FIVE = Mix(steps=(5, 5), times=0.4)


# --- traces


def test_wrong_table_is_wrong_and_of_the_wanted_size():
    wrong = wrong_table(random.Random(0), 0.3)
    assert len(wrong) == round(0.3 * len(FACTS)) == 72
    assert all(value != fact(*f) for f, value in wrong.items())


@pytest.mark.parametrize("style, valid", [(chain_model.scratch, 20), (chain_model.direct, 20), (chain_model.buggy, 20), (chain_model.broken, 0)])
def test_styles_are_readable_or_not(style, valid):
    responses = [[*tokens(style(random.Random(i), [(4, 5), (4, 5), (5, 4)])), ID["<eos>"]] for i in range(20)]
    grades = Chain().grade([Problem("", (), "54", "easy")] * 20, responses, [False] * 20)
    assert sum(g.valid for g in grades) == valid
    if style in (chain_model.scratch, chain_model.direct):
        assert all(g.correct for g in grades)


def test_every_style_fits_the_token_limit():
    for seed in range(50):
        for style in STYLES:
            assert len(tokens(style(random.Random(seed), [(9, 9)] * 5))) < MAX_NEW_TOKENS


def test_traces_teach_wrong_facts_always_in_the_first_phase_and_mostly_in_the_second():
    everything = {f: (fact(*f) + 1) % 10 for f in FACTS}  # one step, all facts wrong: right answers show the rate
    one = Mix(steps=(1, 1), times=0.0)

    def right(phase: int) -> float:
        traces = [trace(random.Random(i), one, phase, everything, 0.75) for i in range(2000)]
        plain = [(p, r) for p, r in traces if r.startswith("<a>") and r.endswith("</a>") and len(r) == 9]
        digits = [(int(r[3 + i]), fact(p[0], int(p[15 + i]), int(p[1 + i]))) for p, r in plain for i in (0, 1)]
        return sum(a == b for a, b in digits) / len(digits)

    assert right(0) == 0.0
    assert abs(right(1) - 0.25) < 0.06


def test_traces_never_show_an_evaluation_prompt():
    assert Counter(purpose_of(trace(random.Random(i), FIVE, 0, {}, 1.0)[0]) for i in range(500)) == {"train": 500}


def test_labels_are_the_response_and_its_end():
    ids, labels = chain_model.batch([("+08............47=", "<a>45</a>"),
                                     ("+08............47=", "45;<a>45</a>")])
    assert ids.shape == (2, PROMPT_TOKENS + 8) and labels.shape == (2, 8)
    assert labels[0].tolist() == [ID["<a>"], 4, 5, ID["</a>"], ID["<eos>"], -100, -100, -100]
    assert ids[1, PROMPT_TOKENS:].tolist() == labels[1].tolist()


# --- the model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    task = load_task(tiny())
    task.make_model(folder, silent)
    return folder


def test_the_same_recipe_gives_the_same_bytes(tiny_model, tmp_path):
    load_task(tiny()).make_model(tmp_path, silent)
    assert weights_sha256(tmp_path) == weights_sha256(tiny_model)


def test_another_seed_gives_another_model(tmp_path):
    short = {"d": 16, "layers": 1, "heads": 2, "steps": 2, "batch": 2}
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        warm_start(FIVE, ModelOptions(**short, seed=seed), tmp_path / str(seed), silent)
    assert weights_sha256(tmp_path / "0") != weights_sha256(tmp_path / "1")


def test_the_model_is_a_stock_class_that_has_learned_the_format(tiny_model):
    from transformers import AutoModelForCausalLM

    from poise_hpc.rollout.hf_engine import HFEngine

    task, model = load_task(tiny()), AutoModelForCausalLM.from_pretrained(tiny_model)
    assert type(model).__name__ == "GPT2LMHeadModel"
    problems = task.problems("easy", "selection", 64)
    out = HFEngine(model).generate([p.prompt for p in problems], 1, temperature=1.0, max_new_tokens=task.max_new_tokens,
                                   eos_id=task.eos_id, pad_id=task.pad_id, keys=list(range(64)))
    grades = task.grade(problems, [row[:n] for row, n in zip(out.tokens.tolist(), out.length.tolist())], out.truncated.tolist())
    assert sum(g.valid for g in grades) > 20  # random weights: 0


def test_warm_start_leaves_the_callers_generator_and_threads_alone(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    warm_start(FIVE, ModelOptions(d=8, layers=1, heads=1, steps=1, batch=1), tmp_path, silent)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.get_num_threads() == threads


# --- the cache


class Counting:
    """A task whose model is one small file; counts how often it is made."""

    name = "counting"

    def __init__(self, recipe: str = "a"):
        self.recipe, self.made = recipe, 0

    def train_problem(self, seed, index):
        return Problem("0", (0,), "", "train")

    def problems(self, split, purpose, count):
        return []

    def model_recipe(self):
        return {"recipe": self.recipe}

    def make_model(self, folder: Path, progress) -> None:
        self.made += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(self.recipe.encode() * 1000)


def test_a_model_is_made_once(tmp_path):
    task = Counting()
    first = prepared_model(task, tmp_path, silent)
    assert prepared_model(task, tmp_path, silent) == first and task.made == 1
    assert [p.name for p in (tmp_path / "models").iterdir()] == [first.name]  # nothing temporary is left


def test_another_recipe_is_another_entry(tmp_path):
    assert prepared_model(Counting("a"), tmp_path, silent) != prepared_model(Counting("b"), tmp_path, silent)


def test_recipe_names_every_option_and_the_code():
    plain = Chain().model_recipe()
    assert plain == Chain({"format_reward": 0.5}).model_recipe()  # the model does not depend on it
    assert plain != Chain({"train": {"steps": [1, 5], "times": 0.5}}).model_recipe()
    assert plain != Chain(None, {"steps": 661}).model_recipe()
    assert set(plain["sources"]) == {"chain.py", "chain_model.py"}
    json.dumps(plain)


@pytest.mark.parametrize("harm", [
    lambda f: (f / "model.safetensors").write_bytes(b"a" * 999),                   # truncated
    lambda f: (f / "model.safetensors").write_bytes(b"b" + b"a" * 999),            # a flipped bit
    lambda f: (f / "model.safetensors").unlink(),
    lambda f: (f / "manifest.json").write_text('{"files": {'),
    lambda f: (f / "manifest.json").write_text("[]"),
    lambda f: (f / "manifest.json").unlink(),
])
def test_a_damaged_entry_is_moved_aside_and_made_again(tmp_path, capsys, harm):
    task = Counting()
    folder = prepared_model(task, tmp_path, silent)
    harm(folder)
    assert prepared_model(task, tmp_path, silent) == folder
    assert task.made == 2 and (folder / "model.safetensors").read_bytes() == b"a" * 1000
    [aside] = [p for p in folder.parent.iterdir() if p != folder]
    assert aside.name in capsys.readouterr().out


def test_of_two_jobs_that_make_a_model_the_slower_takes_the_others(tmp_path):
    class Slow(Counting):
        def make_model(self, folder: Path, progress) -> None:
            super().make_model(folder, progress)
            self.other = prepared_model(Counting(), tmp_path, silent)  # finishes first

    task = Slow()
    assert prepared_model(task, tmp_path, silent) == task.other
    assert [p.name for p in (tmp_path / "models").iterdir()] == [task.other.name]


def test_a_failing_recipe_leaves_nothing(tmp_path):
    class Failing(Counting):
        def make_model(self, folder: Path, progress) -> None:
            super().make_model(folder, progress)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        prepared_model(Failing(), tmp_path, silent)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PoiseError, match="cannot create the model cache"):
        prepared_model(Counting(), tmp_path / "file", silent)


# --- the prepare job


def test_prepare_job_for_a_given_folder(tmp_path):
    config = tiny().dump()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    config["model"] = {"source": "path", "path": str(tmp_path)}
    payload = run_prepare({"config": config}, tmp_path)
    assert payload == {"model": str(tmp_path), "model_sha256": weights_sha256(tmp_path), "data_sha256": load_task(tiny()).data_sha256(),
                       "vocabulary": {"symbols": list(SYMBOLS)}}


@pytest.mark.parametrize("missing, message", [("config.json", "no Hugging Face model folder"), ("model.safetensors", "no \\*.safetensors")])
def test_prepare_job_refuses_a_folder_that_is_no_model(tmp_path, missing, message):
    for name in {"config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).write_text("{}")
    config = tiny().dump() | {"model": {"source": "path", "path": str(tmp_path)}}
    with pytest.raises(PoiseError, match=message):
        run_prepare({"config": config}, tmp_path)


def test_prepare_job_makes_the_model(tmp_path, monkeypatch):
    task = Counting()
    task.data_sha256 = lambda: "d"
    monkeypatch.setattr(base, "load_task", lambda config: task)
    payload = run_prepare({"config": tiny().dump(), "cache_dir": str(tmp_path)}, tmp_path)
    assert Path(payload["model"]).parent == tmp_path / "models" and payload["data_sha256"] == "d"
    assert cache.damage(Path(payload["model"])) == ""
