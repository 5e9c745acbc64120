"""The catalogue for people: what a tag in a candidate's name, KIMILEN or QAE, changes, and who published it."""
from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..types import UsageError
from .catalogue import SLOTS, Part, parts
from .priors import load_cards

GRPO = "GRPO"  # the word for its own parts, which have no tag


def rows(words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Parts in the order of their slots; those that `words` mean, if any: tags, parts' names, candidates' names."""
    chosen = set().union(*(_meant(word) for word in words)) if words else set(parts())
    cards = load_cards()
    return [{"tag": p.tag, "name": p.name, "slot": slot, "grpo": p.name == SLOTS[slot][1], "formula": p.formula, "effect": p.effect, "source": p.source,
             "hyperparameters": [asdict(knob) for knob in p.knobs], "helps": list(p.helps), "conflicts": sorted(p.conflicts), "implies": p.implies,
             "needs": p.needs, "cards": [c.name for c in cards if c.arxiv and c.arxiv in p.source]}
            for slot in SLOTS for p in parts().values() if p.slot == slot and p.name in chosen]


def _meant(word: str) -> set[str]:
    tags = {GRPO} if word.upper() == GRPO else set(word.upper().split("-")) - {GRPO}
    found = {p.name for p in parts().values() if p.name == word.lower() or _tag(p) in tags}
    if not found:
        known = [*parts(), *map(_tag, parts().values())]
        close = difflib.get_close_matches(word.upper(), known, n=1) or difflib.get_close_matches(word.lower(), known, n=1)
        raise UsageError(f"no part of the catalogue is called {word!r}; " + (f"did you mean {close[0]}?" if close else "`poise-hpc catalogue` lists them"))
    return found


def _tag(part: Part) -> str:
    return part.tag or GRPO


def text(found: list[dict[str, Any]]) -> str:
    lines, slot = [], ""
    for r in found:
        if r["slot"] != slot:
            slot = r["slot"]
            lines += ["", f"{slot} (GRPO: {SLOTS[slot][1] or 'nothing'})"]
        lines += [f"  {r['tag'] or GRPO:<11}{r['name']}: {r['formula']}", f"{'':13}it {r['effect']}"]
        lines += [f"{'':13}comes with {name}: {parts()[name].formula}" for name in r["implies"].values()]
        knobs = ", ".join(f"{k['name']} {k['default']:g} ({k['meaning']})" for k in r["hyperparameters"])
        lines += [f"{'':13}{knobs}"] if knobs else []
        lines.append(f"{'':13}{r['source']}")
    return "\n".join(lines[1:])
