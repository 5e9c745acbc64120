"""A campaign to look at and to run entries of again, from what there is of it: its folder, a folder that holds no more
than `records/`, or one record's file.

What is made from records alone has no inbox, no running jobs and no budget: it cannot be driven.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from . import archive
from . import config as configuration
from .campaign import Campaign
from .entry import Entry
from .types import UsageError


def open_any(root: Path) -> Campaign:
    """The campaign in a folder; one made of its records, if they are all that is there."""
    root = Path(os.path.abspath(root))
    if (root / "campaign.json").exists() or not (root / "records").is_dir():
        return Campaign.open(root)
    view = archive.ArchiveView.load(root)
    readable = [e.id for e in view.entries if e.id not in view.problems]
    if not readable:
        raise UsageError(f"{root} has neither campaign.json nor a record that can be read; `poise-hpc archive verify` names what is wrong")
    return _of(root, archive.read(root / "records" / f"{readable[0]}.h5"))


def origin(path: Path, id: str | None) -> tuple[Campaign, str]:
    """What an entry is to be run again from: (campaign, candidate) of a folder, or of one record's file. A file that lies in `records/`
    under its own name is that campaign's entry: nothing is to be made among records."""
    if not path.is_file():
        if id is None:
            raise UsageError(f"which entry of {path}? Give a candidate, e.g. c0001; `poise-hpc leaderboard` lists them")
        return open_any(path), id
    path = Path(os.path.abspath(path))
    entry = archive.read(path)
    if id not in (None, entry.id):
        raise UsageError(f"{path} holds {entry.id}, not {id}")
    root = path.parent.parent
    if path == root / "records" / f"{entry.id}.h5":
        return open_any(root), entry.id
    return _of(path.parent, entry, record=str(path)), entry.id


def _of(root: Path, entry: Entry, **meta: Any) -> Campaign:
    config = configuration.parse(yaml.safe_load(entry.config), f"config of {entry.id}")
    cache = os.environ.get("POISE_CACHE_DIR") or Path.home() / ".cache" / "poise_hpc"
    return Campaign(root, config, {"versions": entry.versions, "cache_dir": os.path.abspath(cache), **meta})
