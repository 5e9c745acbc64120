"""`poise-hpc archive pack`: what is worth keeping of a campaign as one file, to share it or to spare the file system its many small ones.

The tar holds records/ and index.h5, campaign.json, config.yaml, events.log, guidance.jsonl, and the same of every derived campaign; with
`transcript` also llm.jsonl, all that a language model was sent and said. Unpacked it is a folder that `leaderboard`, `show`, `rerun` and the
others read. The same campaign gives the same bytes.

Not in it: jobs' logs and files, site file, host names beyond those in the records.
"""
from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .archive import verify_campaign
from .campaign import Campaign
from .derived import existing
from .types import PoiseError

FILES = ("campaign.json", "config.yaml", "events.log", "guidance.jsonl", "index.h5")


def pack(campaign: Campaign, target: Path, transcript: bool) -> dict[str, Any]:
    """Write `target`, whole or not at all. Records that are damaged are named, and nothing is written."""
    roots = [campaign.root, *existing(campaign)]
    if problems := [f"{root / 'records' / id}.h5: {text}" for root in roots for id, texts in verify_campaign(root).items() for text in texts]:
        raise PoiseError("\n  ".join(["nothing was packed, damaged records would go on living in the copy:", *problems])
                         + f"\n`poise-hpc archive verify {campaign.word}` says how to go on")
    if target.exists():
        raise PoiseError(f"{target} exists: name another file, or remove it")
    temporary = target.with_name(f".{target.name}.tmp")
    members = [member for root in roots for member in worth_keeping(root, transcript)]
    try:
        with open(temporary, "wb") as out:
            write_tar(out, campaign, members)
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    with open(target, "rb") as packed:
        sha256 = hashlib.file_digest(packed, "sha256").hexdigest()
    return {"file": str(target), "records": sum(path.parent.name == "records" for path in members), "bytes": target.stat().st_size, "sha256": sha256}


def write_tar(out: BinaryIO, campaign: Campaign, members: list[Path]) -> None:
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in members:
            with open(path, "rb") as file:
                info = tar.gettarinfo(arcname=f"{campaign.root.name}/{path.relative_to(campaign.root)}", fileobj=file)
                info.mtime = info.uid = info.gid = 0
                info.uname = info.gname = ""
                info.mode = 0o644
                tar.addfile(info, file)


def worth_keeping(root: Path, transcript: bool) -> Iterator[Path]:
    names = (*FILES, *(("llm.jsonl",) if transcript else ()))
    yield from (root / name for name in names if (root / name).exists())
    yield from sorted((root / "records").glob("c*.h5"))
