"""What a person asks of a campaign: hold, retry, cancel, drain, and what `guidance` keeps. An order is a file in `inbox/`; whoever drives the
campaign carries it out at its next step, so that a running controller and a command line never write the same state.
"""
from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, guidance
from .campaign import Attempt, Campaign, Candidate
from .cluster.slurm import SchedulerAway
from .jobs import STOP
from .lifecycle import RESTING
from .proposing import DRAIN
from .types import Outcome, Stage, UsageError, candidate_id

if TYPE_CHECKING:
    from .controller import Controller

KINDS = ("hold", "retry", "cancel", "drain", "resume", *guidance.KINDS)


def give(campaign: Campaign, kind: str, id: str | None = None, text: str = "", off: bool = False) -> None:
    assert kind in KINDS
    files.write_json(campaign.root / "inbox" / f"{time.time_ns()}-{kind}.json", {"kind": kind, "id": id, "text": text, "off": off})


def obey(controller: Controller) -> bool:
    """Carry out every order, oldest first. An order is deleted after it took effect: all of them may be repeated."""
    paths = sorted((controller.campaign.root / "inbox").glob("*.json"))
    for path in paths:
        if (order := read(path)) is None:
            path.rename(path.with_name(f"{path.name}.refused"))
            controller.event("campaign", "order refused", f"{path.name} is none; {', '.join(KINDS)} are, as {{\"kind\": ..., \"id\": ...}}")
        else:
            carry_out(controller, order, path.stem)
            path.unlink()
    return bool(paths)


def read(path: Path) -> dict[str, Any] | None:
    """The order, or None if the file holds none."""
    try:
        order = files.read_json(path)
    except files.CorruptFile:
        return None
    return order if isinstance(order, dict) and order.get("kind") in KINDS and "id" in order else None


def carry_out(controller: Controller, order: dict[str, Any], name: str) -> None:
    kind, id, drain = order["kind"], order["id"], controller.campaign.root / DRAIN
    chosen = [c for c in [controller.home, *controller.active.values()] if id in (None, c.id)]
    match kind:
        case "drain":
            drain.touch()
        case "resume":
            drain.unlink(missing_ok=True)
        case "hold" | "cancel":
            for candidate in chosen:
                stop(controller, candidate)
            if id is None:
                drain.touch()
        case "retry":
            for candidate in chosen:
                retry(candidate)
        case _:
            number, text, off = controller.proposing.unseen(controller.count), str(order.get("text", "")), bool(order.get("off"))
            guidance.note(controller.campaign.root, name, number, kind, text, off, controller.clock())
            said = " ".join(filter(None, ("off" if off or not text else "", text)))
            controller.event("campaign", kind, f"{said}  from {candidate_id(number)} on")
            return
    controller.event(id or "campaign", kind, "by a person")


def stop(controller: Controller, candidate: Candidate) -> None:
    """Its jobs save and end; the candidate waits for `retry`. The jobs learn it from their folders, whatever the scheduler does; that
    is told so that they hear of it at once, and that what waits leaves the queue."""
    try:
        tell(controller, [a for a in candidate.attempts if a.result is None])
    except SchedulerAway as away:
        controller.event(candidate.id, "scheduler away", f"{away}; jobs end as soon as they look into their folders")
    if candidate.stage not in RESTING:
        candidate.held_from, candidate.stage = candidate.stage, Stage.HELD
        candidate.cause, candidate.message = "by-a-person", f"held by a person; `poise-hpc retry {controller.campaign.word}` goes on"
        candidate.save()


def tell(controller: Controller, running: list[Attempt]) -> int:
    """Jobs are to save and end; how many could be told so at once."""
    for attempt in running:
        with suppress(OSError):  # a full disk: those that run hear of it all the same
            files.create_exclusive(attempt.folder / STOP, {"time": controller.clock()})
    return controller.cluster.cancel([controller.submitted(a) for a in running]) or 0


def retry(candidate: Candidate) -> None:
    """Back to where it was held, its infrastructure failures pardoned."""
    if candidate.stage == Stage.HELD and candidate.held_from is not None:
        candidate.stage, candidate.held_from = candidate.held_from, None
        candidate.forgiven = [a.name for a in candidate.attempts if a.outcome is Outcome.INFRA_ERROR]
        candidate.cause = candidate.message = ""
        candidate.save()


def package(campaign: Campaign, folder: Path, parent: str | None) -> Path:
    """A person's algorithm package into the inbox: whole or not at all. The static gate reads it first, and runs nothing."""
    import os
    import shutil

    from .algorithms import gate
    from .packages import read_package

    draft = read_package(folder)
    if findings := gate.check_files(draft.files):
        raise UsageError("\n  ".join([f"{folder.name} does not pass the static gate (file:line rule: what):", *map(str, findings)])
                         + "\nnothing was added; docs/ALGORITHMS.md says what a package may hold")
    target = campaign.root / "inbox" / f"{time.time_ns()}-{folder.resolve().name}"
    temporary = target.with_name(f".{target.name}.tmp")
    with files.naming(target.parent):
        temporary.mkdir()
    try:
        for name, text in draft.files.items():
            files.write_atomic(temporary / name, text)
        parents = [parent] if parent else list(draft.proposal.parents)
        files.write_json(temporary / "proposal.json", draft.proposal.to_json() | {"parents": parents})
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
