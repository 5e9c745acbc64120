"""Phase II, first half: a proposal becomes a package; what the gate, the reviewer or the checks find goes back.

The controller runs this on the login node: candidate code is text here, parsed by the static gate, never imported.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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

DECLARED = re.compile(r"^responds_to:(?P<inputs>.*)$", re.M)


def implement(llm: LLM, id: str, proposal: Proposal, parent_code: Mapping[str, str]) -> dict[str, str]:
    """The whole package: file name -> text."""
    text = render("implement", proposal=proposal_text(proposal), parent_code=show_package(parent_code), interface=interface())
    return Conversation(llm, "implement", id).ask(text, read_package)


def repair(llm: LLM, id: str, proposal: Proposal, package: Mapping[str, str], problems: Sequence[str]) -> Draft:
    """The draft after one round against `problems`: edits, or the proposal's `responds_to` corrected where the code was right."""
    text = render("repair", proposal=proposal_text(proposal), package=show_package(package), interface=interface(),
                  problems="\n".join(f"- {p}" for p in problems), inputs=", ".join(get_args(Input)))
    return Conversation(llm, "repair", id).ask(text, lambda reply: read_repair(reply, Draft(proposal, package)))


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
