"""Look at a campaign; nothing here writes to it, but for `report`, its page."""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from .common import CANDIDATE, HELD, CandidateId, as_json, campaign_argument, emit


@click.command()
@campaign_argument
@as_json
def status(campaign: Path, as_json: bool) -> None:
    """Where the campaign is: budget, candidates, running jobs."""
    from .. import views
    from ..campaign import Campaign

    emit(views.status(Campaign.open(campaign)), as_json, views.status_text)


@click.command()
@campaign_argument
@click.option("--every", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between looks.")
@as_json
def watch(campaign: Path, every: float, as_json: bool) -> None:
    """`status` again and again, until the campaign is done. Or held, with nobody at work. With --json: one line a look."""
    from .. import views
    from ..campaign import Campaign

    opened = Campaign.open(campaign)
    while True:
        data = views.status(opened)
        if not as_json and sys.stdout.isatty():
            click.clear()
        elif not as_json:  # a pipe or a file: the looks stand one below the other
            click.echo(time.strftime("--- %Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        click.echo(json.dumps(data, default=str) if as_json else views.status_text(data))
        if data["done"]:
            return
        if (data["held"] or data["agent_blocked"]) and not data["running"] and not data["driver"]:
            sys.exit(HELD)
        time.sleep(every)


@click.command()
@campaign_argument
@as_json
def leaderboard(campaign: Path, as_json: bool) -> None:
    """Archived candidates by score, against the baseline. With intervals over training seeds, paired in the difference."""
    from .. import reading, views

    emit(views.leaderboard(reading.open_any(campaign)), as_json, views.leaderboard_text)


@click.command()
@campaign_argument
@click.argument("candidate", type=CANDIDATE)
@as_json
def show(campaign: Path, candidate: str, as_json: bool) -> None:
    """Everything about one candidate. Proposal, why this parent, score, reflection, attempts."""
    from .. import reading, views

    emit(views.show(reading.open_any(campaign), candidate), as_json, views.show_text)


@click.command()
@campaign_argument
@click.argument("candidate", type=CandidateId("prepare"))
@click.option("--lines", type=click.IntRange(1), default=40, show_default=True, help="Of each attempt's log, the last ones.")
@as_json
def logs(campaign: Path, candidate: str, lines: int, as_json: bool) -> None:
    """The logs of a candidate's attempts. CANDIDATE `prepare` is the campaign's own job."""
    from .. import views
    from ..campaign import Campaign

    emit(views.logs(Campaign.open(campaign), candidate, lines), as_json, views.logs_text)


@click.command()
@campaign_argument
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The file. Without it: CAMPAIGN/report/report.html.")
@click.option("--candidates", type=click.IntRange(0), default=30, show_default=True, help="How many of the best get a section of their own.")
@as_json
def report(campaign: Path, out: Path | None, candidates: int, as_json: bool) -> None:
    """Everything about the search as one HTML file. Self-contained: figures, tables, details, provenance."""
    from ..campaign import Campaign
    from ..report import page

    emit(page.write(Campaign.open(campaign), out, candidates), as_json, page.summary_text)
