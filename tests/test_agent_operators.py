"""Each operator on its own, with replies by script: what it shows, what it accepts, what goes back."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from typing import get_args

import pytest

from helpers_agent import (CLIP_HIGHER_CODE, CONSISTENT, GRPO_CODE, Scripted, cited, context, diagnosis, entry, facts, idea, ideas, inconsistent,
                           package, proposal)
from poise_hpc.agent import evidence, propose, review, synthesize
from poise_hpc.agent.base import Draft
from poise_hpc.agent.conversation import Malformed
from poise_hpc.agent.implement import implement, proposal_text, repair
from poise_hpc.agent.llm_reflect import reflect
from poise_hpc.agent.package_text import show_package
from poise_hpc.agent.priors import load_cards
from poise_hpc.agent.prompts import render
from poise_hpc.algorithms import load, seeds
from poise_hpc.config import Config
from poise_hpc.replay import Refused, TooLong, Unavailable
from poise_hpc.types import Outcome, Reflection

RULES = Reflection("supported", "By rules: nothing stands out.", ("healthy",))
CLIP_HIGHER = proposal("CLIPHIGHER-GRPO", ("group-std", "asymmetric-clip"), responds_to=["reward", "group", "logp_old"],
                       hyperparameters={"clip_high": 0.28}, meanings={"clip_high": "upper clip"})


def test_every_prompt_is_rendered_with_real_data_and_no_placeholder_is_left(tmp_path):
    llm = Scripted({"propose": [ideas(idea("GRPO-2", ("group-std", "symmetric-clip"))), ideas(idea())],
                    "implement": [package()], "repair": [package()], "review": [CONSISTENT],
                    "reflect": ["not json", json.dumps(diagnosis(citations=[cited("entropy", 3, 9.0)])),
                                json.dumps(diagnosis())], "synthesize": [json.dumps(notes())]})
    config = Config.model_validate({"agent": {"models": {"default": ("m",)}}})
    sift = propose.sift
    first = iter([([], [(CLIP_HIGHER, "it has GRPO's mechanisms")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propose, "sift", lambda p, c: next(first, (p, [])) if p else sift(p, c))
        propose.propose(llm, context(), config, "notes", ())
    implement(llm, "c0003", CLIP_HIGHER, context().parent_code)
    repair(llm, "c0003", CLIP_HIGHER, {"algorithm.py": GRPO_CODE}, ["wrong"])
    review.review(llm, "c0003", CLIP_HIGHER, {"algorithm.py": CLIP_HIGHER_CODE})
    reflect(llm, facts(), RULES, Config())
    synthesize.revise(llm, context("c0008"), 8, tmp_path)
    names = {p.name[:-3] for p in files("poise_hpc.agent").joinpath("prompts").iterdir() if p.name.endswith(".md")}
    texts = [m["content"] for r in llm.requests for m in r.messages]
    heads = {name: render_head(name) for name in names}
    assert {name for name, head in heads.items() if any(head in text for text in texts)} == names
    assert not any(re.search(r"\$[a-z_]+", text) for text in texts)


def render_head(name: str) -> str:
    """The longest line of a prompt without a placeholder."""
    lines = files("poise_hpc.agent").joinpath("prompts", f"{name}.md").read_text().splitlines()
    return max((line for line in lines if "$" not in line), key=len)


def test_render_wants_exactly_its_values():
    with pytest.raises(KeyError):
        render("again")
    with pytest.raises(ValueError, match="no placeholder for extra"):
        render("again", problem="x", extra="y")
    assert "costs $5 and $problem" in render("again", problem="costs $5 and $problem")


def test_the_proposal_prompt_shows_the_evidence():
    text = propose.prompt(context(directive="shorter outputs"), Config(), "use means", [c for c in load_cards() if c.name == "DAPO"])
    for shown in ("- c0000 GRPO: group-std, symmetric-clip; Overall 47 [46, 48], 0 [-1.5, 1.5] against GRPO; undecided",
                  "- c0002 SA-GRPO (from c0000): two-anchors; failed: nonfinite-loss, The two anchors blew the ratio up at step 7.; failed",
                  "Overall 48.5 [47.5, 49.5], 1.5 [0, 3] against GRPO; supported", "shorter outputs", "use means", "### DAPO (",
                  "48 training steps, each 16 prompts x 8", "class GRPO(Algorithm)", "entropy_end 0.41", "reward = 1 correct + 0 format",
                  "at most 24 tokens", "The parent is GRPO.", "Nobody knows yet how far one seed strays", "clip-higher"):
        assert shown in text, shown


def section(text: str, title: str) -> str:
    return text.split(f"# {title}\n\n", 1)[1].split("\n\n# ", 1)[0]


def test_the_proposal_prompt_shows_curves_and_the_parents_line_and_children():
    """Ancestors stay in sight when the table of what was tried no longer reaches back to them."""
    made = {"c0000": (), "c0001": ("c0000",), "c0002": ("c0001",), "c0003": ("c0001",)}
    entries = tuple(entry(id, f"A{n}", parents) for n, (id, parents) in enumerate(made.items()))
    entries += tuple(entry(f"c{n:04d}", f"B{n}", cause="gate") for n in range(4, 80))
    noisy = replace(entries[1], score=replace(entries[1].score, by_seed={"0": 47.0, "1": 49.0}))  # sd of one seed: sqrt(2)
    rows = {"c0000": {"0": [{"step": 7, "entropy": 0.7}]}, "c0001": {"0": [{"step": 7, "entropy": 0.25}], "1": [{"step": 7, "entropy": 0.35}]}}
    seen = context("c0081", entries=(entries[0], noisy, *entries[2:]), parent=noisy, curves=rows.__getitem__,
                   pending=(("c0080", proposal("RUNS", ("x",), ("c0001",))),), proposals={},
                   reflections={"c0079": Reflection("failed", "**Failed** (gate).\nMessage: line 3: import os\n\nMore.")})
    text = propose.prompt(seen, Config(), "", ())
    assert re.findall(r"^- (c\d{4})", section(text, "The line from GRPO to the parent"), re.M) == ["c0000", "c0001"]
    assert re.findall(r"^- (c\d{4})", section(text, "Children of this parent so far"), re.M) == ["c0002", "c0003", "c0080"]
    tried = section(text, "All that was tried, and all that is running")
    assert "c0019 " not in tried and "c0020 " in tried and "failed: gate, line 3: import os; undecided" in tried
    parent = section(text, "The parent")
    assert "| 7 | 0.3 |" in parent and "| 7 | 0.7 |" in parent and "strays by 1.414 points" in section(text, "Noise")


def test_ideas_must_be_well_named():
    bad = ideas(idea(name="no good name"), idea(mechanisms=("Has Spaces",)))
    with pytest.raises(Malformed, match="no good name.*Has Spaces"):
        propose.propose(Scripted({"propose": [bad, bad]}), context(), Config(), "", ())


@pytest.mark.parametrize(("per_parent", "window", "given", "count"), [(3, 4, 0, 3), (3, 1, 0, 1), (2, 4, 0, 2), (3, 1, 2, 2)])
def test_no_idea_is_paid_for_that_no_sibling_can_take_up(per_parent, window, given, count):
    config = Config.model_validate({"search": {"per_parent": per_parent, "window": window}})
    assert f"\nPropose {count} algorithm" in propose.prompt(context(ideas=("an idea",) * given), config, "", ())


def test_twins_in_one_reply_count_once():
    pair = [proposal("A-1", ("x", "y")), proposal("A-2", ("y", "x")), proposal("B", ("z",))]
    fresh, known = propose.sift(pair, context())
    assert [p.name for p in fresh] == ["A-1", "B"] and "same mechanisms as A-1" in known[0][1]


def test_other_ideas_go_to_siblings_while_the_first_is_pending():
    first = propose.choose([proposal("A", ("a",)), proposal("B", ("b",)), proposal("C", ("c",))])
    assert [a["name"] for a in first.details["alternatives"]] == ["B", "C"]
    sibling = context("c0004", pending=(("c0003", first),))
    llm = Scripted({})  # nothing is asked
    assert [p.name for p in propose.propose(llm, sibling, Config(), "", ())] == ["B", "C"]
    second = propose.choose(propose.siblings(sibling))
    third = replace(sibling, id="c0005", pending=(*sibling.pending, ("c0004", second)))
    assert [p.name for p in propose.siblings(third)] == ["C"]
    assert propose.siblings(replace(sibling, parent=sibling.entries[1])) == []  # another parent's ideas


def test_a_new_directive_asks_anew():
    """c0003 has ideas left, made without a directive: under one, its siblings are asked for, and theirs go on from there."""
    names = iter(["A", "B", "C", "D"])
    llm = Scripted({"propose": [ideas(*(idea(f"{name}-GRPO", (f"mechanism-{name.lower()}",)) for name in (next(names), next(names)))) for _ in "12"]})
    config = Config.model_validate({"agent": {"models": {"default": ("m",)}}})
    pending = ()
    for id, directive, name in [("c0003", None, "A"), ("c0004", "shorter", "C"), ("c0005", "shorter", "D"), ("c0006", None, "B")]:
        made = propose.choose(propose.propose(llm, context(id, pending=pending, directive=directive), config, "", ()))
        assert made.name == f"{name}-GRPO" and made.details["directive"] == directive
        pending += ((id, made),)
    assert ["shorter" in text for text in llm.asked("propose")] == [False, True]


def test_a_second_parent_is_an_archived_entry_and_travels_with_siblings():
    unknown, own = (ideas(idea(second_parent=id)) for id in ("c0099", "c0000"))
    with pytest.raises(Malformed, match="second_parent 'c0000' is no archived entry beside the parent"):
        propose.propose(Scripted({"propose": [unknown, own]}), context(), Config(), "", ())
    llm = Scripted({"propose": [ideas(idea(), idea("B-GRPO", ("batch-std",), second_parent="c0001"))]})
    first = propose.choose(propose.propose(llm, context(), Config(), "", ()))
    assert first.parents == ("c0000",)
    second = propose.choose(propose.siblings(context("c0004", pending=(("c0003", first),))))
    assert second.parents == ("c0000", "c0001")
    third = context("c0005", pending=(("c0004", replace(first, parents=("c0000", "c0002"))),))
    assert [p.name for p in propose.siblings(third)] == ["B-GRPO"]  # of the first parent's children, whoever the second is


def test_a_taken_name_gets_the_id():
    taken = context(pending=(("c0002", proposal("X-GRPO", ("q",))),))
    assert propose.as_proposal(propose.Idea(**idea("X-GRPO")), taken, "m").name == "X-GRPO-c0003"


def test_repair_shows_the_problems_and_takes_edits():
    edit = "<<<<<<< SEARCH algorithm.py\n    clip: float = 0.2\n=======\n    clip: float = 0.1\n>>>>>>> REPLACE"
    llm = Scripted({"repair": [edit]})
    fixed = repair(llm, "c0003", CLIP_HIGHER, {"algorithm.py": GRPO_CODE}, ["advantages: NaN for equal rewards"])
    assert fixed.proposal.mechanisms == CLIP_HIGHER.mechanisms
    assert fixed.files == {"algorithm.py": GRPO_CODE.replace("    clip: float = 0.2\n", "    clip: float = 0.1\n")}
    assert "- advantages: NaN for equal rewards" in llm.asked("repair")[0]


def test_a_prompt_that_does_not_fit_shows_less(tmp_path):
    """60 entries with long reflections: as many as fit, then 30, then 10 of them, the newest."""
    many = tuple(entry(f"c{n:04d}", f"A{n}") for n in range(70))
    long = Reflection("undecided", "word " * 400, ())
    big = context("c0072", entries=many, reflections={e.id: long for e in many}, proposals={e.id: proposal(e.name, e.mechanisms) for e in many})
    llm = Scripted({"propose": [TooLong("no"), TooLong("no"), ideas(idea())], "synthesize": [TooLong("no"), json.dumps(notes())]})
    propose.propose(llm, big, Config.model_validate({"agent": {"models": {"default": ("m",)}}}), "", load_cards())
    synthesize.revise(llm, big, 8, tmp_path)
    for title, numbers in [("All that was tried, and all that is running", [60, 30, 10]), ("Children of this parent so far", [20, 10, 5])]:
        assert [len(re.findall(r"^- c00\d\d ", section(text, title), re.M)) for text in llm.asked("propose")] == numbers
    assert "- c0069 A69" in llm.asked("propose")[2]
    assert [text.count("### ") for text in llm.asked("propose")] == [8, 4, 2]
    full, less = map(len, llm.asked("synthesize"))
    assert less < full / 3 and (tmp_path / "c0072.json").exists()
    assert [r.turn for r in llm.requests] == [0] * 5 and all(len(r.messages) == 2 for r in llm.requests)


def test_notes_that_do_not_fit_leave_the_older_ones(tmp_path):
    assert synthesize.notes_for(Scripted({"synthesize": [TooLong("no")] * 3}), context("c0008"), 8, tmp_path) == ""


def test_repair_remembers_its_rounds():
    """Round 2 sees what round 1 was for and changed; an author that goes back to the first package is asked anew, not from memory."""
    there, back = (f"<<<<<<< SEARCH algorithm.py\n    clip: float = {a}\n=======\n    clip: float = {b}\n>>>>>>> REPLACE"
                   for a, b in [(0.2, 0.1), (0.1, 0.2)])
    llm, draft = Scripted({"repair": [there, back, there]}), Draft(CLIP_HIGHER, {"algorithm.py": GRPO_CODE})
    for problem in ("too wide", "too narrow", "too wide"):
        draft = repair(llm, "c0003", draft.proposal, draft.files, [problem])
    first, second, third = llm.asked("repair")
    assert "do not go back to them\n\nNone.\n" in first and len({r.key for r in llm.requests}) == 3
    assert "Round 1 was for:\n\n- too wide\n\nand changed:\n\n```diff\n--- algorithm.py\n" in second
    assert "-    clip: float = 0.2\n+    clip: float = 0.1\n" in second and "Round 2 was for:\n\n- too narrow" in third
    assert [r["problems"] for r in draft.proposal.details["rounds"]] == [["too wide"], ["too narrow"], ["too wide"]]


# --- consistency


def test_syntax_shows_what_the_code_reads_and_declares():
    seen = review.static_evidence({"algorithm.py": CLIP_HIGHER_CODE})
    assert seen["hyperparameters"] == ["clip_high = 0.28", "clip_low = 0.2", "std_floor = 1e-06"]
    assert seen["mechanisms"] == ["asymmetric-clip", "group-std"] and seen["helpers"] == ["group_mean", "group_std", "ratio"]
    assert seen["inputs read"] == ["group", "reward"]
    assert review.mismatches(CLIP_HIGHER, {"algorithm.py": CLIP_HIGHER_CODE}) == []


@pytest.mark.parametrize(("old", "new", "found"), [
    ("clip_high: float = 0.28", "clip_high: float = 0.4", "clip_high is 0.28 in the proposal and 0.4 in the code"),
    ("clip_high", "clip_top", "clip_high of the proposal is no field"),
    ('Mechanism("asymmetric-clip"', 'Mechanism("clip-higher"', "mechanisms are group-std, asymmetric-clip; the code declares clip-higher"),
])
def test_declarations_that_differ_are_found_without_a_call(old, new, found):
    assert found in review.mismatches(CLIP_HIGHER, {"algorithm.py": CLIP_HIGHER_CODE.replace(old, new)})[0]


def test_a_claimed_input_that_no_line_reads_is_for_the_reviewer_to_judge():
    """The proposal may be wrong where the code is right: GSPO's ratio depends on the length through the mask alone."""
    gspo = {"algorithm.py": seeds.source("gspo")}
    claims = proposal("GSPO-2", load.declared_mechanisms(gspo), responds_to=["reward", "group", "logp_old", "length"])
    said = "the proposal says that the values respond to `length`; no line reads it"
    assert review.mismatches(claims, gspo) == [] and review.unread(claims, gspo) == [said]
    llm = Scripted({"review": [CONSISTENT]})
    assert review.review(llm, "c0003", claims, gspo) == [] and f"- {said}" in llm.asked("review")[0]


