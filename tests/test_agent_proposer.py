"""The whole agent against a scripted endpoint on a real socket: who gets a draft, who is rejected and why."""
from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers_agent import (CLIP_HIGHER_CODE, CONSISTENT, GRPO_CODE, Scripted, context, diagnosis, facts, idea, ideas, inconsistent, package,
                           proposal)
from llm_server import Answer, Disconnect, LLMServer, Status
from poise_hpc.agent import propose
from poise_hpc.agent.base import Draft
from poise_hpc.agent.llm_proposer import DraftRejected, LLMProposer
from poise_hpc.config import Config
from poise_hpc.llm import Client
from poise_hpc.replay import Replay, Unavailable
from poise_hpc.transcript import BudgetExceeded, Transcript

SUBTLY_WRONG = CLIP_HIGHER_CODE.replace("w.clamp(1 - self.clip_low, 1 + self.clip_high)", "w.clamp(1 - self.clip_low, 1 + self.clip_low)")
FORBIDDEN = CLIP_HIGHER_CODE.replace("import torch\n", "import torch\nimport os\n", 1)
FIX = """<<<<<<< SEARCH algorithm.py
        return -torch.minimum(w * A, w.clamp(1 - self.clip_low, 1 + self.clip_low) * A)
=======
        return -torch.minimum(w * A, w.clamp(1 - self.clip_low, 1 + self.clip_high) * A)
>>>>>>> REPLACE"""
OPERATORS = {"Propose ": "propose", "Write the package": "implement", "Correct this package": "repair",
             "You review another": "review", "A candidate is finished": "reflect", "Revise the living": "synthesize"}


def operator(request: dict) -> str:
    """Which operator asks, by the first words of its task."""
    task = request["messages"][1]["content"].split("# Task\n\n", 1)[1]
    return next(name for start, name in OPERATORS.items() if task.startswith(start))


class Play:
    """An endpoint that says its lines, by operator and in order."""

    def __init__(self, **lines):
        self.lines, self.asked = {k: list(v) for k, v in lines.items()}, []

    def __call__(self, request):
        name = operator(request)
        self.asked.append(name)
        said = self.lines[name].pop(0)
        return Answer(said) if isinstance(said, str) else said


def config(url: str, **agent) -> Config:
    return Config.model_validate({"search": {"proposer": "llm"}, "agent": {
        "base_url": url, "models": {"default": ("m",)}, "timeout_s": 30.0, "max_attempts": 3, "repair_rounds": 1} | agent})


def proposer(server: LLMServer, folder: Path, **agent) -> LLMProposer:
    settings = config(server.url, **agent)
    client = Client(settings.agent, Transcript(folder / "llm.jsonl", lambda: 0.0), environ={}, sleep=lambda seconds: None)
    return LLMProposer(client, settings, folder)


def run(play: Play, folder: Path, act=lambda agent: agent.propose(context()), **agent):
    with LLMServer(play) as server:
        return act(proposer(server, folder, **agent))


def test_good(tmp_path):
    play = Play(propose=[ideas(idea(), idea("B-GRPO", ("batch-std",)))], implement=[package()], review=[CONSISTENT])
    draft = run(play, tmp_path)
    assert dict(draft.files) == {"algorithm.py": CLIP_HIGHER_CODE} and play.asked == ["propose", "implement", "review"]
    made = draft.proposal
    assert (made.name, made.parents, made.proposer) == ("CLIPHIGHER-GRPO", ("c0000",), "llm:m")
    assert made.mechanisms == ("group-std", "asymmetric-clip") and made.details["alternatives"][0]["name"] == "B-GRPO"
    json.dumps(made.to_json())


def test_the_author_sees_the_second_parents_code(tmp_path):
    play = Play(propose=[ideas(idea(second_parent="c0001"))], implement=[package()], review=[CONSISTENT])
    with LLMServer(play) as server:
        draft = proposer(server, tmp_path).propose(context())
        asked = server.requests[1]["messages"][1]["content"]
    assert draft.proposal.parents == ("c0000", "c0001") and "VALUE = 'c0001'" in asked and "class GRPO(Algorithm)" in asked


@pytest.mark.parametrize("first", [Answer(f"Sure:\n```json\n{ideas(idea())}\n```"), Answer("{'proposals': oops"),
                                   Answer(ideas(idea())[:200], finish="length"), Status(429, headers={"Retry-After": "3"}),
                                   Status(500), Disconnect()], ids=["fenced", "malformed", "truncated", "429", "500", "disconnect"])
def test_trouble_on_the_way_changes_nothing(tmp_path, first):
    play = Play(propose=[first, ideas(idea())], implement=[package()], review=[CONSISTENT])
    assert run(play, tmp_path).proposal.name == "CLIPHIGHER-GRPO"


