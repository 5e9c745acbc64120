"""Literature cards: short Markdown files with front matter, ours in `priors/` and a user's own folders.

    ---
    name: GSPO
    slots: ratio, clipping
    arxiv: 2507.18071
    year: 2025
    tags: late-collapse, kl-spike
    ---
    Method, formula, when it helps, when it hurts, source.

A campaign keeps a copy of the user's cards (`keep`): a card that is edited later changes no prompt of it.

`slots` are those of `catalogue.SLOTS`, `tags` symptoms of `reflect.SYMPTOMS` or words of one's own.
"""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..types import UsageError
from .base import Context

OURS = Path(__file__).parent / "priors"
CARDS = "cards"  # in a campaign's folder: the user's own, as they were when it began
FIELDS = ("name", "slots", "arxiv", "year", "tags")


@dataclass(frozen=True)
class Card:
    name: str
    slots: tuple[str, ...]
    arxiv: str                # "" where there is no preprint
    year: int
    tags: tuple[str, ...]
    text: str                 # Markdown, without the front matter


def load_cards(*folders: Path) -> list[Card]:
    """Our cards and those of `folders`, by name; a user's card replaces ours of the same name."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"agent.cards: {folder} is not a folder; a folder of *.md cards was wanted")
    cards = {card.name: card for folder in (OURS, *folders) for card in map(read_card, sorted(folder.glob("*.md")))}
    return [cards[name] for name in sorted(cards)]


def keep(folders: Sequence[Path], own: Path) -> list[Path]:
    """The user's folders as the campaign has them, in `own`: copied at its first start, whole or not at all."""
    if not own.exists() and folders:
        load_cards(*folders)  # a bad card is named before it is kept
        temporary = own.with_name(f".{own.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        for number, folder in enumerate(folders):
            (temporary / f"{number:02d}").mkdir(parents=True)
            for card in sorted(folder.glob("*.md")):
                shutil.copyfile(card, temporary / f"{number:02d}" / card.name)
        os.rename(temporary, own)
    return sorted(own.iterdir()) if own.exists() else []


def read_card(path: Path) -> Card:
    parts = re.split(r"^---\s*$", path.read_text(encoding="utf-8"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) != 3 or parts[0].strip():
        raise UsageError(f"{path}: a card starts with front matter between two lines '---'")
    head = dict(line.split(":", 1) for line in parts[1].strip().splitlines() if ":" in line)
    head = {key.strip(): value.strip() for key, value in head.items()}
    if missing := [f for f in FIELDS if f not in head]:
        raise UsageError(f"{path}: front matter lacks {', '.join(missing)}")
    if not head["year"].isdigit():
        raise UsageError(f"{path}: year is {head['year']!r}, a number was wanted")
    return Card(head["name"], _list(head["slots"]), head["arxiv"], int(head["year"]), _list(head["tags"]), parts[2].strip())


def _list(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def choose_cards(cards: Sequence[Card], context: Context, count: int = 8) -> str:
    """The most relevant cards as Markdown: remedies for the parent's symptoms first, then what the directive names, then
    what the archive has tried least. Equal ones rotate with the candidate's id, so that every card is read in time."""
    reflection = context.reflections.get(context.parent.id)
    symptoms = set(reflection.symptoms) if reflection else set()
    words = set(re.findall(r"[a-z]{4,}", (context.directive or "").lower()))
    names = [{_slug(word) for word in (*e.mechanisms, *e.name.split("-"))} for e in context.entries]
    turn = int(re.sub(r"\D", "", context.id) or 0)

    def rank(item: tuple[int, Card]) -> tuple[float, int]:
        i, card = item
        named = len(words & set(re.findall(r"[a-z]{4,}", card.text.lower())))
        tried = sum(_slug(card.name) in found for found in names)
        return -(3 * len(symptoms & set(card.tags)) + min(named, 2) - 0.5 * min(tried, 4)), (i - turn * count) % len(cards)

    chosen = [card for _, card in sorted(enumerate(cards), key=rank)[:count]]
    return "\n\n".join(f"### {card.name} ({', '.join(card.slots)}; {f'arXiv:{card.arxiv}, ' if card.arxiv else ''}{card.year})\n{card.text}"
                       for card in chosen)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
