"""An entry again, on fresh seeds, without a mechanism, elsewhere; a whole campaign again from its transcript."""
from __future__ import annotations

import sys
from pathlib import Path

import click

from .common import CANDIDATE, FILE, FOLDER, as_json, campaign_argument, dry_run_option, emit, site_option
from .driving import drive, held_exit


def derived(kind: str, text: str, config_needed: bool = False, seeds: str = "as many as the entry has") -> click.Command:
    alone = kind == "rerun"  # needs no more than the entry's record

    @click.command(name=kind, help=text)
    @click.argument("campaign", type=click.Path(path_type=Path) if alone else FOLDER, metavar="CAMPAIGN|FILE.h5" if alone else "CAMPAIGN")
    @click.argument("candidate", type=CANDIDATE, required=not alone)
    @click.option("--seeds", type=click.IntRange(1), help=f"Number of {'paired ' * (not alone)}training seeds. [{seeds}]")
    @click.option("--config", "config_file", type=FILE, required=config_needed, help="Another setting to run in.")
    @site_option
    @dry_run_option
    @as_json
    def command(campaign: Path, candidate: str | None, seeds: int | None, config_file: Path | None, site_file: Path | None, dry_run: bool,
                as_json: bool) -> None:
        from .. import derived, reading, standalone

        origin, candidate = reading.origin(campaign, candidate)
        if dry_run:
            planned = derived.plan(kind, origin, candidate, seeds, config_file)
            return emit(standalone.submissions(planned.root, planned.config, site_file, origin.root), as_json, standalone.dry_run_text)
        target = derived.create(kind, origin, candidate, seeds, config_file)
        controller = drive(target, as_json, site_file=site_file)
        emit(derived.report(kind, target), as_json, derived.report_text)
        held_exit(controller)

    return command


FRESH = "5, fresh"
rerun = derived("rerun", "Repeat an entry from its record alone. Trains and evaluates again, and compares the numbers. CAMPAIGN may hold no more than "
                "records/, or be one record's file.")
confirm = derived("confirm", "A winner on fresh seeds and unseen prompts. Against the baseline; selection never saw the prompts.", seeds=FRESH)
ablate = derived("ablate", "A winner with each of its mechanisms switched off. In turn, on paired seeds. The candidate and the baseline are trained again beside them, so that all "
                "that is compared comes from one machine and one version.")
control = derived("control", "A candidate and the baseline on random rewards. How much of a score does training alone bring, whatever is rewarded?")
transfer = derived("transfer", "A winner against the baseline in another setting. Which one says --config.", config_needed=True, seeds=FRESH)


@click.command()
@campaign_argument
@click.argument("new", type=FOLDER)
@site_option
@dry_run_option
@as_json
def replay(campaign: Path, new: Path, site_file: Path | None, dry_run: bool, as_json: bool) -> None:
    """Run a finished LLM campaign again, as NEW. From its transcript: no endpoint, no cost; and compare the archives."""
    from .. import replaying, standalone
    from ..campaign import Campaign

    origin = Campaign.open(campaign)
    if dry_run:
        return emit(standalone.submissions(new, replaying.plan(origin)[0], site_file, origin.root), as_json, standalone.dry_run_text)
    target = replaying.create(origin, new)
    held_exit(drive(target, as_json, site_file=site_file))
    data = replaying.compare(origin, target)
    emit(data, as_json, replaying.compare_text)
    sys.exit(1 if data["different"] else 0)
