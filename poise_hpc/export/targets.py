"""The trainers an algorithm can be exported to, and what each has no place for. Needs no torch."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLLOUT_FIELDS = ("truncated", "logp_old", "logp_rollout", "logp_ref", "entropy", "step", "progress")  # beside rewards, mask, groups
LOSS_FIELDS = ("reward", "progress", "logp_ref", "entropy")                                            # beside log-probs, A, mask


@dataclass(frozen=True)
class Target:
    name: str
    version: str               # what the adapter was written for and run with
    install: str               # for the README
    test: str                  # what its equivalence test needs, and where that comes from
    files: tuple[str, ...]     # of templates/<name>/, beside the plug-in


TARGETS = {t.name: t for t in (
    Target("trl", "1.16.0", "pip install trl==1.16.0",
           "TRL and pytest: `pip install trl==1.16.0 pytest`, or `scripts/setup.sh test` in a clone of poise_hpc", ("README.md", "train.py", "test_equivalence.py")),
    Target("verl", "0.9.1", "verl 0.9.1, as its documentation says",
           "verl, as its documentation says, and pytest: `pip install pytest`", ("README.md", "setup_verl.py", "test_equivalence.py")))}

OPENRLHF = ("OpenRLHF (0.11) has no place to register an algorithm in: advantages and loss are fixed if-chains in classes that its Ray "
            "workers build themselves, a plug-in would have to replace these classes in every worker. Export to trl or verl")


def reads(target: str, facts: Mapping[str, Any]) -> list[str]:
    """What an adapter must be told where to find."""
    found = [f"components.{name}" for name in facts["components_read"]]
    if "valid" in facts["advantages_read"]:
        found.append("valid")
    limit = "max_length" in (*facts["advantages_read"], *facts["loss_read"]) or facts["reduction"] == "seq-mean-token-sum-norm"
    if limit and target == "verl":  # TRL's trainer knows it
        found.append("max_length")
    return found


def refusals(target: str, facts: Mapping[str, Any]) -> list[str]:
    """Why the trainer cannot host it, one reason each; [] if it can."""
    if target == "trl":
        return []
    found = []
    if facts["state"]:
        found.append("it keeps a state from step to step: verl's advantages and losses run in different processes, and it checkpoints neither's")
    if facts["leaves_out"]:
        found.append("it leaves completions out of the loss and of Z (`select` or `keep`): verl's Z counts all of them. Dropping groups "
                     "before is verl's own option, algorithm.filter_groups; export the algorithm without that mechanism "
                     "(`poise-hpc ablate` makes one)")
    if unseen := [name for name in ROLLOUT_FIELDS if name in facts["advantages_read"]]:
        found.append(f"its advantages read {', '.join(unseen)}, which verl does not hand to an advantage estimator")
    if unseen := [name for name in LOSS_FIELDS if name in facts["loss_read"]]:
        found.append(f"its loss reads {', '.join(unseen)}, which verl does not hand to a policy loss")
    if not found and facts["needs"]:
        found.append(f"it needs {', '.join(facts['needs'])}, which verl hands neither to an advantage estimator nor to a policy loss")
    return found