SUBCLASS = """from dataclasses import dataclass

from poise_hpc.algorithms.gspo import GSPO


@dataclass(frozen=True)
class Mine(GSPO):
    clip_high: float = 5e-4


ALGORITHM = Mine()
"""


def test_a_package_that_builds_on_a_seed_is_read_with_it():
    """What it declares itself, and what it takes over: mechanisms, fields, inputs; the reviewer sees both, and the contract."""
    package = {"algorithm.py": SUBCLASS}
    mechanisms = load.declared_mechanisms({"algorithm.py": seeds.source("gspo")})
    claims = proposal("MINE", mechanisms, responds_to=["valid"], hyperparameters={"clip_high": 5e-4, "clip_low": 0.03})
    assert review.mismatches(claims, package) == []
    assert review.unread(claims, package) == ["the proposal says that the values respond to `valid`; no line reads it"]
    reads_it = {"algorithm.py": SUBCLASS.replace("gspo", "validity_masking").replace("GSPO", "ValidityMasking")}
    assert review.unread(claims, reads_it) == []
    wrong = replace(claims, mechanisms=("sequence-clip",), details={"hyperparameters": {"clip_high": 1.0, "tau": 2.0}})
    assert [m.split(";")[0] for m in review.mismatches(wrong, package)] == [
        "the proposal's mechanisms are sequence-clip", "hyperparameter clip_high is 1.0 in the proposal and 0.0005 in the code",
        "hyperparameter tau of the proposal is no field of the algorithm's dataclass"]
    llm = Scripted({"review": [CONSISTENT]})
    review.review(llm, "c0003", claims, package)
    for shown in ("class Mine(GSPO)", "class GSPO(Algorithm)", "class RolloutBatch", "def group_std", "Not measured yet"):
        assert any(shown in m["content"] for m in llm.requests[0].messages), shown
    assert set(review.imported({"a.py": "from poise_hpc.algorithms import rloo, ops\nimport poise_hpc.algorithms.dapo\n"})) == {
        "poise_hpc/algorithms/rloo.py", "poise_hpc/algorithms/dapo.py"}


