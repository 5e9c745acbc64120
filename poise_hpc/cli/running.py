"""Drive a campaign: `run`, `step`."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .common import FILE, FOLDER, as_json, campaign_argument, dry_run_option, emit, site_option
from .driving import build, create, drive, driving, examine, held_exit, look, note_end


def campaign_options(command: Any) -> Any:
    """What a campaign is made of, or is to take over."""
    for option in (click.option("--force", is_flag=True, help="Submit what by `plan`'s estimate does not fit the site's GPUs."),
                   click.option("--cache-dir", type=FOLDER, envvar="POISE_CACHE_DIR", help="Warm-started models. [~/.cache/poise_hpc]"),
                   dry_run_option, click.option("--max-candidates", type=click.IntRange(0), help="Raise or lower search.candidates."),
                   site_option, click.option("--config", "config_file", type=FILE, help="YAML; defaults are the base lab.")):
        command = option(command)
    return command


@click.command()
@campaign_argument
@campaign_options
@as_json
def run(campaign: Path, config_file: Path | None, site_file: Path | None, max_candidates: int | None, dry_run: bool,
        cache_dir: Path | None, force: bool, as_json: bool) -> None:
    """Create CAMPAIGN if it is new, and loop until its budget is spent. Safe to kill and repeat."""
    from .. import standalone, views

    found, config = examine(campaign, config_file, max_candidates, site_file, force)
    if dry_run:
        return emit(standalone.submissions(campaign, config or found.config, site_file, campaign), as_json, standalone.dry_run_text)
    opened = found or create(campaign, config, cache_dir)
    controller = drive(opened, as_json, config if found else None, site_file)
    emit(views.leaderboard(opened), as_json, views.leaderboard_text)
    if why := controller.stop_proposing:
        click.echo(f"nothing new is proposed: {why}", err=as_json)
    held_exit(controller)


@click.command()
@campaign_argument
@campaign_options
@as_json
def step(campaign: Path, config_file: Path | None, site_file: Path | None, max_candidates: int | None, dry_run: bool,
         cache_dir: Path | None, force: bool, as_json: bool) -> None:
    """Go on as far as is possible now, for cron.

    Or for scrontab or a self-resubmitting job. With an LLM it waits for the calls it makes. With --config it creates CAMPAIGN if
    it is new."""
    from .. import controller as loop
    from .. import standalone, views
    from ..campaign import Campaign

    # Without a config there is one: a misspelt path in a crontab makes no campaign.
    found, config = (Campaign.open(campaign), None) if config_file is None else (None, None)
    if config_file or site_file or max_candidates is not None:
        found, config = examine(campaign, config_file, max_candidates, site_file, force)
    if dry_run:
        return emit(standalone.submissions(campaign, config or found.config, site_file, campaign), as_json, standalone.dry_run_text)
    opened = found or create(campaign, config, cache_dir)
    with driving(opened, config if found else None, site_file) as lock:
        controller = build(opened, say=lambda line: click.echo(line, err=as_json))
        if look(opened, controller):
            while controller.step():  # until nothing moves: the next call may be minutes away
                lock.touch()
            if controller.thinking.threads:  # what the agent was asked for is waited for, and taken
                controller.thinking.settle(lock.touch)
                controller.step()
            if controller.finished:
                loop.drive(controller, time.sleep, lock)  # the scheduler's queue is to hold nothing of it
        note_end(opened, controller)
    emit(views.status(opened), as_json, views.status_text)
    held_exit(controller)