def test_subtly_wrong_code_goes_back_with_the_reviewers_findings(tmp_path):
    play = Play(propose=[ideas(idea())], implement=[package(SUBTLY_WRONG)], review=[inconsistent(), CONSISTENT], repair=[FIX])
    assert dict(run(play, tmp_path).files) == {"algorithm.py": CLIP_HIGHER_CODE}
    assert play.asked == ["propose", "implement", "review", "repair", "review"]


@pytest.mark.parametrize(("lines", "cause", "said"), [
    ({"implement": [package(SUBTLY_WRONG)], "review": [inconsistent()] * 2, "repair": [FIX]}, "inconsistent", "line 31 clips both"),
    ({"implement": [package(FORBIDDEN)], "repair": [package(FORBIDDEN + "\n# tried")]}, "gate", "os"),
    ({"implement": [package(CLIP_HIGHER_CODE.replace('"asymmetric-clip"', '"clip-higher"'))] , "repair": ["no change"] * 2},
     "malformed-reply", "changes nothing"),
    ({"implement": ["I would rather not write code."] * 2}, "malformed-reply", "no whole file algorithm.py"),
    ({"implement": [Answer(None, refusal="I cannot help with that")]}, "refused", "I cannot help"),
    ({"implement": [Answer("")]}, "empty-reply", "no text"),
    ({"implement": [package("# " + "long " * 10_000)], "repair": [Status(413)]}, "prompt-too-long", "is too long"),
], ids=["inconsistent", "gate", "no-repair", "no-code", "refusing", "empty", "too-long"])
def test_what_is_rejected_says_why_and_keeps_the_proposal(tmp_path, lines, cause, said):
    with pytest.raises(DraftRejected) as rejected:
        run(Play(propose=[ideas(idea())], **lines), tmp_path)
    assert rejected.value.cause == cause and said in rejected.value.message
    assert rejected.value.draft.proposal.name == "CLIPHIGHER-GRPO"


@pytest.mark.parametrize(("said", "cause"), [(["no"] * 2, "malformed-reply"), ([Answer(None, refusal="no")], "refused"),
                                             ([Answer("")], "empty-reply")])
def test_no_proposal_is_a_candidate_with_a_cause(tmp_path, said, cause):
    with pytest.raises(DraftRejected) as rejected:
        run(Play(propose=said), tmp_path)
    assert rejected.value.cause == cause and rejected.value.draft.proposal.name == "UNPROPOSED-c0003"


def test_duplicates_go_back_with_the_reason_and_then_end(tmp_path):
    stored = proposal("CLIPHIGHER-GRPO", ("group-std", "asymmetric-clip"), hyperparameters={"clip_high": 0.28})
    seen = context(pending=(("c0001", stored),))
    play = Play(propose=[ideas(idea()), ideas(idea("C-GRPO"))])
    with pytest.raises(DraftRejected, match="duplicate: it has the mechanisms and the hyperparameters of c0001") as rejected:
        run(play, tmp_path, lambda agent: agent.propose(seen), duplicate_rounds=1)
    assert play.asked == ["propose", "propose"] and rejected.value.draft.proposal.name == "C-GRPO"


@pytest.mark.parametrize(("id", "mechanisms"), [("c0000", ("group-std", "symmetric-clip")), ("c0002", ("mine",))])
def test_a_seed_or_a_persons_package_is_known_before_code_is_paid(tmp_path, id, mechanisms):
    """They state no hyperparameters: their fields are looked at; the proposal need not name all of them."""
    seen = context("c0003", pending=(("c0002", proposal("OWN", ("mine",))),), code=lambda id: {"algorithm.py": GRPO_CODE})
    again = ideas(idea("AGAIN", mechanisms, hyperparameters=[{"name": "clip", "value": 0.2, "meaning": ""}]))
    other = ideas(idea("AGAIN", mechanisms, hyperparameters=[{"name": "clip", "value": 0.3, "meaning": ""}]))
    play = Play(propose=[again, other], implement=["no"] * 2)
    with pytest.raises(DraftRejected) as rejected:
        run(play, tmp_path, lambda agent: agent.propose(seen))
    assert play.asked == ["propose", "propose", "implement", "implement"] and rejected.value.cause == "malformed-reply"
    assert f"it has the mechanisms and the hyperparameters of {id}" in (tmp_path / "llm.jsonl").read_text()