def test_repair_may_correct_what_the_proposal_says_it_responds_to():
    package = {"algorithm.py": CLIP_HIGHER_CODE}
    made = repair(Scripted({"repair": ["The code is right.\n\nresponds_to: reward, `group`, valid\n"]}), "c0003", CLIP_HIGHER, package, ["x"])
    assert made.files == package and made.proposal.details["responds_to"] == ["group", "reward", "valid"]
    assert made.proposal.details["hyperparameters"] == {"clip_high": 0.28}
    llm = Scripted({"repair": ["responds_to: rewards", show_package({"algorithm.py": "responds_to: int = 1\n"})]})
    made = repair(llm, "c0003", CLIP_HIGHER, package, ["x"])  # a line of code is no declaration
    assert made.proposal.details["responds_to"] == CLIP_HIGHER.details["responds_to"]
    assert "rewards is no input" in llm.asked("repair")[1]


def test_a_hyperparameter_is_shown_whole_and_compared_as_a_number():
    exact = propose.with_details(CLIP_HIGHER, hyperparameters={"clip_high": 0.2812345678})
    assert "clip_high = 0.2812345678" in proposal_text(exact)
    third = propose.with_details(CLIP_HIGHER, hyperparameters={"clip_high": 0.1 + 0.2})  # 0.30000000000000004
    assert review.mismatches(third, {"algorithm.py": CLIP_HIGHER_CODE.replace("0.28", "0.3")}) == []
    assert "clip_high is 0.2812345678 in the proposal and 0.281235 in the code" in review.mismatches(
        exact, {"algorithm.py": CLIP_HIGHER_CODE.replace("0.28", "0.281235")})[0]


