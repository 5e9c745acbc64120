"""Sections to one file. No network, no foreign script: the policy in its head allows the page's own style and script, by hash, and nothing else."""
from __future__ import annotations

import base64
import hashlib
import re
import time
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .. import __version__, files
from ..campaign import Campaign
from ..types import PoiseError
from .board import leaderboard
from .choices import choices
from .confirmed import confirmed
from .costs import costs
from .curves import training
from .details import details
from .evidence import mechanisms, outcomes
from .gather import Findings, gather
from .markup import cut, h, join, text
from .opening import opening
from .pareto import pareto
from .progress import progress
from .provenance import provenance
from .tree import genealogy
from .words import note

CANDIDATES = 30
CONTENTS = {  # in the order of the page: id of a section -> what the contents call it, what makes it
    "confirmed": ("Confirmed", confirmed), "leaderboard": ("Leaderboard", leaderboard), "progress": ("Progress", progress),
    "genealogy": ("Genealogy", genealogy), "pareto": ("Trade-offs", pareto), "curves": ("Curves", training), "mechanisms": ("Mechanisms", mechanisms),
    "outcomes": ("Outcomes", outcomes), "choices": ("Parents", choices), "cost": ("Cost", costs), "details": ("Details", details),
    "provenance": ("Provenance", provenance)}


def write(campaign: Campaign, out: Path | None = None, candidates: int = CANDIDATES) -> dict[str, Any]:
    """The report as a file, whole or not at all; what is in it, and what is not."""
    findings = gather(campaign, candidates)
    path = out or campaign.root / "report" / "report.html"
    content = page(findings, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, content)
    except OSError as error:
        raise PoiseError(f"cannot write {path}: {error.strerror or error}. Give another place with --out") from None
    return {"file": str(path), "bytes": len(content.encode()), "archived": len(findings.entries), "detailed": list(findings.detailed),
            "left_out": len(findings.entries) - len(findings.detailed), "winner": findings.winner.id if findings.winner else None,
            "problems": findings.problems}


def page(f: Findings, made: str) -> str:
    """The same findings at the same time give the same page."""
    links = [h("li", h("a", words, href=f"#{name}")) for name, (words, _) in CONTENTS.items()]
    footer = h("footer", note(f"Made {made} by poise-hpc {__version__}."))
    template = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=text(cut(f"{f.campaign.root.name}: search report", 120)), policy=text(policy(template)),
        contents=h("nav", h("ul", links), aria_label="Contents"), body=join([opening(f), [make(f) for _, make in CONTENTS.values()], footer]))


def policy(template: str) -> str:
    """A Content-Security-Policy: should a text ever get through as markup, it could neither run nor fetch anything."""
    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in found)

    return f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; base-uri 'none'; form-action 'none'"


def summary_text(data: dict[str, Any]) -> str:
    left = f", {data['left_out']} left out (--candidates takes in more)" if data["left_out"] else ""
    lines = [f"{data['file']}: {data['bytes'] / 1e6:.1f} MB, {data['archived']} archived candidates, {len(data['detailed'])} in detail{left}"]
    return "\n".join(lines + [f"problem: {id}: {words}" for id, words in data["problems"].items()])
