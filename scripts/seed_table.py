#!/usr/bin/env python3
"""Every seed algorithm in a lab, on the same paired training seeds: the table of docs/LAB.md.

    .venv/bin/python scripts/seed_table.py archive_store/seeds-base --config configs/base.yaml [--seeds 5] [--json]

An ordinary campaign without proposals whose inbox holds the seeds: kill it, run it again, look into its archive. The
difference to GRPO is paired by training seed; [a, b] are 95 % t intervals.
"""
from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from poise_hpc import config as configuration
from poise_hpc import orders, views
from poise_hpc.algorithms import load, seeds
from poise_hpc.campaign import Campaign
from poise_hpc.cli.driving import Progress, build
from poise_hpc.controller import drive
from poise_hpc.settings import overlay


def campaign(root: Path, config_file: Path, count: int, cache: Path) -> Campaign:
    """The campaign, new or taken up again; the seeds wait in its inbox."""
    if (root / "campaign.json").exists():
        return Campaign.open(root)
    change = {"search": {"candidates": 0, "train_seeds": list(range(count))}}
    config = configuration.parse(overlay(configuration.load(config_file).dump(), change))
    cache.mkdir(parents=True, exist_ok=True)
    packages = root.with_name(root.name + "-packages")
    opened = Campaign.create(root, config, cache_dir=str(cache))
    for name in seeds.SEEDS:
        if name != "grpo":
            load.write_seed_package(name, packages / name)
            orders.package(opened, packages / name, parent="c0000")
    return opened


def rows(opened: Campaign) -> list[dict]:
    """The leaderboard's rows with the columns of the table."""
    return [{"algorithm": r["name"], "overall": r["overall"], "ci": r["ci"], "delta": r["delta"], "delta_ci": r["delta_ci"],
             "final": r["final"], "benchmarks": r["benchmarks"], "cause": r["cause"]} for r in views.leaderboard(opened)["rows"]]


def markdown(table: list[dict]) -> str:
    head = "| algorithm | overall (curve) | against GRPO | last point | " + " | ".join(table[0]["benchmarks"]) + " |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for r in table:
        if r["overall"] is None:
            lines.append(f"| {r['algorithm']} | failed: {r['cause']} |")
            continue
        cells = [r["algorithm"], views.interval(r["overall"], r["ci"]),
                 views.interval(r["delta"], r["delta_ci"], sign=True) if r["delta"] is not None else "", f"{r['final']:.1f}",
                 *(f"{v:.1f}" for v in r["benchmarks"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "poise_hpc")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    opened = campaign(Path(os.path.abspath(arguments.campaign)), arguments.config, arguments.seeds, arguments.cache_dir)
    with opened.lock() as lock:
        drive(build(opened, say=lambda line: None), time.sleep, lock, watch=Progress(opened, quiet=arguments.json, every_s=30.0))
    table = rows(opened)
    print(json.dumps(table) if arguments.json else markdown(table))


if __name__ == "__main__":
    main()