def test_measured_responses_against_claims():
    claims = propose.with_details(CLIP_HIGHER, responds_to=["reward", "valid", "logp_ref"])
    response = {"reward": 1.0, "valid": 0.0, "logp_ref": 0.0, "length": 0.3, "truncated": 0.0}
    assert review.contradictions(claims, response) == [
        "the proposal says that the values respond to `logp_ref`; changing it alone changes nothing",
        "the proposal says that the values respond to `valid`; changing it alone changes nothing",
        "changing `length` alone changes the values; the proposal does not say so"]
    assert review.contradictions(proposal("X", ("x",)), response) == []  # nothing was claimed


def test_the_real_report_of_real_code_agrees_with_a_true_proposal(tmp_path):
    from poise_hpc.algorithms.load import load
    from poise_hpc.algorithms.response import INPUTS, response_report

    (tmp_path / "algorithm.py").write_text(CLIP_HIGHER_CODE)
    report = response_report(load(tmp_path))
    assert set(INPUTS) == set(get_args(propose.Input))
    assert review.contradictions(CLIP_HIGHER, report) == []
    lie = propose.with_details(CLIP_HIGHER, responds_to=["reward", "group", "logp_old", "valid"])
    assert review.contradictions(lie, report) == ["the proposal says that the values respond to `valid`; changing it alone changes nothing"]


