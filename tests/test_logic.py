"""Knights and knaves: puzzles by hand, uniqueness, disjoint purposes, marks."""
from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from helpers_text import model_folder

from poise_hpc import config as configuration
from poise_hpc.settings import overlay, read
from poise_hpc.tasks.base import load_task, summary
from poise_hpc.tasks.logic import NAMES, Logic, draw, say, sentence, solutions, true, write
from poise_hpc.types import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def task(folder):
    return Logic({"max_new_tokens": 32, "reward": {"correct": 1.0, "format": 0.5}}, {"path": str(folder)})


def test_a_puzzle_by_hand():
    # Ann: "Bob is a knave." Bob: "Ann and I are of the same kind." If Ann were a knave, Bob would be a knight, so both of one
    # kind: contradiction. So Ann is a knight, Bob a knave (and lies, they differ).
    puzzle = [("is", 1, False), ("same", 1, 0, True)]
    assert solutions(puzzle) == [(True, False)]
    assert sentence(puzzle[0]) == "Bob is a knave." and sentence(puzzle[1]) == "Ann and I are of the same kind."


def test_statements_by_hand():
    roles = (True, False, True)
    assert true(("count", 2), roles) and not true(("count", 1), roles)
    assert true(("either", 0, False, 1, False), roles) and not true(("either", 0, False, 1, True), roles)
    assert true(("same", 0, 2, True), roles) and true(("same", 0, 1, False), roles)


def test_a_puzzle_without_and_with_two_solutions():
    assert solutions([("is", 1, False), ("is", 0, True)]) == []                           # "Bob lies", "Ann is honest"
    assert solutions([("is", 1, False), ("is", 0, False)]) == [(True, False), (False, True)]


def test_speakers_keep_to_their_kind_and_others():
    rng = random.Random(0)
    for _ in range(300):
        roles = tuple(rng.random() < 0.5 for _ in range(rng.randint(2, 5)))
        speaker = rng.randrange(len(roles))
        statement = say(rng, roles, speaker)
        assert true(statement, roles) == roles[speaker]
        assert statement[0] in ("same", "count") or speaker not in statement[1::2]


def test_every_answer_solves_the_text():
    """The text is read back and tried against all roles: an independent check of words, statements and answer."""
    for i in range(40):
        text, answer = draw(random.Random(i), (2, 5), "train")
        said = [_read(part, NAMES[k]) for k, part in enumerate(re.findall(r'says: "([^"]*)"', text))]
        fits = [roles for roles in range(2 ** len(said)) if all(
            fact(dict(zip(NAMES, _bits(roles, len(said))))) == kind for fact, kind in zip(said, _bits(roles, len(said))))]
        assert len(fits) == 1 and "".join("NK"[b] for b in _bits(fits[0], len(said))) == answer


def _bits(roles, n):
    return [bool(roles >> k & 1) for k in range(n)]


def _read(text, speaker):
    """A sentence as a function of {name: is a knight} (the first n names count)."""
    if m := re.fullmatch(r"(\w+) is a (\w+), or (\w+) is a (\w+)\.", text):
        return lambda r: r[m[1]] == (m[2] == "knight") or r[m[3]] == (m[4] == "knight")
    if m := re.fullmatch(r"(\w+) is a (\w+)\.", text):
        return lambda r: r[m[1]] == (m[2] == "knight")
    if m := re.fullmatch(r"(\w+) and I are of (the same kind|different kinds)\.", text):
        return lambda r: (r[m[1]] == r[speaker]) == (m[2] == "the same kind")
    count = {"None of us is a knight.": 0, "Exactly one of us is a knight.": 1}.get(text)
    count = int(re.fullmatch(r"Exactly (\d) of us are knights\.", text)[1]) if count is None else count
    return lambda r: sum(r.values()) == count


def test_problems_are_pure_and_disjoint(folder, task):
    other = Logic({"max_new_tokens": 32}, {"path": str(folder)})
    assert [other.train_problem(0, i) for i in (7, 2)] == [task.train_problem(0, i) for i in (7, 2)]
    assert task.train_problem(0, 1) != task.train_problem(1, 1)
    ids = {purpose: {p.id for split in task.splits for p in task.problems(split, purpose, 20)} for purpose in ("selection", "confirmation")}
    ids["train"] = {task.train_problem(0, i).id for i in range(100)}
    assert len(ids["selection"]) == 60 and not ids["selection"] & ids["confirmation"]
    assert not ids["train"] & (ids["selection"] | ids["confirmation"])
    assert {len(p.answer) for p in task.problems("large", "selection", 20)} == {5, 6}


def test_marks(task):
    problem = task.problems("small", "selection", 1)[0]
    wrong = "".join("K" if c == "N" else "N" for c in problem.answer)
    responses = [rf"\boxed{{{problem.answer}}}", rf"\boxed{{{', '.join(problem.answer)}}}", rf"\boxed{{{wrong}}}", r"\boxed{KN}", problem.answer]
    grades = task.grade([problem] * 5, [task.tokenizer(r)["input_ids"] for r in responses], [False, True, False, False, False])
    assert [g.correct for g in grades] == [True, True, False, False, False]
    assert [g.valid for g in grades] == [True, True, True, False, False]
    assert [g.reward for g in grades] == [1.5, 1.0, 0.5, 0.0, 0.0]  # a truncated completion has no format


@pytest.mark.parametrize(("options", "message"), [
    ({"train": [1, 3]}, "within 2..8"), ({"splits": {"big": [4, 9]}}, "within 2..8"), ({"sizes": {}}, "task.options.sizes")])
def test_wrong_options(folder, options, message):
    with pytest.raises(UsageError, match=message):
        Logic(options, {"path": str(folder)})


def test_more_puzzles_than_there_are(task):
    with pytest.raises(UsageError, match="distinct"):
        Logic({"splits": {"two": [2, 2]}}, {"path": str(task.folder)}).problems("two", "selection", 1000)


def test_the_config(folder):
    path = Path(__file__).parents[1] / "configs" / "logic.yaml"
    conf = configuration.parse(overlay(read(path), {"model": {"path": str(folder)}}))
    task = load_task(conf)
    assert "1 correct + 0.1 format" in summary(conf)  # what an author of algorithms is told
    assert task.splits == ("small", "medium", "large") and len(task.data_sha256()) == 64
    assert task.data_sha256() != Logic({"train": [2, 4]}, {"path": str(folder)}).data_sha256()


def test_the_text_names_everybody():
    text = write([("count", 0), ("count", 1), ("count", 2)])
    assert "You meet Ann, Bob and Cid." in text and 'Ann says: "None of us is a knight."' in text
