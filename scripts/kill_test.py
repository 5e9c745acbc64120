#!/usr/bin/env python3
"""kill -9 at random moments of a real campaign: does the archive come out as if nothing had happened?

    .venv/bin/python scripts/kill_test.py [--moments 10] [--seed 0] [--candidates 4] [--config F] [--json]

Runs a tiny campaign (configs/tiny.yaml, real training) once undisturbed. Then again and again, and at seeded random
moments SIGKILLs the controller, a process of a job (launcher, supervisor or worker), or both; a killed controller is
started again. Afterwards compares every record: ids, names, parents, code, picks, curves to the bit, every evaluation and
completion, scores, hashes of the weights; and looks for what was lost, doubled, or left running. Exit code 1 if anything
differs. Takes about a minute per two moments on two idle cores.

Not covered: loss of power (a killed process's writes survive it), several hosts (tests/test_virtual_cluster.py).
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers_drive import archive_of  # noqa: E402
from helpers_kill import TINY, differences, killed_run, left_over, progress, start  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--per-run", type=int, default=2, help="kills in one campaign")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--config", type=Path, default=TINY, help="configs/tiny_screen.yaml has a rung")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    say = (lambda line: print(line, file=sys.stderr)) if arguments.json else print
    with tempfile.TemporaryDirectory(prefix="kill-test-") as scratch:
        out = trial(Path(scratch), arguments, say)
    if arguments.json:
        print(json.dumps(out))
    else:
        print(f"{out['moments']} moments in {len(out['runs'])} campaigns: {len(out['faults'])} faults"
              + "".join(f"\n  {fault}" for fault in out["faults"]))
    return 1 if out["faults"] else 0


def trial(scratch: Path, arguments: argparse.Namespace, say) -> dict:
    options = ("--max-candidates", str(arguments.candidates), "--config", str(arguments.config))
    cache, plain = scratch / "cache", scratch / "undisturbed"
    begun = time.monotonic()
    assert start(plain, cache, *options).wait() == 0, plain.with_name("undisturbed.log").read_text()
    wanted, total = archive_of(plain), progress(plain)
    say(f"undisturbed: {len(wanted)} records in {time.monotonic() - begun:.0f} s, progress {total}")
    faults, runs, left = left_over(plain), [], arguments.moments
    while left > 0:
        root, kills = scratch / f"run-{len(runs)}", min(arguments.per_run, left)
        begun = time.monotonic()
        killed = killed_run(root, cache, total, kills, arguments.seed + len(runs) * arguments.per_run, options, say)
        found = left_over(root) + differences(wanted, archive_of(root))
        say(f"{root.name}: {len(found)} faults, {time.monotonic() - begun:.0f} s")
        faults += [f"{root.name}: {fault}" for fault in found]
        runs.append({"kills": killed, "faults": found, "seconds": round(time.monotonic() - begun, 1)})
        left -= kills
    return {"moments": arguments.moments, "candidates": len(wanted), "runs": runs, "faults": faults}


if __name__ == "__main__":
    sys.exit(main())