def test_a_reviewer_must_agree_with_itself():
    torn = json.dumps({"reasoning": "", "consistent": False, "findings": []})
    llm = Scripted({"review": [torn, inconsistent()]})
    found = review.review(llm, "c0003", CLIP_HIGHER, {"algorithm.py": CLIP_HIGHER_CODE})
    assert found == ["the proposal says: the upper clip is 0.28; the code: line 31 clips both sides at 0.2; use clip_high"]
    assert "consistent is False with 0 findings" in llm.asked("review")[1]


def test_the_reviewer_sees_the_whole_response_once_it_is_measured():
    llm = Scripted({"review": [CONSISTENT]})
    review.review(llm, "c0003", CLIP_HIGHER, {"algorithm.py": CLIP_HIGHER_CODE}, {"reward": 0.75, "logp_old": 0.0, "length": 0.3})
    assert ("- reward: 0.75\n- logp_old: 0\n- length: 0.3\n\n- against the proposal: the proposal says that the values respond to `logp_old`; "
            "changing it alone changes nothing\n- against the proposal: changing `length` alone") in llm.asked("review")[0]


# --- reflection


def test_reflection_cites_figures_that_stand_in_the_record():
    made = reflect(Scripted({"reflect": [json.dumps(diagnosis())]}), facts(), RULES, Config())
    assert made.verdict == "supported" and made.author == "llm:m" and made.symptoms == ("healthy", "slow-start")
    assert "Figures: entropy at step 10 = 0.5; hard/pass@32 = 40.5." in made.text and "Next: Widen" in made.text


