"""What the numbers came from: versions, hashes, seeds, the whole configuration, and how to check all of it."""
from __future__ import annotations

from typing import Any

from ..campaign import dump_yaml
from ..types import BASELINE_ID
from .gather import Findings
from .markup import Html, h, table
from .words import note, section

RECORDS = 200   # rows of hashes


def provenance(f: Findings) -> Html:
    any_record = f.records.get(BASELINE_ID) or next(iter(f.records.values()), None)
    hashes = {k: v for k, v in any_record.hashes.items() if k in ("model", "data")} if any_record else {}
    seeds = ", ".join(map(str, f.campaign.config.search.train_seeds))
    facts: list[tuple[str, Any]] = [
        ("Training seeds", seeds), ("Search seed", f.campaign.config.search.seed),
        *((f"{name}, SHA-256", h("span", value, class_="hash")) for name, value in hashes.items()),
        ("Versions", ", ".join(f"{name} {version}" for name, version in f.campaign.meta["versions"].items() if version)),
        *((("Made from", f"{f.campaign.meta['origin']['kind']} of {f.campaign.meta['origin']['id']}"),) if "origin" in f.campaign.meta else ())]
    entries = list(f.entries.values())
    versions = {tuple(sorted(e.versions.items())) for e in f.records.values()}
    rows = [[e.id, h("span", e.record_sha256, class_="hash"), e.created] for e in entries[:RECORDS]]
    return section(
        "provenance", "Provenance", h("dl", [[h("dt", name), h("dd", value)] for name, value in facts], class_="facts wide"),
        note("The records read for this page were made with different versions of packages.") if len(versions) > 1 else None,
        h("p", "To check: ", h("code", "poise-hpc archive verify CAMPAIGN"), " reads every record against its hash; ",
          h("code", "poise-hpc rerun CAMPAIGN CANDIDATE"), " trains one again from its record alone and compares every number."),
        h("details", h("summary", "The whole configuration"), h("pre", h("code", dump_yaml(f.campaign.config))), class_="more"),
        h("details", h("summary", f"Records ({len(entries):,})"), table(["Record", "SHA-256 of its content", "Archived"], rows, "Records"),
          note(f"{len(entries) - RECORDS:,} more have their hash in index.h5 and in themselves.") if len(entries) > RECORDS else None,
          class_="more") if entries else None)
