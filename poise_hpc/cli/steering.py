"""Change a campaign: orders and guidance, through its inbox. Carried out here unless a controller is at work."""
from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import click

from ..types import UsageError
from .common import CANDIDATE, PACKAGE, CandidateId, as_json, campaign_argument, emit
from .driving import build


@click.command()
@campaign_argument
@click.argument("folder", type=PACKAGE, metavar="FOLDER|FILE.py")
@click.option("--parent", type=CANDIDATE, help="Candidate it descends from.")
@as_json
def add(campaign: Path, folder: Path, parent: str | None, as_json: bool) -> None:
    """Put an own algorithm package into the pipeline. It gets the same checks, training, evaluation and archive."""
    from .. import duplicates, orders, packages
    from ..campaign import Campaign

    opened = Campaign.open(campaign)
    if parent is not None:
        opened.load(parent)
    with packages.folder_of(folder) as package:
        data = {"inbox": str(orders.package(opened, package, parent)), "same_code_as": duplicates.same_code(opened, package)}
    if known := data["same_code_as"]:
        click.echo(f"warning: {known} has exactly this code; it will be trained all the same", err=True)
    emit(data, as_json,
         lambda d: f"{folder} is in the inbox; `poise-hpc run {opened.word}` takes it up")


def order(kind: str, text: str, whole: bool) -> click.Command:
    @click.command(name=kind, help=text)
    @campaign_argument
    @click.argument("candidate", type=CandidateId("prepare"), required=not whole)
    @as_json
    def command(campaign: Path, candidate: str | None, as_json: bool) -> None:
        from .. import jobspec, orders
        from ..campaign import Campaign
        from ..types import Stage

        opened = Campaign.open(campaign)
        if candidate is not None:
            stage = (jobspec.home(opened) if candidate == "prepare" else opened.load(candidate)).stage
            if stage == Stage.ARCHIVED or (stage == Stage.HELD) != (kind == "retry"):
                found = {Stage.ARCHIVED: "archived", Stage.HELD: "held already"}.get(stage, f"not held but at {stage}")
                raise UsageError(f"{candidate} is {found}: there is nothing to {kind}")
        orders.give(opened, kind, candidate)
        settle(opened, as_json)

    return command


retry = order("retry", "Go on with what is held. One CANDIDATE, or all.", whole=True)
hold = order("hold", "Stop one CANDIDATE's jobs. It waits for `retry`.", whole=False)
cancel = order("cancel", "Stop all jobs and propose nothing new. Or stop one CANDIDATE's jobs. `retry` goes on, `drain --off` proposes again.",
               whole=True)


@click.command()
@campaign_argument
@click.option("--off", is_flag=True, help="Propose again.")
@as_json
def drain(campaign: Path, off: bool, as_json: bool) -> None:
    """Finish what runs, propose nothing new."""
    from .. import orders
    from ..campaign import Campaign

    opened = Campaign.open(campaign)
    orders.give(opened, "resume" if off else "drain")
    settle(opened, as_json)


@click.command()
@campaign_argument
@click.argument("text")
@as_json
def directive(campaign: Path, text: str, as_json: bool) -> None:
    """What the search is to aim at from now on. TEXT is a sentence; "" ends it."""
    from .. import guidance

    named = guidance.objectives(text)
    tell(campaign, "directive", text, as_json)
    click.echo(f"selection also weighs: {', '.join(named) or 'nothing new; it knows the words of length and cost'}", err=as_json)


@click.command()
@campaign_argument
@click.argument("text")
@as_json
def idea(campaign: Path, text: str, as_json: bool) -> None:
    """A suggestion that the language model works out next."""
    from ..campaign import Campaign

    if Campaign.open(campaign).config.search.proposer != "llm":
        raise UsageError("only a language model can read an idea (search.proposer: llm); `poise-hpc add` takes code")
    tell(campaign, "idea", text, as_json)


@click.command()
@campaign_argument
@click.argument("candidate", type=CANDIDATE, required=False)
@click.option("--off", is_flag=True, help="Choose parents again.")
@as_json
def pin(campaign: Path, candidate: str | None, off: bool, as_json: bool) -> None:
    """Make CANDIDATE the parent of all that is proposed next."""
    from ..archive import ArchiveView
    from ..campaign import Campaign

    opened = Campaign.open(campaign)
    if off == bool(candidate):
        raise UsageError("give a candidate, or --off")
    if candidate and not any(e.id == candidate and e.score for e in ArchiveView.load(campaign).entries):
        raise UsageError(f"{candidate} has no score in the archive; `poise-hpc leaderboard {opened.word}` lists those that have")
    tell(campaign, "pin", candidate or "", as_json)


@click.command()
@campaign_argument
@click.argument("what")
@click.option("--off", is_flag=True, help="Allow it again.")
@click.option("--new", is_flag=True, help="WHAT is a mechanism that nobody has used yet.")
@as_json
def veto(campaign: Path, what: str, off: bool, new: bool, as_json: bool) -> None:
    """Never again WHAT, a candidate or a mechanism. A candidate as parent; a mechanism in a parent or a proposal."""
    from ..campaign import Campaign
    from ..types import BASELINE_ID

    opened = Campaign.open(campaign)
    if what == BASELINE_ID:
        raise UsageError(f"{BASELINE_ID} stays a possible parent: something must remain")
    if re.fullmatch(r"c\d+", what):
        opened.load(what)
    else:
        known_mechanism(opened, what, new)
    tell(campaign, "veto", what, as_json, off)


def known_mechanism(campaign: Any, name: str, new: bool) -> None:
    """A misspelt veto would forbid nothing, and nobody would notice: UsageError. A language model may invent names, so `new` lets one pass."""
    from .. import guidance
    from ..agent.propose import SLUG

    if not SLUG.fullmatch(name):
        raise UsageError(f"{name!r} can be no mechanism: they are lower-case slugs like kimi-length")
    known = guidance.mechanisms(campaign) | guidance.at(campaign.root, sys.maxsize, None, 0).vetoed
    close = difflib.get_close_matches(name, known, n=3) or sorted(k for k in known if name in k)
    if name not in known and not new:
        raise UsageError(f"no candidate, seed or catalogue entry has the mechanism '{name}'" + (f"; did you mean {' or '.join(close)}?" if close else "")
                         + f"\n`poise-hpc show {campaign.word} CANDIDATE` lists a candidate's; --new vetoes a name that nobody has used yet")
    if name not in known:
        click.echo(f"nobody has used '{name}' yet: this veto takes effect only if it is spelt so", err=True)


def tell(campaign: Path, kind: str, text: str, as_json: bool, off: bool = False) -> None:
    from .. import orders
    from ..campaign import Campaign

    opened = Campaign.open(campaign)
    orders.give(opened, kind, text=text, off=off)
    settle(opened, as_json)


def settle(campaign: Any, as_json: bool = False) -> None:
    """Carry the order out here, unless a controller is at work, which then does it within a second."""
    from .. import orders
    from ..lock import CampaignBusy

    try:
        with campaign.lock():
            orders.obey(build(campaign, say=lambda line: click.echo(line, err=as_json), thinks=False))
        data = {"carried_out": True, "by": "this command"}
    except CampaignBusy:
        data = {"carried_out": False, "by": "the running controller, at its next step"}
    emit(data, as_json, lambda d: "done" if d["carried_out"] else f"this will be carried out by {d['by']}")