def test_false_figures_go_back_and_are_then_left_out():
    # mean reward at step 10 over the two seeds: (1.0 + 1.2) / 2 = 1.1
    said = [cited("reward", 10, 1.1), cited("reward", 5, 0.9), cited("acc", 5, 0.1)]
    llm = Scripted({"reflect": [json.dumps(diagnosis(citations=said))] * 2})
    made = reflect(llm, facts(), RULES, Config())
    assert "- reward at step 5 = 0.9: it is 0.6\n- acc at step 5 = 0.1: no such figure was shown" in llm.asked("reflect")[1]
    assert "Figures: reward at step 10 = 1.1." in made.text and "(2 cited figures do not stand in the record" in made.text


def test_figures_of_the_free_text_that_were_not_shown_go_back_and_are_then_marked():
    # Overall 49 and GRPO's 47 were shown, 2 more is their difference; 61.7 and 17.3 % come from nowhere.
    said = "Overall 49 against 47, 2.0 more, but pass@32 fell to 61.7, entropy by 17.3 % until step 9."
    llm = Scripted({"reflect": [json.dumps(diagnosis(diagnosis=said)), json.dumps(diagnosis(diagnosis=said))]})
    made = reflect(llm, facts(), RULES, Config())
    back = llm.asked("reflect")[1]
    assert "- 61.7 in the diagnosis: it was not shown" in back and "- 17.3 % in the diagnosis" in back and back.count("in the diagnosis:") == 2
    assert made.text.startswith("Overall 49 against 47, 2.0 more, but pass@32 fell to 61.7 [not in the record], entropy by 17.3 % [not in the record] until")
    assert "61.7 [not in the record]" in propose.prompt(context(reflections={"c0000": made}), Config(), "", ())  # later proposals see the mark
    llm = Scripted({"reflect": [json.dumps(diagnosis(diagnosis=said)), json.dumps(diagnosis())]})
    assert "not in the record" not in reflect(llm, facts(), RULES, Config()).text  # corrected in time


def test_a_reflection_is_asked_for_with_code_recipe_seeds_and_the_difference_to_the_parent():
    llm = Scripted({"reflect": [json.dumps(diagnosis())]})
    reflect(llm, facts(files={"algorithm.py": CLIP_HIGHER_CODE}), RULES, Config())
    for seen in ("class ClipHigher(Algorithm)", "48 training steps, each 16 prompts x 8", "by training seed 0: 49", "- against its parent: 2\n"):
        assert seen in llm.asked("reflect")[0], seen


@pytest.mark.parametrize(("figure", "shown"), [
    (cited("reward", 10, 1.0, "grpo"), "GRPO's reward at step 10 = 1"),  # the baseline has one seed, the candidate's mean is 1.1
    (cited("overall", None, 47.0, "grpo"), "GRPO's overall = 47"), (cited("hard/pass@32", None, 40.5, "parent"), "the parent's hard/pass@32 = 40.5"),
    (cited("delta.low", None, 0.5), "delta.low = 0.5"), (cited("overall.high", None, 50.0), "overall.high = 50"),
    (cited("overall@0.5", None, 46.0), "overall@0.5 = 46"), (cited("entropy_end", None, 0.5), "entropy_end = 0.5"),
    (cited("parent_delta", None, 2.0), "parent_delta = 2")])
def test_every_figure_that_is_shown_can_be_cited(figure, shown):
    """Of the candidate, of GRPO or of the parent: nothing goes back."""
    made = reflect(Scripted({"reflect": [json.dumps(diagnosis(citations=[figure]))]}), facts(), RULES, Config())
    assert f"Figures: {shown}.\n" in made.text


def test_a_diagnosis_cites_something_if_anything_was_shown():
    llm = Scripted({"reflect": [json.dumps(diagnosis(citations=[])), json.dumps(diagnosis())]})
    assert reflect(llm, facts(), RULES, Config()).author == "llm:m" and "at least one figure was wanted" in llm.asked("reflect")[1]
    nothing = facts(outcome=Outcome.CANDIDATE_ERROR, cause="check-failed", score=None, curves={})
    assert reflect(Scripted({"reflect": [json.dumps(diagnosis(citations=[]))]}), nothing, RULES, Config()).author == "llm:m"


