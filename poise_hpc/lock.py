"""Who drives a campaign: one controller at a time, which says so in a file."""
from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from . import files
from .types import PoiseError

LOCK = "controller.lock"  # in the campaign's folder
LOCK_STALE_S = 900.0      # a lock of another host that was not refreshed for so long


class CampaignBusy(PoiseError):
    """Another controller drives this campaign."""


class Lock:
    """Who drives the campaign. An exclusive file with owner and time, refreshed by `touch`; the dead are taken over."""

    def __init__(self, path: Path):
        self.path = path
        self.mine = files.process_identity() | {"taken": time.time()}

    def take(self) -> None:
        while not files.create_exclusive(self.path, self.mine):
            owner, age = self._owner()
            if owner and _holds(owner, age):
                raise CampaignBusy(f"{self.path.parent} is driven by process {owner['pid']} on {owner['host']} "
                                 f"(lock refreshed {age:.0f} s ago). Stop that one first; two would submit everything twice")
            grave = self.path.with_name(f".controller.lock.dead.{os.getpid()}.{time.monotonic_ns()}")
            try:
                os.rename(self.path, grave)
            except FileNotFoundError:
                continue
            # Another controller may have buried the dead lock and taken a new one between our look and our rename.
            if _whole(grave) != owner:
                try:
                    os.link(grave, self.path)
                except FileExistsError:
                    pass
            grave.unlink()

    def _owner(self) -> tuple[dict[str, Any] | None, float]:
        return _owner(self.path)

    def touch(self) -> None:
        """Refresh it. CampaignBusy if it is no longer ours: a suspended machine's lock is stale when it wakes up."""
        if (owner := self._owner()[0]) != self.mine:
            by = f"process {owner['pid']} on {owner['host']} has taken it" if owner else "it is gone"
            raise CampaignBusy(f"{self.path} is no longer ours: {by}. This controller stops; its jobs go on")
        os.utime(self.path)

    def release(self) -> None:
        if self._owner()[0] == self.mine:
            self.path.unlink()


def driver(campaign: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """{host, pid, refreshed_s} of the controller at work, and of one that is gone and left its lock."""
    owner, age = _owner(campaign / LOCK)
    if owner is None:
        return None, None
    said = {"host": owner["host"], "pid": owner["pid"], "refreshed_s": round(max(age, 0.0), 1)}
    return (said, None) if _holds(owner, age) else (None, said)


def _owner(lock: Path) -> tuple[dict[str, Any] | None, float]:
    """As the file says, and how many seconds ago it was refreshed."""
    try:
        return _whole(lock), time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None, 0.0


def _holds(owner: dict[str, Any], age: float) -> bool:
    """Of another host's process only its silence tells that it is dead."""
    alive = files.same_host_alive(owner)
    return age < LOCK_STALE_S if alive is None else alive


def _whole(lock: Path) -> dict[str, Any] | None:
    """Its owner; None if there is no lock, or one that nobody has written in full."""
    try:
        return files.read_json(lock)
    except files.CorruptFile:
        return None
