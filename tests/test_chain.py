"""The lab's task: arithmetic, splits, verifier, options. And every lab configuration."""
from __future__ import annotations

import random
from collections import Counter

import pytest

from helpers_lab import CONFIGS
from poise_hpc import config
from poise_hpc.tasks import chain
from poise_hpc.tasks.base import PURPOSES, Problem, load_task
from poise_hpc.tasks.chain import Chain, Mix
from poise_hpc.types import UsageError


def tokens(text: str) -> list[int]:
    from poise_hpc.tasks.chain_model import tokens as encode_response
    return [t for part in text.split("<eos>") for t in [*encode_response(part), chain.ID["<eos>"]]][:-1]


def test_running_values_by_hand():
    # 47 + 08 = 45 (4+0, 7+8=15 -> 5);  45 * 13 = 45 (4*1, 5*3=15 -> 5);  45 - 91 = 54 (4-9=-5 -> 5, 5-1)
    steps = [("+", 0, 8), ("*", 1, 3), ("-", 9, 1)]
    assert chain.running_values((4, 7), steps) == [(4, 5), (4, 5), (5, 4)]
    assert chain.write_prompt((4, 7), steps) == "+08*13-91......47="


@pytest.mark.parametrize("operator", "+-*")
def test_every_step_is_a_permutation_so_that_a_guess_is_worth_one_percent(operator):
    for y in chain.OPERANDS[operator]:
        assert {chain.fact(operator, x, y) for x in range(10)} == set(range(10))


def test_answers_are_spread_evenly():
    answers = Counter(p.answer for p in Chain().problems("hard", "selection", 2000))
    assert len(answers) == 100 and max(answers.values()) < 45  # 20 expected each


def test_the_vocabulary_reads_completions():
    text = "45;45;54;<a>54</a><eos>"
    assert "".join(Chain().vocabulary()["symbols"][t] for t in tokens(text)) == text == Chain().show(tokens(text))


def test_prompts_have_one_length_and_the_longest_response_fits():
    for index in range(200):
        assert len(Chain().train_problem(0, index).prompt) == chain.PROMPT_TOKENS == 19
    longest = "00;" * 5 + "<a>00</a><eos>"
    assert len(tokens(longest)) == 20 <= chain.MAX_NEW_TOKENS


@pytest.mark.parametrize("response, valid, correct", [
    ("<a>54</a><eos>", True, True),
    ("45;45;54;<a>54</a><eos>", True, True),
    ("4;;9<a>54</a><eos>", True, True),            # the scratch-pad is not judged
    ("45;45;54;<a>45</a><eos>", True, False),
    ("54</a><eos>", False, False),                 # never opened
    ("<a>54<eos>", False, False),                  # never closed
    ("<a>5</a><eos>", False, False),
    ("<a>054</a><eos>", False, False),
    ("<a>54</a><a>54</a><eos>", False, False),     # two answers
    ("<a>54</a>;<eos>", False, False),             # not right before the end
    ("+<a>54</a><eos>", False, False),             # a foreign symbol
    ("<a>54</a>", False, False),                   # no end
    ("<eos>", False, False),
])
def test_verifier(response, valid, correct):
    problem = Problem("", (), "54", "easy")
    [grade] = Chain().grade([problem], [tokens(response)], [False])
    assert (grade.valid, grade.correct, grade.reward) == (valid, correct, float(correct))
    assert grade.components == {"correct": float(correct), "format": float(valid)}


def test_a_truncated_response_is_never_valid():
    [grade] = Chain().grade([Problem("", (), "54", "easy")], [tokens("<a>54</a><eos>")], [True])
    assert not grade.valid and not grade.correct and grade.reward == 0


def test_tokens_beyond_the_vocabulary_are_invalid_not_an_error():
    [grade] = Chain().grade([Problem("", (), "54", "easy")], [[999, -1, *tokens("<a>54</a><eos>")]], [False])
    assert not grade.valid


def test_reward_composition():
    task = Chain({"correct_reward": 2.0, "format_reward": 0.5})
    right, wrong, broken = task.grade([Problem("", (), "54", "easy")] * 3,
                                      [tokens("<a>54</a><eos>"), tokens("<a>55</a><eos>"), tokens("54<eos>")], [False] * 3)
    assert (right.reward, wrong.reward, broken.reward) == (2.5, 0.5, 0.0)


