"""Campaigns made from an archive entry: rerun, confirm, ablate, control, transfer. Each is an ordinary campaign in a sub-folder
of its origin, with a fixed list of packages instead of a proposer, so it survives kills and keeps records like any other.

    rerun     the entry as c0000, its own seeds: do the numbers come again?
    confirm   baseline and entry, fresh seeds, the task's confirmation prompts
    ablate    baseline, entry, and the entry without each of its mechanisms
    control   baseline and entry, trained on random rewards
    transfer  baseline and entry in another config

Everything is taken from the entry's record: code, config, seeds. Jobs run where the origin's did, unless told otherwise.
"""
from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import config as configuration
from . import files, stats, views, wording
from .algorithms import load
from .archive import ArchiveView, find, read
from .campaign import Campaign
from .entry import Entry
from .settings import overlay
from .types import BASELINE_ID, START, UsageError

SEEDS = 5     # of `confirm` and `transfer`, unless told otherwise
FRESH = 1000  # fresh training seeds start here: no search uses them by default


@dataclass(frozen=True)
class Plan:
    """A derived campaign that may be there already: the same entry, seeds and config are taken up again."""

    entry: Entry
    root: Path
    config: configuration.Config


def plan(kind: str, origin: Campaign, id: str, seeds: int | None, config_file: Path | None) -> Plan:
    """What `create` would make; writes nothing."""
    path = Path(origin.meta.get("record", origin.records / f"{id}.h5"))
    if not path.exists():
        raise UsageError(f"{id} has no archive entry in {origin.root}; `poise-hpc leaderboard {origin.word}` lists those that have")
    entry = read(path)
    if kind != "rerun" and entry.score is None:
        raise UsageError(f"{id} has no score ({entry.cause}): there is nothing to {kind}. `poise-hpc rerun {origin.word} {id}` repeats it")
    if kind in ("confirm", "transfer") and id == BASELINE_ID:
        raise UsageError(f"{id} is the baseline: it would be compared with itself. Give a candidate; `poise-hpc leaderboard {origin.word}` lists them")
    if kind == "ablate" and not parts(entry):
        raise UsageError(f"{id} declares no mechanism that can be switched off: there is nothing to ablate. In the next version, {load.DECLARE}")
    config = configuration.load(config_file) if config_file else configuration.parse(yaml.safe_load(entry.config), f"{path}: config")
    config = settings(kind, config, seeds)
    for number in itertools.count(1):
        root = origin.root / "derived" / f"{kind}-{id}-{number}"
        config = configuration.parse(overlay(config.dump(), {"search": {"baseline": str(root / "baseline")}}))
        if not root.exists():
            break
        existing = Campaign.open(root)
        if existing.config == config and existing.meta["origin"] == made_from(kind, origin, id):
            break
    return Plan(entry, root, config)


def create(kind: str, origin: Campaign, id: str, seeds: int | None, config_file: Path | None) -> Campaign:
    """The derived campaign, new or taken up again."""
    planned = plan(kind, origin, id, seeds, config_file)
    if planned.root.exists():
        return Campaign.open(planned.root)
    entry = planned.entry
    baseline = entry if kind == "rerun" else read(origin.records / f"{BASELINE_ID}.h5")

    def fill(folder: Path) -> None:
        _write_package(folder / "baseline", baseline.code, baseline.proposal)
        for i, (name, code, proposal) in enumerate(compared(kind, entry)):
            _write_package(folder / "inbox" / f"{i:03d}", code, proposal | {"name": name, "parents": []})
        if (origin.root / "site.yaml").exists():
            shutil.copyfile(origin.root / "site.yaml", folder / "site.yaml")

    return Campaign.create(planned.root, planned.config, fill, cache_dir=origin.meta["cache_dir"], origin=made_from(kind, origin, entry.id))


def made_from(kind: str, origin: Campaign, id: str) -> dict[str, str]:
    """What a derived campaign says of itself; "record" only where that lies in no campaign."""
    return {"kind": kind, "id": id} | ({"record": origin.meta["record"]} if "record" in origin.meta else {})


def settings(kind: str, config: configuration.Config, seeds: int | None) -> configuration.Config:
    """The origin's config with what this kind changes: no proposals, no screening; for `confirm`, fresh seeds and prompts."""
    used = config.search.train_seeds
    change: dict[str, Any] = {"search": {"candidates": 0, "proposer": "offline"}, "budget": {"wall_clock_min": None, "run_hours": None},
                              "screen": {"rungs": []}}
    if kind in ("confirm", "transfer"):
        first = max(FRESH, max(used) + 1)
        change["search"]["train_seeds"] = list(range(first, first + (seeds or SEEDS)))
    elif seeds is not None:
        change["search"]["train_seeds"] = list(used[:seeds]) + list(range(max(used) + 1, max(used) + 1 + seeds - len(used)))
    if kind == "control":
        change["train"] = {"reward": "random"}
    if kind == "confirm":
        change["evaluate"] = {"purpose": "confirmation"}
    return configuration.parse(overlay(config.dump(), change))