def test_copied_code_under_new_names_is_a_duplicate(tmp_path):
    copied = GRPO_CODE.replace("GRPO", "Novel").replace("group-std", "alpha").replace("symmetric-clip", "beta")
    same = idea("NOVEL", ("group-std", "symmetric-clip"), hyperparameters=[])
    play = Play(propose=[ideas(same)], implement=[package(copied.replace("alpha", "group-std").replace("beta", "symmetric-clip"))],
                repair=[package(copied.replace("alpha", "group-std").replace("beta", "symmetric-clip") + "# still the same\n")])
    with pytest.raises(DraftRejected, match="duplicate: .* of c0000"):
        run(play, tmp_path)
    assert play.asked == ["propose", "implement", "repair"]


def test_copied_code_goes_back_to_its_author(tmp_path):
    same = idea("NOVEL", ("group-std", "symmetric-clip"), hyperparameters=[])
    new = GRPO_CODE.replace("+ self.std_floor", "+ 2 * self.std_floor")
    play = Play(propose=[ideas(same)], implement=[package(GRPO_CODE)], repair=[package(new)], review=[CONSISTENT])
    draft = run(play, tmp_path)
    assert dict(draft.files) == {"algorithm.py": new} and play.asked == ["propose", "implement", "repair", "review"]
    assert "its code is that of c0000 (GRPO)" in draft.proposal.details["rounds"][0]["problems"][0]


def test_checks_go_back_to_the_author_a_bounded_number_of_times(tmp_path):
    made = Draft(proposal("CLIPHIGHER-GRPO", ("group-std", "asymmetric-clip")), {"algorithm.py": SUBTLY_WRONG})

    def act(agent):
        fixed = agent.repair("c0003", made, ["direction: the better completion does not gain"])
        assert dict(fixed.files) == {"algorithm.py": CLIP_HIGHER_CODE} and fixed.proposal.details["repairs"] == 1
        with pytest.raises(DraftRejected, match="check-failed: still wrong"):
            agent.repair("c0003", fixed, ["still wrong"])

    run(Play(repair=[FIX], review=[CONSISTENT]), tmp_path, act)


def test_measured_responses_are_put_to_the_reviewer_only_if_they_speak_against_the_proposal(tmp_path):
    made = Draft(proposal("CLIPHIGHER-GRPO", ("group-std", "asymmetric-clip"), responds_to=["reward", "valid"]),
                 {"algorithm.py": CLIP_HIGHER_CODE})

    def act(agent):
        assert agent.confirm("c0003", made, {"reward": 1.0, "valid": 0.2}) == []
        return agent.confirm("c0003", made, {"reward": 1.0, "valid": 0.0})

    play = Play(review=[inconsistent("`valid` is never used")])
    assert "`valid` is never used" in run(play, tmp_path, act)[0] and play.asked == ["review"]
    assert "respond to `valid`; changing it alone changes nothing" in (tmp_path / "llm.jsonl").read_text()


def test_reflection_and_notes_over_the_wire(tmp_path):
    principles = {"principles": [{"principle": "P", "why": "w", "supports": ["c0001"], "contradicts": []}], "open_questions": []}
    play = Play(reflect=[json.dumps(diagnosis())], synthesize=[json.dumps(principles)], propose=[ideas(idea())],
                implement=[package()], review=[CONSISTENT])

    def act(agent):
        agent.propose(context("c0008"))
        return agent.reflect(facts())

    assert run(play, tmp_path, act).author == "llm:m"
    assert play.asked[:2] == ["synthesize", "propose"] and (tmp_path / "notes" / "c0008.json").exists()


def test_replay_gives_the_same_draft_and_asks_nobody(tmp_path):
    play = Play(propose=["oops", ideas(idea())], implement=[package(SUBTLY_WRONG)], review=[inconsistent(), CONSISTENT], repair=[FIX])
    live = run(play, tmp_path)
    settings = config("http://127.0.0.1:9/v1")
    replayed = LLMProposer(Replay(settings.agent, Transcript(tmp_path / "llm.jsonl", lambda: 0.0)), settings, tmp_path)
    assert replayed.propose(context()) == live


def test_a_controller_that_starts_again_pays_for_nothing_twice(tmp_path):
    play = Play(propose=[ideas(idea())], implement=[Status(503)] * 3 + [package()], review=[CONSISTENT])
    with LLMServer(play) as server:
        with pytest.raises(Unavailable):
            proposer(server, tmp_path).propose(context())
        assert proposer(server, tmp_path).propose(context()).proposal.name == "CLIPHIGHER-GRPO"
    assert play.asked == ["propose"] + ["implement"] * 4 + ["review"]


def test_the_budget_stops_proposals_and_leaves_reflection_to_the_rules(tmp_path):
    def act(agent):
        with pytest.raises(BudgetExceeded):
            agent.propose(context())
        return agent.reflect(facts())

    play = Play()
    assert run(play, tmp_path, act, budget_tokens=10_000).author == "rules" and play.asked == []