def test_train_selection_and_confirmation_are_disjoint():
    # The shortest problems are the fewest: 24,000 prompts. If sets overlapped, they would here.
    shortest = {"steps": [1, 1], "times": 1 / 3}
    task = Chain({"train": shortest, "splits": {"one": shortest}})
    sets = {purpose: {p.id for p in task.problems("one", purpose, 500)} for purpose in PURPOSES}
    sets["train"] = {task.train_problem(seed, index).id for seed in range(4) for index in range(1000)}
    assert all(len(ids) >= 500 for ids in sets.values())
    assert not sets["selection"] & sets["confirmation"]
    assert not sets["train"] & (sets["selection"] | sets["confirmation"])


def test_lists_are_fixed_distinct_and_grow_at_the_end():
    few, many = (Chain().problems("easy", "selection", n) for n in (10, 300))
    assert many[:10] == few
    assert len({p.id for p in many}) == 300


def test_train_problem_is_a_pure_function_of_seed_and_index():
    drawn = {(seed, index): Chain().train_problem(seed, index) for seed in (0, 1) for index in range(50)}
    assert len({p.id for p in drawn.values()}) > 95
    assert all(Chain().train_problem(*key) == p for key, p in drawn.items())


def test_a_split_is_made_as_its_mix_says():
    problems = Chain().problems("hard", "selection", 400)
    operators = "".join(c for p in problems for c in p.id if c in "+-*")
    assert len(operators) == 5 * 400
    assert abs(operators.count("*") / len(operators) - 0.4) < 0.04
    assert {p.id.count(".") for p in Chain().problems("easy", "selection", 50)} == {9, 12}  # 1 or 2 of 5 steps


def test_the_data_hash_tells_options_apart():
    assert Chain().data_sha256() == Chain().data_sha256()
    assert Chain().data_sha256() != Chain({"format_reward": 0.1}).data_sha256()


@pytest.mark.parametrize("change, message", [
    ({"task": {"name": "chian"}}, "did you mean 'chain'"),
    ({"task": {"name": "no.such.module:Task"}}, "cannot be loaded"),
    ({"task": {"options": {"formt_reward": 1.0}}}, "did you mean 'format_reward'"),
    ({"task": {"options": {"train": {"steps": [0, 9], "times": 0.2}}}}, "within 1..5"),
    ({"task": {"options": {"train": {"steps": [1, 2], "times": "many"}}}}, "task.options.train.times"),
    ({"model": {"options": {"d": 64, "heads": 5}}}, "multiple of 'heads'"),
    ({"model": {"options": {"layer": 2}}}, "did you mean 'layers'"),
    ({"evaluate": {"benchmarks": {"a": {"split": "hrd", "problems": 1, "samples": 1, "metrics": {"acc@1": 1.0}}}}}, "did you mean 'hard'"),
])
def test_bad_options_name_the_key(change, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        load_task(config.parse(change))


@pytest.mark.parametrize("arguments, message", [
    (("hrd", "selection", 1), "did you mean 'hard'"),
    (("hard", "test", 1), "selection, confirmation"),
])
def test_bad_questions_name_what_is_known(arguments, message):
    with pytest.raises(UsageError, match=message):
        Chain().problems(*arguments)


def test_asking_for_more_problems_than_there_are_says_so(monkeypatch):
    fixed = Problem("x", (), "00", "easy")
    monkeypatch.setattr(chain, "draw", lambda *a: fixed)
    with pytest.raises(UsageError, match="found 1"):
        Chain().problems("easy", "selection", 2)


def test_a_task_of_ones_own_is_found_by_its_path():
    assert isinstance(load_task(config.parse({"task": {"name": "poise_hpc.tasks.chain:Chain"}})), Chain)


def test_draw_keeps_to_the_purpose():
    rng = random.Random(0)
    for purpose in ("train", *PURPOSES):
        assert chain.purpose_of(chain.draw(rng, Mix(steps=(2, 4), times=0.5), purpose, "s").id) == purpose


@pytest.mark.parametrize("name", ["base", "big", "stress", "demo", "tiny"])
def test_lab_configs_load_with_their_task(name):
    load_task(config.load(CONFIGS / f"{name}.yaml"))


def test_base_config_is_the_defaults():
    assert config.load(CONFIGS / "base.yaml") == config.Config()