def compared(kind: str, entry: Entry) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """(name, code, proposal) of what is run beside the baseline."""
    if kind == "rerun":
        return []
    itself = [] if entry.id == BASELINE_ID else [(entry.name, entry.code, entry.proposal)]
    return [*itself, *([without(entry, mechanism) for mechanism in parts(entry)] if kind == "ablate" else [])]


def parts(entry: Entry) -> list[str]:
    """Its mechanisms that can be switched off; where its code inherits them, which is not run here, all that its proposal names."""
    declared, off = load.declared_mechanisms(entry.code), load.switchable(entry.code)
    return [m for m in entry.proposal["mechanisms"] if m in off or not declared]


def without(entry: Entry, mechanism: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The entry's package with one mechanism switched off: its own code, and one line more."""
    code = dict(entry.code)
    code["algorithm.py"] += f"\nALGORITHM = ALGORITHM.without({mechanism!r})\n"
    name = f"{entry.name}-without-{mechanism}"
    off = load.off_text(entry.code, mechanism)
    return name, code, entry.proposal | {"description": f"{entry.id} with {mechanism} switched off" + (f": {off}" if off else ""), "mechanisms": [
        m for m in entry.proposal["mechanisms"] if m != mechanism]}


def _write_package(folder: Path, code: dict[str, str], proposal: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, text in code.items():
        files.write_atomic(folder / name, text)
    files.write_json(folder / "proposal.json", proposal)


def existing(origin: Campaign) -> list[Path]:
    """Folders of the campaigns that were made from the origin's entries, by name."""
    return [path.parent for path in sorted((origin.root / "derived").glob("[!.]*/campaign.json"))]


def report(kind: str, campaign: Campaign) -> dict[str, Any]:
    """The derived leaderboard; for `rerun`, the comparison with the original record; for `ablate`, each mechanism's effect; for `control`,
    what random rewards came to; for `confirm` and `transfer`, the entry's difference to the baseline, then and now."""
    data = views.leaderboard(campaign) | {"kind": kind, "origin": campaign.meta["origin"]}
    if kind == "rerun":
        made = campaign.meta["origin"]
        old = read(Path(made.get("record", campaign.root.parent.parent / "records" / f"{made['id']}.h5")))
        new_path = campaign.records / "c0000.h5"
        if new_path.exists():
            data["comparison"] = compare(old, read(new_path))
    if kind == "ablate":
        data["effects"] = effects(campaign)
    if kind == "control":
        data["control"] = control(campaign)
    if kind in ("confirm", "transfer"):
        data["found"] = found(campaign)
    return data


def control(campaign: Campaign) -> list[dict[str, Any]]:
    """Overall of baseline and entry under random rewards, beside what they have in their records under the task's, and the untrained policy's."""
    entries, records = ArchiveView.load(campaign.root).entries, campaign.root.parent.parent / "records"
    start = next((e.score.curve.get(START) for e in entries if e.id == BASELINE_ID and e.score), None)
    out = []
    for e in entries:
        id = e.id if e.id == BASELINE_ID else campaign.meta["origin"]["id"]
        own = read(records / f"{id}.h5").score
        out.append({"id": id, "name": e.name, "cause": e.cause, "random": e.score.overall if e.score else None,
                    "random_ci": e.score.ci if e.score else None, "task": own["overall"] if own else None, "untrained": start})
    return out


def found(campaign: Campaign) -> dict[str, Any]:
    """The entry under its own id: its difference to the baseline here, and as the search had it."""
    id, entries = campaign.meta["origin"]["id"], ArchiveView.load(campaign.root).entries
    base, now = find(entries, BASELINE_ID), find(entries, "c0001")
    then, score = read(campaign.root.parent.parent / "records" / f"{id}.h5"), now.score if now else None
    searched = then.score or {}
    return {"id": id, "name": then.name, "baseline": base.name if base else None, "archived": now is not None, "cause": now.cause if now else "",
            "seeds": len(score.by_seed) if score else 0, "effect": score.delta if score else None, "ci": score.delta_ci if score else None,
            "searched": searched.get("delta"), "searched_ci": searched.get("delta_ci")}


def effects(ablation: Campaign) -> list[dict[str, Any]]:
    """Of each mechanism of an ablated entry: points lost without it, paired by seed; None where it failed."""
    entries = ArchiveView.load(ablation.root).entries
    itself = find(entries, BASELINE_ID if ablation.meta["origin"]["id"] == BASELINE_ID else "c0001")
    out = []
    for part in [e for e in entries if itself and e.id not in (BASELINE_ID, itself.id)]:
        found = stats.paired_difference(itself.score.by_seed, part.score.by_seed) if itself and itself.score and part.score else None
        missing = set(itself.mechanisms) - set(part.mechanisms) if itself else ()
        out.append({"id": part.id, "mechanism": ", ".join(sorted(missing)), "cause": part.cause, "effect": found[0] if found else None,
                    "ci": list(found[1]) if found and found[1] else None})
    return out


def compare(old: Entry, new: Entry) -> dict[str, Any]:
    """Which numbers came again. Same machine, versions and threads: all of them, to the bit."""
    import numpy

    def score(entry: Entry) -> Any:  # without what a baseline has not, which the rerun itself is, and what it alone has
        kept = {k: v for k, v in (entry.score or {}).items() if not k.startswith("delta")}
        return kept and kept | {"curve": {at: v for at, v in kept["curve"].items() if at != START}}

    def evaluations(entry: Entry) -> Any:
        return entry.evaluations[entry.evaluations["at"] != float(START)]

    changed = {k: [old.versions[k], new.versions[k]] for k in sorted(old.versions.keys() & new.versions.keys())
               if old.versions[k] != new.versions[k]}  # earlier versions recorded less
    return {"identical_curves": old.curve_names == new.curve_names and bool(numpy.array_equal(old.curve_values, new.curve_values, equal_nan=True)),
            "identical_evaluations": bool(numpy.array_equal(evaluations(old), evaluations(new))),
            "identical_completions": bool(numpy.array_equal(old.completion_tokens, new.completion_tokens)),
            "identical_scores": score(old) == score(new), "versions_changed": changed,
            "hashes_changed": sorted(k for k in old.hashes if old.hashes[k] != new.hashes.get(k)),
            "overall": [e.score["overall"] if e.score else None for e in (old, new)]}


def report_text(data: dict[str, Any]) -> str:
    text = views.leaderboard_text(data)
    if data.get("effects"):
        text += "\n" + views.table([[e["mechanism"], f"failed: {e['cause']}" if e["cause"] else views.interval(e["effect"], e["ci"], sign=True)]
                                    for e in data["effects"]], ["mechanism", f"effect: {data['origin']['id']} with it, less without it"])
    if data.get("control"):
        text += "\n" + views.table([[e["id"], e["name"], f"failed: {e['cause']}" if e["cause"] else views.interval(e["random"], e["random_ci"]),
                                     views.interval(e["task"], None), views.interval(e["untrained"], None)] for e in data["control"]],
                                   ["id", "name", "random rewards", "the task's", "untrained"])
    if "found" in data:
        text += "\n" + found_text(data["kind"], data["found"])
    if "comparison" in data:
        c = data["comparison"]
        if c["overall"][0] is None and c["overall"][1] is not None:
            return f"{text}\nrerun of {data['origin']['id']}: it had no score; trained to the end it has overall {c['overall'][1]:.1f}"
        same = all(value for key, value in c.items() if key.startswith("identical")) and not c["hashes_changed"]
        text += f"\nrerun of {data['origin']['id']}: " + ("every curve, completion, score and weight came again, bit for bit" if same else
            f"numbers differ: overall {c['overall'][0]} then {c['overall'][1]}; versions or machine changed: {c['versions_changed'] or 'none'}; "
            f"hashes changed: {c['hashes_changed'] or 'none'}")
    return text



def found_text(kind: str, f: dict[str, Any]) -> str:
    """What came out, in the ids of the origin: the table above has its own."""
    done, where = ("confirmed", "fresh seeds and unseen prompts") if kind == "confirm" else ("transferred", "fresh seeds in that setting")
    if f["effect"] is None:
        why = "nothing is archived yet" if not f["archived"] else f"it failed: {f['cause']}" if f["cause"] else f"{BASELINE_ID} has no score"
        return f"{f['id']} {f['name']} is not {done}: {why}"
    if f["seeds"] == 1:
        where = where.replace("seeds", "seed")
    return (f"{done} {f['id']} {f['name']} (here c0001): {views.interval(f['effect'], f['ci'], sign=True)} against {BASELINE_ID} on {f['seeds']} {where}; "
            f"the search had said {views.interval(f['searched'], f['searched_ci'], sign=True)}: {wording.told_apart(f['ci'], f['baseline'])}")
