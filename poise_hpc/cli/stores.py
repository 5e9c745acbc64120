"""`archive`: a campaign's HDF5 records. `data`: problem sets of the mathematics task."""
from __future__ import annotations

import sys
from pathlib import Path

import click

from .common import FILE, FOLDER, as_json, campaign_argument, emit

REPLACE = click.option("--replace", is_flag=True, help="Another content under a name that is there already.")


@click.command()
@click.argument("campaign", type=click.Path(exists=True, path_type=Path), metavar="CAMPAIGN|FILE.h5")
@as_json
def verify(campaign: Path, as_json: bool) -> None:
    """Read every record and compare its content with its hash. A folder with records/ will do, or one record's file."""
    from .. import archive

    found = archive.verify(campaign) if campaign.is_file() else []
    problems = ({campaign.stem: found} if found else {}) if campaign.is_file() else archive.verify_campaign(campaign)
    emit({"campaign": str(campaign), "problems": problems}, as_json,
         lambda d: "\n".join(f"{id}: {text}" for id, texts in d["problems"].items() for text in texts) +
         ("\nmove a damaged record away, and `poise-hpc run` writes it again from the candidate's folder, if that is still there "
          "(one that the index does not know yet it sets aside by itself)" if d["problems"] else "every record is whole"))
    sys.exit(1 if problems else 0)


@click.command()
@campaign_argument
@as_json
def rebuild(campaign: Path, as_json: bool) -> None:
    """Make index.h5 anew from the records."""
    from ..archive import rebuild as rebuild_index

    view = rebuild_index(campaign)
    emit({"indexed": len(view.entries), "problems": view.problems}, as_json,
         lambda d: "\n".join([f"{d['indexed']} records indexed", *(f"{id}: {text}" for id, text in d["problems"].items())]))
    sys.exit(1 if view.problems else 0)


@click.command()
@campaign_argument
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--transcript", is_flag=True, help="With all that the language model was sent and said.")
@as_json
def pack(campaign: Path, file: Path, transcript: bool, as_json: bool) -> None:
    """Records, configuration and events as one tar FILE. To share a campaign, or to keep it in one file; `tar xf` brings it back."""
    from ..campaign import Campaign
    from ..pack import pack as write

    emit(write(Campaign.open(campaign), file, transcript), as_json,
         lambda d: f"{d['file']}: {d['records']} records, {d['bytes'] / 1e6:.1f} MB  sha256 {d['sha256']}")


@click.command()
@click.argument("name")
@click.argument("folder", type=FOLDER)
@REPLACE
@as_json
def fetch(name: str, folder: Path, replace: bool, as_json: bool) -> None:
    """Download the published set NAME into FOLDER. From the Hugging Face hub; needs internet."""
    from .. import data as sets

    emit(sets.fetch(name, folder, replace=replace), as_json, lambda e: f"{name}: {e['count']} problems  sha256 {e['sha256']}  {e['licence']}")


@click.command(name="import")
@click.argument("name")
@click.argument("file", type=FILE)
@click.argument("folder", type=FOLDER)
@REPLACE
@as_json
def import_set(name: str, file: Path, folder: Path, replace: bool, as_json: bool) -> None:
    """Take FILE into FOLDER as the set NAME. FILE is .jsonl, .json or .parquet."""
    from .. import data as sets

    entry = sets.import_file(name, file, folder, replace=replace)
    emit(entry, as_json, lambda e: f"{name}: {e['count']} problems  sha256 {e['sha256']}  {e['licence']}")


@click.command(name="verify")
@click.argument("folder", type=FOLDER)
@as_json
def verify_sets(folder: Path, as_json: bool) -> None:
    """Compare every set in FOLDER with its lock; count duplicates and overlaps."""
    from .. import data as sets

    report = sets.verify(folder)
    emit(report, as_json, sets.verify_text)
    sys.exit(1 if report["faults"] else 0)
