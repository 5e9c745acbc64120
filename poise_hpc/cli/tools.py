"""Without a campaign: is this machine fit, is this package sound."""
from __future__ import annotations

import sys
from pathlib import Path

import click

from .common import FILE, FOLDER, PACKAGE, as_json, emit


@click.command()
@click.argument("folder", type=PACKAGE, metavar="FOLDER|FILE.py")
@as_json
def check(folder: Path, as_json: bool) -> None:
    """Contract checks of an algorithm package. And the static gate before them, isolated as a job would be; proposal.json is read as `add` does."""
    from .. import standalone

    data = standalone.check(folder)
    emit(data, as_json, standalone.check_text)
    sys.exit(0 if data["outcome"] == "succeeded" else 1)


@click.command()
@click.option("--site", "site_file", type=FILE, help="Site file: also look at its Slurm, and from two of its nodes.")
@click.option("--config", "config_file", type=FILE, help="YAML: also its ranks, model, data and agent.")
@click.option("--folder", type=FOLDER, default=".", help="Where campaigns are to be. [.]")
@click.option("--job/--no-job", default=True, help="Run a tiny job on two nodes.")
@click.option("--wait-min", type=click.FloatRange(min=0), default=10.0, show_default=True, help="For that job.")
@as_json
def doctor(site_file: Path | None, config_file: Path | None, folder: Path, job: bool, wait_min: float, as_json: bool) -> None:
    """Would a campaign run here? Every finding that is not ok says how to cure it."""
    from .. import doctor as surgery

    data = surgery.examine(site_file, config_file, folder.absolute(), job, wait_min, say=lambda line: click.echo(line, err=True))
    emit(data, as_json, surgery.text)
    sys.exit(1 if data["failed"] else 0)
