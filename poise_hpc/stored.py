"""Files of a campaign that others wrote, read with suspicion: what is not what was written there is named, with the way out."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from . import files
from .types import RESTORE_CODE, Outcome, Proposal, Stage


def read_submitted(attempt: Path) -> dict[str, Any] | None:
    return read_or_explain(attempt / "submitted.json", "Delete it: the job is found again by its name", job_id=str)


def read_result(attempt: Path) -> dict[str, Any] | None:
    cure = "Delete it: the job then counts as lost and is repeated"
    result = read_or_explain(attempt / "result.json", cure, outcome=str, cause=str, message=str, payload=dict)
    if result is not None and result["outcome"] not in set(Outcome):
        raise files.CorruptFile(f"{attempt / 'result.json'} holds the outcome {result['outcome']!r}, which there is not. {cure}")
    return result


def read_status(candidate: Path) -> dict[str, Any] | None:
    """None, too, if it was damaged: its attempts' results lead the candidate to its stage again."""
    path = candidate / "status.json"
    try:
        status = read_or_explain(path, "", stage=str, cause=str, message=str, forgiven=list)
        if status is not None:
            Stage(status["stage"]), Stage(status["held_from"] or Stage.CHECK), Outcome(status["outcome"] or Outcome.SUCCEEDED)
    except (files.CorruptFile, KeyError, ValueError):
        return None
    return status


def stored_proposal(candidate: Path) -> Proposal:
    cure = "Restore it; proposal.md beside it says the same"
    data = read_or_explain(candidate / "proposal.json", cure, name=str, parents=list, mechanisms=list, hypothesis=str, proposer=str)
    try:
        return Proposal.from_json(data or {})
    except TypeError as error:  # a field too many, or one too few
        raise files.CorruptFile(f"{candidate / 'proposal.json'} is no proposal ({error}). {cure}") from None


def read_or_explain(path: Path, cure: str, **fields: type | tuple[type, ...]) -> Any | None:
    """A JSON object with these fields, or None if there is no such file; CorruptFile that ends with the cure."""
    try:
        data = files.read_json(path)
    except files.CorruptFile as error:
        raise files.CorruptFile(f"{error}. {cure}") from None
    if data is not None and not (isinstance(data, dict) and all(isinstance(data.get(name), type) for name, type in fields.items())):
        raise files.CorruptFile(f"{path} is JSON, but not what was written there: an object{' with ' * bool(fields)}{', '.join(fields)} was wanted, "
                                f"got {files.dumps(data)[:80]}. {cure}")
    return data


def read_code(folder: Path) -> dict[str, str]:
    """The package in a folder, file name -> text; CorruptFile if it is not what its manifest says."""
    manifest = read_or_explain(folder / "manifest.json", RESTORE_CODE)
    if manifest is None:
        raise files.CorruptFile(f"{folder / 'manifest.json'} is missing. {RESTORE_CODE}")
    return {name: raw.decode() for name, raw in files.read_listed(folder, manifest, RESTORE_CODE).items()}
