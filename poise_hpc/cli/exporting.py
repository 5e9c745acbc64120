"""A winner leaves for the trainer that a lab uses."""
from __future__ import annotations

from pathlib import Path

import click

from .common import CANDIDATE, FOLDER, as_json, campaign_argument, emit


@click.command()
@campaign_argument
@click.argument("candidate", type=CANDIDATE)
@click.argument("folder", type=FOLDER)
@click.option("--to", "target", type=click.Choice(["trl", "verl", "openrlhf"]), required=True, help="The trainer it is for.")
@as_json
def export(campaign: Path, candidate: str, folder: Path, target: str, as_json: bool) -> None:
    """A winner as a plug-in for another trainer. FOLDER, new or empty, gets the code, an adapter, and a test that both compute the same."""
    from ..campaign import Campaign
    from ..export import create

    emit(create.export(Campaign.open(campaign), candidate, target, folder), as_json, create.text)
