"""A finished LLM campaign once more, from its transcript: the same candidates, code and numbers, or the difference by name.

The new campaign gets the transcript, the guidance, the user's literature cards, the packages that persons put in under the numbers they had, and the
parents (one that was chosen by measured cost could not be chosen again), and the site file. Everything else is done again: proposals are
read from the replies, packages are checked, trained and evaluated.

Not repeated: candidates that were held when others were proposed; settings of the agent that were changed on the way.
"""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from . import archive, guidance
from . import config as configuration
from .agent.priors import CARDS
from .campaign import Campaign
from .config import Config
from .proposing import PLANNED
from .settings import overlay
from .types import BASELINE_ID, PoiseError, UsageError

TRANSCRIPT = "llm.jsonl"


def create(origin: Campaign, root: Path) -> Campaign:
    """The replay's campaign, new or taken up again."""
    if (root / "campaign.json").exists():
        campaign = Campaign.open(root)
        if campaign.meta.get("replay_of") != str(origin.root):
            raise UsageError(f"{root} is another campaign; give a new folder")
        return campaign
    config, ids, persons = plan(origin)

    def fill(folder: Path) -> None:
        for name in (TRANSCRIPT, guidance.FILE, "site.yaml"):
            if (origin.root / name).exists():
                shutil.copyfile(origin.root / name, folder / name)
        if (origin.root / CARDS).exists():
            shutil.copytree(origin.root / CARDS, folder / CARDS)
        for id in ids:
            (folder / PLANNED / id).mkdir(parents=True)
            for name in ["proposal.json", *origin.code(id)] if id in persons else ["pick.json"]:
                shutil.copyfile(origin.candidates / id / name, folder / PLANNED / id / name)

    return Campaign.create(root, config, fill, cache_dir=origin.meta["cache_dir"], replay_of=str(origin.root))


def plan(origin: Campaign) -> tuple[Config, list[str], list[str]]:
    """The replay's config; the candidates that it makes again; those of them that persons put in."""
    if not (origin.root / TRANSCRIPT).exists():
        raise UsageError(f"{origin.root} has no {TRANSCRIPT}: no language model took part. Its config and seed repeat it")
    ids = [id for id in origin.ids() if id != BASELINE_ID]
    persons = [id for id in ids if origin.proposal(id).proposer == "person"]
    config = configuration.parse(overlay(origin.config.dump(), {
        "search": {"candidates": len(ids) - len(persons)}, "budget": {"wall_clock_min": None, "run_hours": None}}))
    return config, ids, persons


def compare(origin: Campaign, new: Campaign) -> dict[str, Any]:
    """Candidate -> what differs, over both archives."""
    ids = sorted(origin.archived_ids() | new.archived_ids())
    return {"origin": str(origin.root), "replay": str(new.root), "candidates": len(ids),
            "different": {id: found for id in ids if (found := differences(origin, new, id))}}


def differences(origin: Campaign, new: Campaign, id: str) -> list[str]:
    try:
        old, again = (archive.read(c.records / f"{id}.h5") for c in (origin, new))
    except PoiseError as error:
        return [str(error)]
    names = ["proposal", "code", "outcome", "cause", "message", "score", "behaviour", "reflection", "seeds", "curve_names"]
    found = [name for name in names if getattr(old, name) != getattr(again, name)]
    tables = ["curve_steps", "curve_values", "evaluations"]
    return found + [name for name in tables if unequal(getattr(old, name), getattr(again, name))]


def unequal(a: Any, b: Any) -> bool:
    return a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes()


def compare_text(data: dict[str, Any]) -> str:
    if not data["different"]:
        return f"identical: all {data['candidates']} candidates, their code, numbers and reflections"
    return "\n".join(f"{id}: {', '.join(found)} differ" for id, found in data["different"].items())
