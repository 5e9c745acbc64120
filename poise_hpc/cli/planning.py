"""What can be known before anything is submitted: `plan`, `config`, `catalogue`."""
from __future__ import annotations

import sys
from pathlib import Path

import click

from ..types import UsageError
from .common import FILE, as_json, emit, site_option


@click.command()
@click.argument("target", type=click.Path(exists=True, path_type=Path), metavar="CONFIG|CAMPAIGN", required=False)
@click.option("--config", "config_file", type=FILE, help="The same as CONFIG, as `run` has it.")
@site_option
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Hugging Face folder or config.json, instead of the config's model; weights are not needed.")
@as_json
def plan(target: Path | None, config_file: Path | None, site_file: Path | None, model: Path | None, as_json: bool) -> None:
    """What it will need and cost: memory of a rank line by line, seconds and GPU-hours.

    Of a campaign, corrected by what its own runs took. Exit code 2: it cannot fit; the cheapest ways out are named."""
    from .. import config as configuration
    from .. import site as sites
    from ..campaign import Campaign
    from ..planning import plan as planning
    from ..planning.text import text

    if (target is None) == (config_file is None):
        raise UsageError("plan needs one of CONFIG, --config CONFIG and CAMPAIGN: `poise-hpc plan configs/demo.yaml`")
    target = target or config_file
    assert target is not None
    campaign = Campaign.open(target) if target.is_dir() else None
    config = campaign.config if campaign else configuration.load(target)
    kept = target / "site.yaml"
    site = sites.load(site_file) if site_file else sites.load(kept) if campaign and kept.exists() else None
    data = planning.plan(config, site, campaign, model)
    emit(data, as_json, text)
    sys.exit(2 if data["memory"]["fits"] is False else 0)


@click.command()
@click.argument("file", type=FILE, required=False)
@as_json
def config(file: Path | None, as_json: bool) -> None:
    """Every setting: value, type, limits, meaning. Of FILE, what it names as its base included, else the defaults.

    Prints YAML that is itself a config file."""
    from .. import config as configuration
    from .. import reference

    chosen = configuration.load(file) if file else configuration.Config()
    emit(reference.data(chosen) if as_json else chosen, as_json, reference.text)


@click.command()
@click.argument("words", nargs=-1, metavar="[NAME]...")
@as_json
def catalogue(words: tuple[str, ...], as_json: bool) -> None:
    """The offline proposer's mechanisms: formula, purpose, source. All, or what NAME is: QAE, quantile-baseline, RLOO-OPMASK-GRPO."""
    from ..agent import listing

    emit(listing.rows(words), as_json, listing.text)
