"""Phase II, first half: a proposal becomes a package; what the gate, the reviewer or the checks find goes back.

The controller runs this on the login node: candidate code is text here, parsed by the static gate, never imported.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from ..replay import LLM
from ..types import Proposal
from .conversation import Conversation
from .package_text import read_change, read_package, show_package
from .prompts import render


def implement(llm: LLM, id: str, proposal: Proposal, parent_code: Mapping[str, str]) -> dict[str, str]:
    """The whole package: file name -> text."""
    text = render("implement", proposal=proposal_text(proposal), parent_code=show_package(parent_code), interface=interface())
    return Conversation(llm, "implement", id).ask(text, read_package)


def repair(llm: LLM, id: str, proposal: Proposal, package: Mapping[str, str], problems: Sequence[str]) -> dict[str, str]:
    """The package after one round of edits against `problems`."""
    text = render("repair", proposal=proposal_text(proposal), package=show_package(package), interface=interface(),
                  problems="\n".join(f"- {p}" for p in problems))
    return Conversation(llm, "repair", id).ask(text, lambda reply: read_change(reply, package))


def proposal_text(proposal: Proposal) -> str:
    hyper, meanings = proposal.details.get("hyperparameters", {}), proposal.details.get("meanings", {})
    return "\n".join([
        f"- name: {proposal.name}", f"- parents: {', '.join(proposal.parents)}", f"- hypothesis: {proposal.hypothesis}",
        f"- mechanisms: {', '.join(proposal.mechanisms)}", f"- change: {proposal.description}",
        f"- expected effect: {proposal.expected_effect}",
        f"- responds to: {', '.join(proposal.details.get('responds_to', ())) or 'not said'}",
        *(f"- hyperparameter {name} = {value:g}: {meanings.get(name, '')}" for name, value in hyper.items()),
        f"- sources: {', '.join(proposal.sources) or 'none'}"])


@cache
def interface() -> str:
    """The contract and its helpers, as the installed source: a description of them would go stale."""
    folder = files("poise_hpc.algorithms")
    return "\n\n".join(f"```python poise_hpc/algorithms/{name}\n{folder.joinpath(name).read_text().rstrip()}\n```"
                       for name in ("base.py", "ops.py", "grpo.py"))