@pytest.mark.parametrize("rules", ["supported", "undecided", "refuted", "failed"])
@pytest.mark.parametrize("model", ["supported", "refuted"])
def test_words_do_not_decide_about_scores(rules, model):
    """The interval's verdict stands, the model's stands beside it, and both are shown to later proposals."""
    made = reflect(Scripted({"reflect": [json.dumps(diagnosis(verdict=model))]}), facts(), replace(RULES, verdict=rules), Config())
    assert (made.verdict, made.hypothesis) == (rules, model) and Reflection.from_json(made.to_json()) == made
    text = propose.prompt(context(reflections={"c0000": made}), Config(), "", ())
    assert f"- reflection (scores {rules}; hypothesis {model}; " in text and f"; undecided, hypothesis {model}" in text


def test_a_reflection_of_an_older_record_is_read():
    assert Reflection.from_json({"verdict": "supported", "text": "", "symptoms": [], "author": "llm:m"}).hypothesis == ""


@pytest.mark.parametrize("trouble", [["no", "no"], [Refused("no")]])
def test_without_a_usable_reply_the_rules_speak(trouble):
    made = reflect(Scripted({"reflect": trouble}), facts(), RULES, Config())
    assert (made.verdict, made.author) == ("supported", "rules") and made.text.startswith(RULES.text)


def test_an_endpoint_that_is_down_is_waited_for():
    with pytest.raises(Unavailable):
        reflect(Scripted({"reflect": [Unavailable("down")]}), facts(), RULES, Config())


def test_the_parents_curves_are_shown_and_can_be_cited_at_their_steps():
    rows = [{"step": n, "entropy": 0.9} for n in range(11)]
    child = replace(CLIP_HIGHER, parents=("c0002",))
    llm = Scripted({"reflect": [json.dumps(diagnosis(citations=[cited("entropy", 10, 0.9, "parent")]))]})
    made = reflect(llm, facts(proposal=child, parent_curves={"0": rows}), RULES, Config())
    assert "| 10 | 0.9 |" in section(llm.asked("reflect")[0], "The parent's training curves, same seeds")
    assert "Figures: the parent's entropy at step 10 = 0.9." in made.text
    llm = Scripted({"reflect": [json.dumps(diagnosis(citations=[cited("reward", 10, 1.0, "parent")]))]})  # of a parent that is GRPO
    assert "Figures: the parent's reward at step 10 = 1." in reflect(llm, facts(), RULES, Config()).text


def test_later_proposals_are_told_the_checks_message_and_not_the_opinion_on_it():
    llm = Scripted({"reflect": [json.dumps(diagnosis(citations=[]))]})
    failed = facts(outcome=Outcome.CANDIDATE_ERROR, cause="check-failed", message="direction: it must rise: check the sign", score=None, curves={})
    made = reflect(llm, failed, replace(RULES, verdict="failed"), Config())
    assert "failed: check-failed, direction: it must rise: check the sign; failed" in evidence.line(entry("c0002", "A", cause="check-failed", verdict="failed"), made)


def test_a_failed_candidate_is_shown_with_its_cause():
    llm = Scripted({"reflect": [json.dumps(diagnosis(citations=[]))]})
    failed = facts(outcome=Outcome.CANDIDATE_ERROR, cause="nonfinite-loss", message="loss is nan at step 3", score=None, curves={})
    assert reflect(llm, failed, replace(RULES, verdict="failed"), Config()).verdict == "failed"
    assert "failed: nonfinite-loss" in llm.asked("reflect")[0] and "No training step was finished" in llm.asked("reflect")[0]


def test_curves_are_condensed_to_means_between_a_few_steps():
    whole, short = ({"0": [{"step": n, "reward": n} for n in range(count)]} for count in (97, 30))
    table = evidence.curves_text(whole, 96).splitlines()
    assert len(table) == 2 + evidence.POINTS
    # the first step, then every 12th, each with the mean of the 12 steps up to it: (1 + ... + 12) / 12 = 6.5, (85 + ... + 96) / 12
    assert table[0] == "| step | reward |" and table[2:4] == ["| 0 | 0 |", "| 12 | 6.5 |"] and table[-1] == "| 96 | 90.5 |"
    # a run that failed at step 30 has the same steps as the whole one beside it, and its last
    assert evidence.curves_text(short, 96).splitlines()[2:] == ["| 0 | 0 |", "| 12 | 6.5 |", "| 24 | 18.5 |", "| 29 | 27 |"]
    failed = facts(curves=short, baseline_curves=whole)
    assert evidence.find_figure(failed, "candidate", "reward", 29) == 27 and evidence.find_figure(failed, "grpo", "reward", 36) == 30.5
    assert evidence.find_figure(failed, "grpo", "reward", 29) is None  # not shown


