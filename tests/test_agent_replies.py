"""How replies are read: JSON in any wrapping, packages and edits as text; what goes back and when it has failed."""
from __future__ import annotations

import json

import pytest
from pydantic import BaseModel

from poise_hpc.agent.conversation import BadReply, Conversation, Malformed, find_object, json_schema, reads_json
from poise_hpc.agent.package_text import read_change, read_package, show_package
from poise_hpc.agent.propose import Ideas
from poise_hpc.reply import Reply


class Point(BaseModel):
    x: int
    tags: list[str]


GOOD = '{"x": 1, "tags": ["a", "b"]}'


@pytest.mark.parametrize("text", [
    GOOD,
    f"```json\n{GOOD}\n```",
    f"Sure! Instead of {{}}, here {{it}} is:\n\n```\n{GOOD}\n```\nHope {{}} that helps.",
    '{"x": 1, "tags": ["a", "b",],}',
    'The set {1, 2,} is "odd: {"x": 1, "tags": ["a", "b"]}',
], ids=["plain", "fenced", "prose", "trailing-commas", "odd-quote"])
def test_wrappings_are_forgiven(text):
    assert find_object(text) == json.loads(GOOD)


def test_raw_line_ends_and_commas_inside_strings_stay():
    assert find_object('{"code": "f(a,\n  [1,])"}') == {"code": "f(a,\n  [1,])"}


@pytest.mark.parametrize(("text", "problem"), [
    ("no json here", "holds no JSON object"),
    ('{"x": 1, "tags": ["a"', "no complete JSON object"),
    ('{"x": "one", "tags": []}', "x: .*integer"),
    ('{"x": 1}', "tags: Field required"),
    ('{"proposal": {"x": 1, "tags": []}}', "x: Field required"),
])
def test_what_is_missing_is_not_made_up(text, problem):
    with pytest.raises(BadReply, match=problem):
        reads_json(Point)(text)


def test_meaning_is_checked_too():
    with pytest.raises(BadReply, match="x is odd"):
        reads_json(Point, lambda p: ["x is odd"] if p.x % 2 else [])(GOOD)


def test_schemas_are_strict_all_the_way_down():
    def objects(node):
        if isinstance(node, dict):
            if "properties" in node:
                yield node
            for value in node.values():
                yield from objects(value)
        elif isinstance(node, list):
            for value in node:
                yield from objects(value)

    found = list(objects(json_schema(Ideas)))
    assert len(found) == 3  # Ideas, Idea, Hyperparameter
    assert all(o["additionalProperties"] is False and o["required"] == list(o["properties"]) for o in found)


class Scripted:
    """An LLM that says what it was told to, in order."""

    def __init__(self, *texts, finish="stop"):
        self.texts, self.finish, self.requests = list(texts), finish, []

    def complete(self, request):
        self.requests.append(request)
        return Reply("m", self.texts.pop(0), self.finish, "", 1, 1)


def test_a_bad_reply_goes_back_once_with_the_reason():
    llm = Scripted("no json", GOOD)
    talk = Conversation(llm, "propose", "c0007")
    assert talk.ask("give me a point", reads_json(Point)).x == 1
    roles = [m["role"] for m in llm.requests[1].messages]
    assert roles == ["system", "user", "assistant", "user"] and [r.turn for r in llm.requests] == [0, 1]
    assert "holds no JSON object" in llm.requests[1].messages[-1]["content"]


def test_then_it_is_malformed():
    with pytest.raises(Malformed, match="c0007 propose: m was told once, still .*no complete JSON"):
        Conversation(Scripted("no json", '{"x'), "propose", "c0007").ask("x", reads_json(Point))


def test_a_cut_reply_is_not_read_even_if_it_parses():
    llm = Scripted(GOOD, GOOD, finish="length")
    with pytest.raises(Malformed, match="cut at the token limit"):
        Conversation(llm, "propose", "c0007").ask("x", reads_json(Point))


PACKAGE = {"algorithm.py": "a = 1\nb = 2\nb2 = 2\n", "helper.py": "c = 3\n"}


def test_a_package_survives_the_way_to_the_model_and_back():
    assert read_package("Here it is.\n\n" + show_package(PACKAGE) + "\nDone.") == PACKAGE


def test_a_single_unnamed_block_is_the_algorithm():
    assert read_package("```python\nx = 1\n```") == {"algorithm.py": "x = 1\n"}


@pytest.mark.parametrize("text", ["no code", "```python other.py\nx = 1\n```", "```python algorithm.py\nx = 1\n",
                                  show_package(PACKAGE) + "\n```python more.py\nd = 4\n",
                                  "```python ../algorithm.py\nx = 1\n```"])
def test_a_package_without_its_whole_algorithm_is_refused(text):
    with pytest.raises(BadReply):
        read_package(text)


def edit(old, new, name="algorithm.py"):
    return f"<<<<<<< SEARCH {name}\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n"


def test_edits_and_whole_files_change_a_package():
    text = "First:\n" + edit("b = 2", "b = 3") + "then\n" + edit("a = 1", "") + "and\n```python helper.py\nc = 4\n```"
    assert read_change(text, PACKAGE) == {"algorithm.py": "\nb = 3\nb2 = 2\n", "helper.py": "c = 4\n"}


@pytest.mark.parametrize(("text", "problem"), [
    ("I would not change it", "changes nothing"), (edit("z = 9", "z = 1"), "stands 0 times"),
    (edit(" = 2", " = 3"), "stands 2 times"), (edit("x", "y", "absent.py"), "stands 0 times"),
])
def test_an_edit_must_fit_exactly_once(text, problem):
    package = PACKAGE | {"algorithm.py": " = 2\n = 2\n"} if "2 times" in problem else PACKAGE
    with pytest.raises(BadReply, match=problem):
        read_change(text, package)
