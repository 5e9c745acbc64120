"""Phase II, first half: a proposal becomes a package; what the gate, the reviewer or the checks find goes back. Rounds of repair are
kept in the proposal (`details["rounds"]`), so that the author sees what was tried, whoever asks for the next one.

The controller runs this on the login node: candidate code is text here, parsed by the static gate, never imported.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from functools import cache
from importlib.resources import files
from typing import get_args

from ..replay import LLM
from ..types import Proposal
from .base import Draft
from .conversation import BadReply, Conversation
from .package_text import read_change, read_package, show_package, without_code
from .prompts import render
from .propose import Input, with_details

ROUNDS, ROUND_CHARS = 6, 2000  # earlier rounds that are shown, and of each its problems and its change
DECLARED = re.compile(r"^responds_to:(?P<inputs>.*)$", re.M)


def implement(llm: LLM, id: str, proposal: Proposal, parent_code: Mapping[str, str], second_code: Mapping[str, str] = {}) -> dict[str, str]:
    """The whole package: file name -> text."""
    text = render("implement", proposal=proposal_text(proposal), parent_code=show_package(parent_code), interface=interface(),
                  rules=render("rules").strip(), second_code=show_package(second_code) or "There is none.")
    return Conversation(llm, "implement", id).ask(text, read_package)


def repair(llm: LLM, id: str, proposal: Proposal, package: Mapping[str, str], problems: Sequence[str]) -> Draft:
    """The draft after one round against `problems`: edits, or the proposal's `responds_to` corrected where the code was right."""
    text = render("repair", proposal=proposal_text(proposal), package=show_package(package), interface=interface(),
                  problems=_list(problems), inputs=", ".join(get_args(Input)), rules=render("rules").strip(), earlier=rounds_text(proposal))
    made = Conversation(llm, "repair", id).ask(text, lambda reply: read_repair(reply, Draft(proposal, package)))
    rounds = [*proposal.details.get("rounds", ()), {"problems": list(problems), "change": change(Draft(proposal, package), made)}]
    return Draft(with_details(made.proposal, rounds=rounds), made.files)


def rounds_text(proposal: Proposal) -> str:
    rounds = list(enumerate(proposal.details.get("rounds", ()), 1))[-ROUNDS:]
    return "\n\n".join(f"Round {n} was for:\n\n{_list(r['problems'])[:ROUND_CHARS]}\n\nand changed:\n\n```diff\n{r['change'][:ROUND_CHARS]}\n```"
                       for n, r in rounds) or "None."


def change(old: Draft, new: Draft) -> str:
    """What a round changed, as a diff."""
    lines = [line for name in sorted({*old.files, *new.files}) for line in unified_diff(
        old.files.get(name, "").splitlines(), new.files.get(name, "").splitlines(), name, name, n=1, lineterm="")]
    before, after = (d.proposal.details.get("responds_to") for d in (old, new))
    return "\n".join(lines + ([f"responds_to: {', '.join(after)}"] if after != before else []))


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {each}" for each in lines)


def read_repair(reply: str, draft: Draft) -> Draft:
    declared = DECLARED.search(without_code(reply))
    files = read_change(reply, draft.files, may_stay=declared is not None)
    if declared is None:
        return Draft(draft.proposal, files)
    inputs = {word for word in re.split(r"[\s,`]+", declared["inputs"]) if word}
    if unknown := sorted(inputs - set(get_args(Input))):
        raise BadReply(f"responds_to: {', '.join(unknown)} is no input; known: {', '.join(get_args(Input))}")
    return Draft(with_details(draft.proposal, responds_to=sorted(inputs)), files)


def proposal_text(proposal: Proposal) -> str:
    hyper, meanings = proposal.details.get("hyperparameters", {}), proposal.details.get("meanings", {})
    return "\n".join([
        f"- name: {proposal.name}", f"- parents: {', '.join(proposal.parents)}", f"- hypothesis: {proposal.hypothesis}",
        f"- mechanisms: {', '.join(proposal.mechanisms)}", f"- change: {proposal.description}",
        f"- expected effect: {proposal.expected_effect}",
        f"- responds to: {', '.join(proposal.details.get('responds_to', ())) or 'not said'}",
        *(f"- hyperparameter {name} = {value!r}: {meanings.get(name, '')}" for name, value in hyper.items()),
        f"- sources: {', '.join(proposal.sources) or 'none'}"])


@cache
def interface() -> str:
    """The contract and its helpers, as the installed source: a description of them would go stale."""
    folder = files("poise_hpc.algorithms")
    return "\n\n".join(f"```python poise_hpc/algorithms/{name}\n{folder.joinpath(name).read_text().rstrip()}\n```"
                       for name in ("base.py", "ops.py", "grpo.py"))
