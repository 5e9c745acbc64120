"""Living notes: design principles over the whole lineage, each with the entries that support and contradict it.

Revised every `agent.synthesize_every` candidates, at fixed ids, from the entries visible then; one file a revision
(`notes/c0016.json`), so that a proposal made twice reads the same notes twice. Cited ids are checked.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from .. import files
from ..replay import EmptyReply, LLM, Refused, TooLong
from ..types import EntrySummary, candidate_id, candidate_number
from . import evidence
from .base import Context
from .conversation import Conversation, Malformed, json_schema, reads_json
from .prompts import render


MOST_PRINCIPLES, MOST_QUESTIONS = 10, 5


class Principle(BaseModel):
    model_config = ConfigDict(extra="ignore")
    principle: str = Field(description="one sentence that tells a designer what to do and when")
    why: str = Field(description="the mechanism behind it")
    supports: list[str] = Field(description="ids of entries whose results speak for it")
    contradicts: list[str] = Field(description="ids of entries whose results speak against it")


class Notes(BaseModel):
    model_config = ConfigDict(extra="ignore")
    principles: list[Principle]
    open_questions: list[str] = Field(description="what the archive cannot tell yet, and which candidate would")


def notes_for(llm: LLM, context: Context, every: int, folder: Path) -> str:
    """The notes that this candidate's proposal reads, revised first if its turn has come; "" before the first."""
    number = candidate_number(context.id)
    if number % every == 0 and len(context.entries) > 1:
        revise(llm, context, every, folder)
    return latest(folder, number, every)


def revise(llm: LLM, context: Context, every: int, folder: Path) -> None:
    path = folder / f"{context.id}.json"
    if path.exists():
        return
    older = latest(folder, candidate_number(context.id) - 1, every)
    text, *shorter = (render("synthesize", history=history(context, detail), notes=older or "None yet: this is the first revision.",
                             principles=str(MOST_PRINCIPLES), questions=str(MOST_QUESTIONS), legend=evidence.legend())
                      for detail in (evidence.FULL, *evidence.SHORTER))
    try:
        notes = Conversation(llm, "synthesize", context.id).ask(
            text, reads_json(Notes, lambda notes: problems(notes, context.entries)), json_schema(Notes), shorter)
    except (Malformed, Refused, EmptyReply, TooLong):
        return  # the older notes stay
    folder.mkdir(exist_ok=True)
    files.write_json(path, notes.model_dump())


def latest(folder: Path, number: int, every: int) -> str:
    """The newest revision made for candidate `number` or an earlier one, as Markdown."""
    for n in range(number - number % every, 0, -every):
        if data := files.read_json(folder / f"{candidate_id(n)}.json"):
            return markdown(Notes.model_validate(data))
    return ""


def markdown(notes: Notes) -> str:
    lines = [f"- {p.principle} ({p.why}) For: {', '.join(p.supports)}. Against: {', '.join(p.contradicts) or 'none'}."
             for p in notes.principles]
    return "\n".join(lines + [f"- Open: {q}" for q in notes.open_questions])


def history(context: Context, detail: evidence.Detail) -> str:
    return "\n\n".join(evidence.entry_text(e, context.proposals.get(e.id), context.reflections.get(e.id), detail.chars)
                       for e in context.entries[-detail.entries:])


def problems(notes: Notes, entries: Sequence[EntrySummary]) -> list[str]:
    known = {e.id for e in entries}
    out = [] if notes.principles else ["principles: at least one was wanted"]
    for name, found, most in [("principles", notes.principles, MOST_PRINCIPLES), ("open_questions", notes.open_questions, MOST_QUESTIONS)]:
        out += [f"{name}: at most {most} were wanted, got {len(found)}; join or drop some"] if len(found) > most else []
    for p in notes.principles:
        if unknown := [id for id in (*p.supports, *p.contradicts) if id not in known]:
            out.append(f"{p.principle!r} cites {', '.join(unknown)}; no such entry was shown")
        if not p.supports:
            out.append(f"{p.principle!r} has no entry that supports it")
        if both := set(p.supports) & set(p.contradicts):
            out.append(f"{p.principle!r}: {', '.join(sorted(both))} cannot both support and contradict it")
    return out
