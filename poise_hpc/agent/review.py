"""The consistency check: does the code do what the proposal says? First mechanically, then by a reviewer's call.

Two mechanical sources: the package's syntax tree (here, before any job) and the response report of the check job
(`algorithms.checks.response_report`: which inputs the values really answer to, measured by changing them one at a time).
"""
from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from typing import get_args

from pydantic import BaseModel, ConfigDict, Field

from .. import syntax
from ..algorithms import seeds
from ..replay import LLM
from ..types import Proposal
from .conversation import Conversation, json_schema, reads_json
from .implement import proposal_text
from .package_text import show_package
from .prompts import render
from .propose import Input

# Read as an attribute or not at all. The others also come in through helpers: ratio(batch) reads logp_old.
PLAIN_INPUTS = frozenset({"components", "valid", "truncated", "length", "logp_rollout", "progress", "step"})


class Finding(BaseModel):
    model_config = ConfigDict(extra="ignore")
    claim: str = Field(description="what the proposal says")
    code: str = Field(description="what the code does instead, with the line")
    change: str = Field(description="what would make them agree")


class Verdict(BaseModel):
    model_config = ConfigDict(extra="ignore")
    reasoning: str = Field(description="each claim of the proposal against the lines that do it")
    consistent: bool
    findings: list[Finding] = Field(description="empty if consistent")


def review(llm: LLM, id: str, proposal: Proposal, package: Mapping[str, str], response: Mapping[str, float] | None = None) -> list[str]:
    """What the reviewer finds inconsistent; [] if the code does what the proposal says. `response`: of the check job, if it has run."""
    seen = [f"{k}: {', '.join(v) or 'none'}" for k, v in static_evidence(package).items()]
    text = render("review", proposal=proposal_text(proposal), package=show_package(package),
                  imported=show_package(imported(package)) or "None.", measured=measured_text(proposal, response),
                  evidence="\n".join(f"- {line}" for line in [*seen, *unread(proposal, package)]))
    verdict = Conversation(llm, "review", id).ask(text, reads_json(Verdict, _contradicts_itself), json_schema(Verdict))
    return [f"the proposal says: {f.claim}; the code: {f.code}; {f.change}" for f in verdict.findings]


def measured_text(proposal: Proposal, response: Mapping[str, float] | None) -> str:
    if response is None:
        return "Not measured yet: judge by reading."
    return "\n".join([*(f"- {name}: {change:g}" for name, change in response.items()), "",
                      *(f"- against the proposal: {line}" for line in contradictions(proposal, response))])


def mismatches(proposal: Proposal, package: Mapping[str, str]) -> list[str]:
    """Declarations of proposal and code that differ, by syntax alone. The package parses (the gate has passed). What it does not
    declare itself is looked up in the algorithms that it imports."""
    seen, base = static_evidence(package), static_evidence(imported(package))
    out = []
    mechanisms = seen["mechanisms"] or base["mechanisms"]
    if set(mechanisms) != set(proposal.mechanisms):
        out.append(f"the proposal's mechanisms are {', '.join(proposal.mechanisms)}; the code declares "
                   f"{', '.join(mechanisms) or 'none'}; they must be the same names")
    fields = dict(item.split(" = ", 1) for item in [*base["hyperparameters"], *seen["hyperparameters"]])
    for name, value in proposal.details.get("hyperparameters", {}).items():
        if name not in fields:
            out.append(f"hyperparameter {name} of the proposal is no field of the algorithm's dataclass")
        elif (number := _number(fields[name])) is not None and not math.isclose(number, value):
            out.append(f"hyperparameter {name} is {value!r} in the proposal and {fields[name]} in the code")
    return out


def unread(proposal: Proposal, package: Mapping[str, str]) -> list[str]:
    """Claimed inputs that no line reads: for the reviewer to judge, since it may be the claim that is wrong."""
    seen = static_evidence({**imported(package), **package})
    claimed = set(proposal.details.get("responds_to", ())) & PLAIN_INPUTS
    return [f"the proposal says that the values respond to `{name}`; no line reads it" for name in sorted(claimed - set(seen["inputs read"]))]


def contradictions(proposal: Proposal, response: Mapping[str, float]) -> list[str]:
    """What the proposal claims and the measured response denies, and the other way round. `response`: input -> largest
    relative change of advantages or loss when it alone is changed. No proof: a probe cannot open every gate."""
    claimed = set(proposal.details.get("responds_to", ()))
    if not claimed:
        return []
    denied = sorted(k for k in claimed if response.get(k) == 0)
    unsaid = sorted(k for k in PLAIN_INPUTS - claimed if response.get(k))
    return [f"the proposal says that the values respond to `{k}`; changing it alone changes nothing" for k in denied] + \
           [f"changing `{k}` alone changes the values; the proposal does not say so" for k in unsaid]


def static_evidence(package: Mapping[str, str]) -> dict[str, list[str]]:
    """What the syntax trees show, sorted: nothing is imported or executed."""
    trees = [syntax.parse(text) for text in package.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {
        "inputs read": sorted({n.attr for n in nodes if isinstance(n, ast.Attribute)} & set(get_args(Input))),
        "hyperparameters": sorted(_fields(nodes)),
        "mechanisms": sorted({n.args[0].value for n in nodes if isinstance(n, ast.Call) and _name(n.func) == "Mechanism"
                              and n.args and isinstance(n.args[0], ast.Constant)}
                             | {k.value.value for n in nodes if isinstance(n, ast.Call) and _name(n.func) == "Mechanism"
                                for k in n.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)}),
        "helpers": sorted({a.name for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").endswith("algorithms.ops")
                           for a in n.names}),
        "inherits from algorithms": sorted(imported(package)),
    }


def imported(package: Mapping[str, str]) -> dict[str, str]:
    """Source of the seed algorithms that the package builds on, as "poise_hpc/algorithms/gspo.py"."""
    nodes = [node for text in package.values() for node in ast.walk(syntax.parse(text))]
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    for n in nodes:
        if isinstance(n, ast.ImportFrom) and n.module:
            names |= {n.module, *(f"{n.module}.{alias.name}" for alias in n.names)}
    used = [seed for seed, module in seeds.SEEDS.items() if module in names]
    return {f"poise_hpc/algorithms/{seed}.py": seeds.source(seed) for seed in used}


def _fields(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and item.value is not None and "ClassVar" not in ast.unparse(item.annotation):
                    yield f"{_name(item.target)} = {ast.unparse(item.value)}"


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _number(text: str) -> float | None:
    try:
        return float(ast.literal_eval(syntax.parse(text).body[0].value))
    except (ValueError, TypeError, SyntaxError):
        return None


def _contradicts_itself(verdict: Verdict) -> list[str]:
    if verdict.consistent == bool(verdict.findings):
        return [f"consistent is {verdict.consistent} with {len(verdict.findings)} findings; it must be true exactly if there are none"]
    return []
