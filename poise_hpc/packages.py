"""Packages as files: a seed's, a person's, a proposer's; a candidate's folder; and a package's versions.

The current version lies in the candidate's folder; what it replaced stays in `versions/1`, `versions/2`, as evidence.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from . import files
from .agent.base import Draft, DraftRejected
from .campaign import Campaign, Candidate, latest_version
from .stored import read_code, stored_proposal
from .types import CandidateError, Outcome, Proposal, Stage, UsageError


def baseline(which: str) -> Draft:
    """A seed algorithm by name, or a package folder, as candidate c0000."""
    folder = Path(which)
    if folder.is_dir():
        return read_package(folder)
    from .algorithms import load, seeds

    text = seeds.source(which)
    proposal = Proposal(name=which.upper().replace("_", "-"), parents=(), hypothesis="The baseline that every candidate is paired with.",
                        mechanisms=load.declared_mechanisms({"algorithm.py": text}), description=text.split('"""')[1].strip(), expected_effect="none: the reference", proposer="seed")
    return Draft(proposal, {"algorithm.py": text})


@contextmanager
def folder_of(package: Path) -> Iterator[Path]:
    """A person's package as a folder: itself, or a single .py file as the algorithm.py of one that has its name."""
    if not package.is_file():
        yield package
        return
    if package.suffix != ".py":
        raise UsageError(f"{package} is no algorithm package: a folder with algorithm.py was wanted, or one .py file")
    with tempfile.TemporaryDirectory(prefix="poise-package-") as scratch:
        folder = Path(scratch) / package.stem
        folder.mkdir()
        shutil.copyfile(package, folder / "algorithm.py")
        yield folder


def read_package(folder: Path) -> Draft:
    """A person's package (`add`): *.py files, and proposal.json if there is one. UsageError for what is not one."""
    from .algorithms import load

    try:
        code = load.read_package(folder)
    except CandidateError as error:
        raise UsageError(f"{folder} is no algorithm package: {error.message}") from None
    data = stated(folder)
    draft = Draft(read_proposal(data, folder), code)
    if "mechanisms" in data:
        return draft
    return replace(draft, proposal=replace(draft.proposal, mechanisms=load.declared_mechanisms(code)))


def stated(folder: Path) -> Any:
    """What a person's proposal.json says; {} without one."""
    try:
        return files.read_json(folder / "proposal.json") or {}
    except files.CorruptFile as error:
        raise UsageError(f"{folder} is no algorithm package: {error}") from None


def read_proposal(data: Any, folder: Path) -> Proposal:
    """A person's proposal.json, which may leave fields out; UsageError naming what does not fit."""
    import pydantic

    path, known = folder / "proposal.json", [f.name for f in fields(Proposal)]
    if not isinstance(data, dict) or (unknown := data.keys() - known):
        raise UsageError(f"{path}: " + (f"unknown keys {sorted(unknown)}" if isinstance(data, dict) else "a mapping was wanted")
                         + f"; known: {', '.join(known)}")
    empty = {"name": folder.name, "parents": [], "hypothesis": "", "mechanisms": [], "description": "", "expected_effect": ""}
    try:
        return pydantic.TypeAdapter(Proposal).validate_python(empty | data | {"proposer": "person"})
    except pydantic.ValidationError as error:
        raise UsageError("\n".join(f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())) from None


def create_candidate(campaign: Campaign, id: str, draft: Draft, pick: dict[str, Any] | None,
                     rejected: DraftRejected | None = None) -> Candidate:
    """The candidate's folder, whole or not at all. A rejected draft goes straight to its reflection."""
    folder = campaign.candidates / id
    temporary = campaign.candidates / f".{id}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary, id, draft)
    if pick is not None:
        files.write_json(temporary / "pick.json", pick, sync=False)
    candidate = Candidate(id, temporary, Stage.CHECK)
    if rejected is not None:
        candidate.stage, candidate.outcome = Stage.REFLECT, Outcome.CANDIDATE_ERROR
        candidate.cause, candidate.message = rejected.cause, rejected.message
    candidate.save(sync=rejected is not None)  # else derivable: its attempts' results lead it to its stage
    os.rename(temporary, folder)
    candidate.folder = folder
    return candidate


def write(folder: Path, id: str, draft: Draft) -> None:
    """Proposal and package into a folder; the manifest, which says what belongs to the package, last."""
    for name, text in draft.files.items():
        files.write_atomic(folder / name, text)
    files.write_json(folder / "proposal.json", draft.proposal.to_json())
    files.write_atomic(folder / "proposal.md", markdown(id, draft.proposal), sync=False)
    files.write_json(folder / "manifest.json", {n: hashlib.sha256(text.encode()).hexdigest() for n, text in draft.files.items()}, sync=False)


def read(candidate: Path, version: int) -> Draft:
    """Proposal and package of one version of a candidate."""
    kept = candidate / "versions" / str(version)
    folder = kept if kept.is_dir() else candidate
    return Draft(stored_proposal(folder), read_code(folder))


def revise(candidate: Candidate, version: int, draft: Draft) -> None:
    """Replace package `version` by `draft`. Safe to be killed in and repeated: the old one is kept before a byte changes."""
    folder, kept = candidate.folder, candidate.folder / "versions" / str(version)
    old = read(folder, version)
    if not kept.exists():
        temporary = kept.with_name(f".{version}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary, candidate.id, old)
        os.rename(temporary, kept)
    write(folder, candidate.id, draft)
    for name in old.files.keys() - draft.files.keys():
        (folder / name).unlink(missing_ok=True)
    candidate.version = latest_version(folder)


def markdown(id: str, proposal: Proposal) -> str:
    sources = "\n".join(f"- {s}" for s in proposal.sources) or "- none"
    return (f"# {id} {proposal.name}\n\nParents: {', '.join(proposal.parents) or 'none'}. Proposer: {proposal.proposer}. "
            f"Mechanisms: {', '.join(proposal.mechanisms) or 'none declared'}.\n\n## Hypothesis\n{proposal.hypothesis}\n\n"
            f"## Change\n{proposal.description}\n\n## Expected effect\n{proposal.expected_effect}\n\n## Sources\n{sources}\n")
