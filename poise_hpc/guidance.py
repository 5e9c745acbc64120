"""What a person says to a running search: directive, ideas, pinned parent, vetoes. Each line of `guidance.jsonl` holds
from one candidate number on, so that what a candidate was proposed from is known for ever, and a replay sees the same.

    {"order", "from": 7, "kind": "directive" | "idea" | "pin" | "veto", "text", "off", "time"}

A directive that names length or cost also becomes an objective of U_pareto (`objectives`): by its words, so that "do not
shorten" is misread; `poise-hpc directive` says what it understood.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import files
from .types import BASELINE_ID, EntrySummary

if TYPE_CHECKING:
    from .campaign import Campaign

KINDS = ("directive", "idea", "pin", "veto")
FILE = "guidance.jsonl"
OBJECTIVES = {  # words of a directive -> what U_pareto then looks at as well; less of it is better
    "length": re.compile(r"\b(short|concis|brief|compact|terse|length|verbos)", re.IGNORECASE),
    "cost": re.compile(r"\b(cheap|cost|fast|quick|runtime|wall.?clock|gpu.?hours)", re.IGNORECASE)}


@dataclass(frozen=True)
class Guidance:
    """What holds for one candidate's proposal."""

    directive: str | None = None
    ideas: tuple[str, ...] = ()             # for this candidate alone
    pinned: str | None = None               # candidate that must be the parent
    vetoed: frozenset[str] = frozenset()    # candidates and mechanisms that no further parent may be or have

    @property
    def vetoed_mechanisms(self) -> frozenset[str]:
        return frozenset(v for v in self.vetoed if not re.fullmatch(r"c\d{4,}", v))


def at(folder: Path, number: int, directive: str | None, since: int) -> Guidance:
    """The guidance for candidate `number`; `directive` is the config's, until another one was given. Ideas are those from
    `since` on: between it and `number`, persons' packages took the numbers that ideas were meant for."""
    ideas: list[str] = []
    pinned: str | None = None
    vetoed: set[str] = set()
    for line in files.read_lines(folder / FILE):
        if line["from"] > number:
            continue
        match line["kind"], line["text"]:
            case "directive", text:
                directive = text or None
            case "idea", text if line["from"] >= since:
                ideas.append(text)
            case "pin", text:
                pinned = text or None
            case "veto", text:
                vetoed = vetoed - {text} if line["off"] else vetoed | {text}
    return Guidance(directive, tuple(ideas), pinned, frozenset(vetoed))


def note(folder: Path, order: str, number: int, kind: str, text: str, off: bool, time: float) -> None:
    """Holds from candidate `number` on. An order that is carried out again, after a kill, changes nothing."""
    if not any(line["order"] == order for line in files.read_lines(folder / FILE)):
        files.append_line(folder / FILE, {"order": order, "from": number, "kind": kind, "text": text, "off": off, "time": time}, sync=True)


def mechanisms(campaign: Campaign) -> frozenset[str]:
    """Every name that a mechanism has so far: in the catalogue, in the seed algorithms, in this campaign's candidates."""
    from .agent import catalogue
    from .algorithms import load, seeds
    from .archive import ArchiveView

    entries = ArchiveView.load(campaign.root).entries
    active = set(campaign.ids()) - {e.id for e in entries}
    seeded = [load.declared_mechanisms({"algorithm.py": seeds.source(name)}) for name in seeds.SEEDS]
    return frozenset(catalogue.parts()).union(*seeded, *(e.mechanisms for e in entries), *(campaign.proposal(id).mechanisms for id in active))


def objectives(directive: str | None) -> tuple[str, ...]:
    """Of "length" and "cost", those that the directive names."""
    return tuple(name for name, words in OBJECTIVES.items() if directive and words.search(directive))


def barred(said: Guidance, entries: Iterable[EntrySummary]) -> frozenset[str]:
    """Entries that a veto keeps from being parents. The baseline never: something must remain."""
    return frozenset(e.id for e in entries if e.id != BASELINE_ID and said.vetoed & {e.id, *e.mechanisms}) if said.vetoed else frozenset()