def test_several_candidates_at_once(tmp_path):
    names = {f"c{n:04d}": (f"A{n}-GRPO", ("group-std", f"mechanism-{n}")) for n in range(10, 16)}

    def say(request):
        text = request["messages"][1]["content"]
        id = next((id for id, (name, _) in names.items() if name in text or f"directive {id}" in text))
        name, mechanisms = names[id]
        code = CLIP_HIGHER_CODE.replace("asymmetric-clip", mechanisms[1])
        return Answer({"propose": ideas(idea(name, mechanisms)), "implement": package(code), "review": CONSISTENT}[operator(request)])

    with LLMServer(say) as server:
        agent = proposer(server, tmp_path)
        with ThreadPoolExecutor(6) as pool:
            drafts = list(pool.map(lambda id: agent.propose(context(id, directive=f"directive {id}")), names))
    assert [d.proposal.name for d in drafts] == [name for name, _ in names.values()]
    assert len(server.requests) == 18


SIBLINGS = {"c0001": ("CLIPHIGHER-GRPO", "asymmetric-clip"), "c0002": ("B-GRPO", "other-clip"), "c0003": ("C-GRPO", "third-clip")}


def test_siblings_are_written_beside_one_another_and_paid_once(tmp_path):
    all_three = threading.Barrier(3)  # no package is sent before all are asked for

    def say(request):
        if (name := operator(request)) == "propose":
            return Answer(ideas(*(idea(called, ("group-std", clip)) for called, clip in SIBLINGS.values())))
        if name == "review":
            return Answer(CONSISTENT)
        all_three.wait(60)
        clip = next(clip for called, clip in SIBLINGS.values() if f"- name: {called}\n" in request["messages"][1]["content"])
        return Answer(package(CLIP_HIGHER_CODE.replace("asymmetric-clip", clip)))

    with LLMServer(say) as server:
        agent, pending = proposer(server, tmp_path, timeout_s=90.0), ()
        for id, (name, clip) in SIBLINGS.items():
            draft = agent.propose(context(id, pending=pending))
            assert draft.proposal.name == name and clip in draft.files["algorithm.py"]
            pending += ((id, draft.proposal),)
        asked = sorted(map(operator, server.requests))
    assert asked == ["implement"] * 3 + ["propose"] + ["review"] * 3


def test_money_that_siblings_had_reserved_comes_back(tmp_path):
    class Tight(Scripted):
        def complete(self, request):
            if request.operator == "implement" and request.candidate != "c0001":
                raise Unavailable("the sibling's own turn will tell")
            return super().complete(request)

    llm = Tight({"propose": [ideas(idea(), idea("B-GRPO", ("batch-std",)))], "implement": [BudgetExceeded("reserved"), package()],
                 "review": [CONSISTENT]})
    made = LLMProposer(llm, config("http://127.0.0.1:9/v1"), tmp_path).propose(context("c0001"))
    assert made.proposal.name == "CLIPHIGHER-GRPO"


@pytest.mark.parametrize(("id", "search", "following"), [
    ("c0001", {}, ["c0002", "c0003"]), ("c0002", {}, ["c0003"]), ("c0003", {}, []), ("c0004", {"candidates": 5}, ["c0005"]),
    ("c0001", {"window": 2}, ["c0002"]), ("c0001", {"window": 1}, []), ("c0001", {"per_parent": 1}, [])])
def test_who_follows(id, search, following):
    first = propose.choose([proposal(name, ("x",)) for name in "ABCD"])
    settings = Config.model_validate({"search": {"per_parent": 3, "window": 4, "candidates": 9} | search})
    assert propose.ahead(context(id), first, settings) == [(f, proposal(n, ("x",))) for f, n in zip(following, "BCD")]


def test_candidate_code_is_never_imported_or_executed_here(tmp_path):
    """In a fresh interpreter: the gate reads a package that would leave a file behind, and torch stays unloaded."""
    trap = CLIP_HIGHER_CODE + f"\nopen({str(tmp_path / 'trap')!r}, 'w')\n"
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from helpers_agent import *
from poise_hpc.agent.llm_proposer import DraftRejected, LLMProposer
from poise_hpc.config import Config
from pathlib import Path
llm = Scripted({{"propose": [ideas(idea())], "implement": [package({trap!r})], "repair": [package({trap!r} + "# again")]}})
try:
    LLMProposer(llm, Config.model_validate({{"agent": {{"repair_rounds": 1}}}}), Path({str(tmp_path)!r})).propose(context())
except DraftRejected as error:
    assert error.cause == "gate", error
    assert "torch" not in sys.modules and "openai" not in sys.modules
    print("rejected")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "rejected\n", done.stderr
    assert not (tmp_path / "trap").exists()