def test_a_long_reflection_keeps_its_end():
    text = evidence.entry_text(entry("c0001", "A"), None, Reflection("refuted", f"It starts. {'word ' * 500}\n\nNext: widen the clip."), 120)
    assert "It starts. word" in text and text.endswith("word Next: widen the clip.") and " ... " in text and len(text) < 450


def test_what_never_changes_stands_first():
    """So that a provider's cache of prompts is of use: one beginning for all that read code, and a long one for two proposals."""
    llm = Scripted({"implement": [package()], "repair": [package()], "review": [CONSISTENT], "propose": [ideas(idea())] * 2})
    implement(llm, "c0003", CLIP_HIGHER, context().parent_code)
    repair(llm, "c0003", CLIP_HIGHER, {"algorithm.py": GRPO_CODE}, ["wrong"])
    review.review(llm, "c0003", CLIP_HIGHER, {"algorithm.py": CLIP_HIGHER_CODE})
    other = context("c0004", entries=(*context().entries, entry("c0003", "NEW", mechanisms=("new",))), parent=entry("c0001", "DR-GRPO"), directive="write less")
    for seen in (context(), other):
        propose.propose(llm, seen, Config.model_validate({"agent": {"models": {"default": ("m",)}}}), "", load_cards())
    first = {r.messages[0]["content"] for r in llm.requests}
    assert len(first) == 1 and "class RolloutBatch" in first.pop()
    one, two = llm.asked("propose")
    assert one.startswith(two[:two.index("- c0003 NEW")])  # all before the newest entry: task, recipe, older entries


def test_the_contract_names_every_check():
    from poise_hpc.algorithms import checks

    text = render("contract", interface="")
    assert [c.name for c in checks.CHECKS if f"`{c.name}`" not in text] == []
    assert f"no advantage above {checks.LARGEST:g}" in text and f"at most {checks.STATE_BYTES // 1024} KiB" in text


# --- notes


def notes(**changes):
    return {"principles": [{"principle": "Sum tokens", "why": "no length bias", "supports": ["c0001"], "contradicts": ["c0002"]}],
            "open_questions": ["does it hold in the stress lab?"]} | changes


def test_notes_are_revised_in_turn_and_read_by_later_proposals(tmp_path):
    llm = Scripted({"synthesize": [json.dumps(notes()), json.dumps(notes(open_questions=["another"]))]})
    assert synthesize.notes_for(llm, context("c0007"), 4, tmp_path) == ""
    eight = synthesize.notes_for(llm, context("c0008"), 4, tmp_path)
    assert eight == "- Sum tokens (no length bias) For: c0001. Against: c0002.\n- Open: does it hold in the stress lab?"
    assert synthesize.notes_for(llm, context("c0008"), 4, tmp_path) == eight  # again: nothing is asked
    assert synthesize.notes_for(llm, context("c0011"), 4, tmp_path) == eight
    assert "another" in synthesize.notes_for(llm, context("c0012"), 4, tmp_path)
    assert synthesize.latest(tmp_path, 10, 4) == eight  # what was read at c0010 is read at c0010 again
    assert "- Sum tokens" in llm.asked("synthesize")[1] and "two anchors blew" in llm.asked("synthesize")[0]


@pytest.mark.parametrize(("change", "found"), [
    ({"supports": ["c0099"]}, "cites c0099"), ({"supports": []}, "no entry that supports"),
    ({"supports": ["c0001"], "contradicts": ["c0001"]}, "cannot both")])
def test_a_principle_needs_evidence_that_exists(change, found):
    principle = synthesize.Principle(**{"principle": "P", "why": "w", "supports": ["c0001"], "contradicts": []} | change)
    assert found in synthesize.problems(synthesize.Notes(principles=[principle], open_questions=[]), context().entries)[0]


def test_notes_stay_short(tmp_path):
    many = notes(principles=notes()["principles"] * 11, open_questions=["?"] * 6)
    llm = Scripted({"synthesize": [json.dumps(many), json.dumps(notes())]})
    synthesize.revise(llm, context("c0008"), 8, tmp_path)
    assert "principles: at most 10 were wanted, got 11" in llm.asked("synthesize")[1]
    assert "open_questions: at most 5 were wanted, got 6" in llm.asked("synthesize")[1] and (tmp_path / "c0008.json").exists()
    assert "At most 10 principles, at most 5 open" in llm.asked("synthesize")[0]


def test_unusable_notes_leave_the_older_ones(tmp_path):
    assert synthesize.notes_for(Scripted({"synthesize": ["no", "no"]}), context("c0008"), 8, tmp_path) == ""
