"""The mathematics task on generated problems: prompts, order, disjoint purposes, marks, hashes; configs."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers_text import generated, math_options, model_folder, problem_sets, write_rows

from poise_hpc import config as configuration
from poise_hpc import data
from poise_hpc.settings import overlay, read
from poise_hpc.tasks.base import file_sha256, load_task, run_prepare
from poise_hpc.tasks.math import Math
from poise_hpc.tasks.text import read_template
from poise_hpc.types import PoiseError, UsageError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("it's a \"folder\"")
    return model_folder(root / "model"), problem_sets(root / "sets")


def make(folders, **change):
    return Math(math_options(folders[1], **change), {"path": str(folders[0])})


@pytest.fixture(scope="module")
def task(folders):
    return make(folders)


def text(task, problem):
    return task.show(problem.prompt)


def complete(task, response):
    return task.tokenizer(response)["input_ids"]


# --- prompts and order

def test_a_prompt_is_the_template_around_the_problem(task):
    problem = task.train_problem(0, 0)
    row = next(r for r in task.train_rows if f"drill/{r.id}" == problem.id)
    assert text(task, problem) == read_template("qwen-boxed").replace("{problem}", row.problem)
    assert text(task, problem).endswith("<|im_end|>\n<|im_start|>assistant\n") and problem.answer == row.answer
    assert problem.prompt[0] == task.tokenizer.get_vocab()["<|im_start|>"]  # one token, not its characters


def test_braces_in_a_problem_stay(folders, task):
    assert r"\frac{1}{2} {problem}" in task.show(task.encode(r"\frac{1}{2} {problem}"))


def test_each_epoch_is_a_permutation_of_its_own(task):
    epochs = [[task.train_problem(0, 50 * e + i).id for i in range(50)] for e in range(3)]
    assert all(sorted(e) == sorted(epochs[0]) and len(set(e)) == 50 for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_training_problems_are_pure_and_seeded(folders, task):
    other = make(folders)
    assert [other.train_problem(1, i) for i in (99, 3, 51)] == [task.train_problem(1, i) for i in (99, 3, 51)]
    assert [task.train_problem(0, i).id for i in range(50)] != [task.train_problem(1, i).id for i in range(50)]


def test_levels_are_chosen(folders, task):
    assert {row.level for row in task.train_rows} == {3, 4, 5} and len(task.train_rows) == 50
    assert {row.level for row in make(folders, train={"set": "drill", "levels": None, "problems": None}).train_rows} == {1, 2, 3, 4, 5}


def test_too_few_training_problems(folders):
    with pytest.raises(UsageError, match=r"'drill' has 60 problems of levels \[3, 4, 5\] .* 61 were asked for"):
        make(folders, train={"set": "drill", "problems": 61}).train_problem(0, 0)


def test_prepare_misses_training_problems_before_anything_trains(folders, tmp_path):
    config = configuration.parse({
        "task": {"name": "math", "options": math_options(folders[1], train={"set": "drill", "problems": 61})},
        "model": {"source": "path", "path": str(folders[0])},
        "evaluate": {"benchmarks": {"exam": {"split": "exam", "problems": 12, "samples": 1, "metrics": {"acc@1": 1.0}}}}})
    with pytest.raises(UsageError, match="61 were asked for"):
        run_prepare({"config": config.dump()}, tmp_path)


def test_long_prompts_leave_training_and_stop_an_evaluation(folders, task):
    longest = max(len(task.encode(row.problem)) for row in task.train_rows)
    shorter = make(folders, max_prompt_tokens=longest - 1)
    assert 0 < len(shorter.train_rows) < 50
    with pytest.raises(PoiseError, match="max_prompt_tokens allows 5"):
        make(folders, max_prompt_tokens=5).problems("exam", "selection", 1)


# --- purposes

def test_no_problem_is_in_two_of_training_selection_and_confirmation(tmp_path, folders):
    exam, own, extra = generated(8, 1), generated(6, 2, 5), generated(5, 3)
    for name, rows in (("exam", exam), ("holdout", exam[:3] + extra), ("drill", own + [r | {"level": 5} for r in (exam[4], extra[0])])):
        data.import_file(name, write_rows(tmp_path / f"{name}.raw.jsonl", rows), tmp_path)
    task = Math(math_options(tmp_path, train={"set": "drill", "problems": None}), {"path": str(folders[0])})
    prompts = {purpose: {p.prompt for p in task.problems("exam", purpose, n)} for purpose, n in (("selection", 8), ("confirmation", 5))}
    prompts["train"] = {task.train_problem(0, i).prompt for i in range(6)}
    assert [len(prompts[k]) for k in ("selection", "confirmation", "train")] == [8, 5, 6]  # 3 and 2 were left out
    assert not prompts["selection"] & prompts["confirmation"] and not prompts["train"] & (prompts["selection"] | prompts["confirmation"])


def test_one_set_for_both_purposes_is_halved(folders):
    task = make(folders, splits={"exam": {"selection": "exam", "confirmation": "exam"}})
    counts = {p: next(n for n in range(12, 0, -1) if _has(task, p, n)) for p in ("selection", "confirmation")}
    assert sum(counts.values()) == 12
    ids = [{x.id for x in task.problems("exam", p, n)} for p, n in counts.items()]
    assert not ids[0] & ids[1]


def _has(task, purpose, count):
    try:
        return bool(task.problems("exam", purpose, count))
    except UsageError:
        return False


def test_a_shorter_list_is_a_prefix(task):
    assert task.problems("exam", "selection", 12)[:5] == task.problems("exam", "selection", 5)


@pytest.mark.parametrize(("split", "purpose", "count", "message"), [
    ("exan", "selection", 1, "no split 'exan'; did you mean 'exam'"), ("exam", "training", 1, "a purpose is one of"),
    ("exam", "selection", 13, "has 12 selection problems .* asks for 13"), ("alone", "confirmation", 1, "splits.alone.confirmation")])
def test_what_is_not_there(folders, split, purpose, count, message):
    task = make(folders, splits={"exam": {"selection": "exam", "confirmation": "holdout"}, "alone": {"selection": "exam"}})
    with pytest.raises(UsageError, match=message):
        task.problems(split, purpose, count)


# --- marks

def test_marks(folders):
    task = make(folders, reward={"correct": 1.0, "format": 0.25, "length": 0.5}, max_new_tokens=20)
    problem = next(p for p in (task.train_problem(0, i) for i in range(50)))
    responses = [rf"so \boxed{{{problem.answer}}}<|endoftext|>", rf"\boxed{{{problem.answer}.0}}", r"\boxed{1}<|endoftext|>", "no<|endoftext|>"]
    tokens = [complete(task, r) for r in responses]
    right, cut, wrong, none = task.grade([problem] * 4, tokens, [False, True, False, False])
    brevity = [1 - len(t) / 20 for t in tokens]
    # R = 1 * correct + 0.25 * format + 0.5 * (1 - tokens / 20)
    assert right.reward == pytest.approx(1.25 + 0.5 * brevity[0]) and right.correct and right.valid
    assert cut.reward == pytest.approx(1.0 + 0.5 * brevity[1]) and cut.correct and cut.components["format"] == 0
    assert wrong.reward == pytest.approx(0.25 + 0.5 * brevity[2]) and wrong.valid and not wrong.correct
    assert none.reward == pytest.approx(0.5 * brevity[3]) and not none.valid
    assert right.components == {"correct": 1.0, "format": 1.0, "length": pytest.approx(brevity[0]), "grader_failed": 0.0}


def test_a_response_cannot_box_its_way_past_the_end(task):
    problem = task.train_problem(0, 0)
    tokens = complete(task, r"\boxed{1}") + complete(task, rf"\boxed{{{problem.answer}}}")
    assert [g.correct for g in task.grade([problem] * 2, [tokens, tokens[:-1]], [False, False])] == [True, False]


# --- hashes and errors

def test_the_hash_knows_what_numbers_depend_on(folders, task, tmp_path):
    changed = [make(folders, template="plain-boxed"), make(folders, eos_token="<|im_end|>"), make(folders, max_prompt_tokens=512),
               make(folders, train={"set": "drill", "levels": [5], "problems": 10}), make(folders, splits={"exam": {"selection": "exam"}})]
    assert make(folders).data_sha256() == task.data_sha256()
    assert len({t.data_sha256() for t in (task, *changed)}) == 6


def test_changed_problems_stop_a_job(tmp_path, folders):
    sets = problem_sets(tmp_path)
    conf = configuration.parse(CONFIG(folders[0], sets))
    prepared = load_task(conf).data_sha256()
    assert load_task(conf, prepared).name == "math"
    data.import_file("exam", write_rows(tmp_path / "new.jsonl", generated(12, 9)), tmp_path, replace=True)
    with pytest.raises(PoiseError, match="have changed since this campaign was prepared"):
        load_task(conf, prepared)
    (tmp_path / "exam.jsonl").write_text("{}\n")
    with pytest.raises(PoiseError, match="could not be compared"):
        load_task(conf).data_sha256()


def CONFIG(model, sets):
    return {"task": {"name": "math", "options": math_options(sets)}, "model": {"source": "path", "path": str(model)},
            "evaluate": {"benchmarks": {"exam": {"split": "exam", "problems": 12, "samples": 1, "metrics": {"acc@1": 1.0}}}}}


@pytest.mark.parametrize(("change", "message"), [
    ({"data": "relative"}, "an absolute path"), ({"template": "qwen-boxd"}, "did you mean 'qwen-boxed'"), ({"dta": "x"}, "task.options.dta"),
    ({"train": {"set": "none"}}, "data fetch none"), ({"reward": {"corect": 1.0}}, "corect"), ({"verifier": "sympy"}, "verifier")])
def test_wrong_options(folders, change, message):
    with pytest.raises(UsageError, match=message):
        make(folders, **change)


def test_wrong_models(folders, tmp_path):
    with pytest.raises(UsageError, match="set model.source: path"):
        Math(math_options(folders[1]), {})
    with pytest.raises(UsageError, match="has no tokenizer"):
        Math(math_options(folders[1]), {"path": str(tmp_path)})
    with pytest.raises(UsageError, match="no token '<end>'"):
        make(folders, eos_token="<end>").eos_id


def test_the_vocabulary_names_the_tokenizer_by_its_content(task):
    found = task.vocabulary()
    assert found["tokenizer"] == task.folder.name and found["files"]["tokenizer.json"] == file_sha256(task.folder / "tokenizer.json")


def test_eos_and_pad(folders, task):
    assert (task.eos_id, task.pad_id) == (0, 0)
    assert make(folders, eos_token="<|im_end|>").eos_id == task.tokenizer.get_vocab()["<|im_end|>"]


def test_a_template_holds_the_problem_once(tmp_path):
    (tmp_path / "none.txt").write_text("Solve.")
    with pytest.raises(UsageError, match="exactly once"):
        read_template(str(tmp_path / "none.txt"))


def test_tasks_and_graders_need_no_torch():
    code = ("import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['sympy'] = sys.modules['math_verify'] = None\n"
            "import poise_hpc.tasks.math, poise_hpc.tasks.logic, poise_hpc.data\n"
            "from poise_hpc.tasks.grading import Grader\nassert Grader('rules', 1, 1.0).verdicts([('1', '1')]) == ['equal']")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- configs

def test_the_papers_setting():
    conf = configuration.load(CONFIGS / "math_grpo.yaml")
    assert (conf.train.learning_rate, conf.rollout.prompts, conf.rollout.group_size, conf.train.zero_stage, conf.model.dtype) == (1e-6, 256, 8, 2, "bfloat16")
    assert conf.train.steps == 8 * 5000 // 256 and conf.search.candidates + 1 == 64 and conf.search.candidates // conf.search.per_parent == 21
    b = conf.evaluate.benchmarks
    assert {n: (x.problems, x.samples, x.temperature, x.metrics) for n, x in b.items()} == {
        "aime24": (30, 32, 1.0, {"pass@32": 0.2}), "aime25": (30, 32, 1.0, {"pass@32": 0.2}), "amc": (83, 32, 1.0, {"pass@32": 0.15}),
        "math500": (500, 1, 0.0, {"acc@1": 0.15}), "minerva": (272, 1, 0.0, {"acc@1": 0.15}), "olympiadbench": (674, 1, 0.0, {"acc@1": 0.15})}
    assert all(x.problems == data.manifest()[x.split]["count"] for x in b.values())
    assert conf.task.options["max_new_tokens"] == 3072 and conf.task.options["train"] == {"set": "math-train", "levels": [3, 4, 5], "problems": 5000}
    assert conf.evaluate.at == (1.0,) and conf.evaluate.score == "final"


def whole_sets(folder):
    """Generated stand-ins for every set of the manifest, with its count; MATH-500 is a part of the MATH test split."""
    test = generated(5000, 1)
    rows = {name: generated(entry["count"], i + 10, 4) for i, (name, entry) in enumerate(data.manifest().items())}
    for name, own in (rows | {"math-test": test, "math500": test[:500]}).items():
        data.import_file(name, write_rows(folder / f"{name}.raw.jsonl", own), folder)
    return folder


def test_the_papers_setting_with_sets_in_place(tmp_path, folders):
    sets = whole_sets(tmp_path)
    for name in ("math_grpo", "math_small", "math_confirm"):
        change = {"task": {"options": {"data": str(sets), "verifier": "rules"}}, "model": {"path": str(folders[0])}}
        conf = configuration.parse(overlay(read(CONFIGS / f"{name}.yaml"), change))
        task = load_task(conf)
        purpose = "confirmation" if name == "math_confirm" else "selection"
        for benchmark in conf.evaluate.benchmarks.values():
            assert len(task.problems(benchmark.split, purpose, benchmark.problems)) == benchmark.problems
        assert len(task.train_rows) == 5000
    # What the confirmation has: the test problems outside MATH-500 (generated sets may share a sum or two).
    _, rows = task._evaluated("math500", "confirmation")
    assert 4400 < len(rows) <= 4500 and not {r.key for r in rows} & task._keys("selection")
