"""Checkpoints: whole or not there, checked at each use. And snapshots, the weights that evaluation looks at.

    <attempt>/checkpoints/step-000016/   engine/part-<rank>.safetensors  trainer.json  manifest.json (last: sha256 of every file)
    <attempt>/snapshots/step-000012/     a Hugging Face folder

The number is that of finished steps. A folder is written under a temporary name and renamed; the older checkpoint goes
once the newer is complete. A checkpoint knows the snapshots that were there when it was made: a run that resumes from it
carries them over, so that an attempt is complete in itself.

A checkpoint does not depend on the number of ranks that made it. With as many ranks a run goes on bit-identically, with
another number to rounding.

With several nodes, all ranks must see one file system.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..tasks.base import file_sha256, weights_sha256
from .engine import Engine
from .ranks import Ranks

MANIFEST = "manifest.json"
KEPT = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")


@dataclass(frozen=True)
class Progress:
    """What a run is besides weights and optimizer."""

    steps: int                    # finished
    recipe: dict[str, Any]        # what the run depends on; another recipe does not resume from it
    state: dict[str, Any]         # the algorithm's
    rows: list[dict[str, Any]]    # of the curves, so far
    snapshots: dict[str, str]     # folder name -> sha256 of its weights


def save(attempt: Path, progress: Progress, engine: Engine, ranks: Ranks) -> None:
    folder = attempt / "checkpoints" / f"step-{progress.steps:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    engine.save(temporary)
    ranks.barrier()
    if ranks.rank == 0:
        files.write_json(temporary / "trainer.json", asdict(progress))
        found = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in found:
            _sync(path)
        files.write_json(temporary / MANIFEST, {str(p.relative_to(temporary)): file_sha256(p) for p in found})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def newest(attempts: Sequence[Path], recipe: dict[str, Any]) -> tuple[Path, Progress] | None:
    """The furthest checkpoint of these attempts (oldest first) that is whole and of this recipe. Says which it passes over."""
    found = [(folder.name, order, folder) for order, attempt in enumerate(attempts)
             for folder in (attempt / "checkpoints").glob("step-*")]
    for _, _, folder in sorted(found, reverse=True):
        progress, fault = examine(folder, recipe)
        if progress is not None:
            return folder, progress
        print(f"passed over {folder}: {fault}", flush=True)
    return None


def examine(folder: Path, recipe: dict[str, Any]) -> tuple[Progress | None, str]:
    """The checkpoint's progress, or what is wrong with it."""
    try:
        manifest = files.read_json(folder / MANIFEST)
        if manifest is None:
            return None, f"no {MANIFEST}: it was not completed"
        for name, sha256 in manifest.items():
            if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
                return None, f"{name} is missing or damaged"
        progress = Progress(**json.loads((folder / "trainer.json").read_bytes()))
    except (files.CorruptFile, OSError, ValueError, TypeError, AttributeError) as error:
        return None, f"unreadable ({error})"
    differs = sorted(k for k in {*recipe, *progress.recipe} - {"ranks"} if recipe.get(k) != progress.recipe.get(k))
    if differs:
        return None, f"made with another {', '.join(differs)}"
    snapshots = folder.parent.parent / "snapshots"
    for name, sha256 in progress.snapshots.items():
        if not any((snapshots / name).glob("*.safetensors")) or weights_sha256(snapshots / name) != sha256:
            return None, f"its snapshot {name} is missing or damaged"
    return progress, ""


def resume(attempt: Path, earlier: Sequence[Path], recipe: dict[str, Any], engine: Engine, ranks: Ranks) -> Progress:
    """Load the newest checkpoint into the engine, or start anew; all ranks alike."""
    best = newest([*earlier, attempt], recipe) if ranks.rank == 0 else None
    best = ranks.gather(best)[0]
    if best is None:
        return Progress(0, recipe, {}, [], {})
    folder, progress = best
    engine.load(folder)
    source = folder.parent.parent
    if ranks.rank == 0:
        then, now = progress.recipe["ranks"], recipe["ranks"]
        print(f"resumed from {folder} after step {progress.steps}"
              + ("" if then == now else f", with {now} ranks instead of {then}: equal to rounding, not to the bit"), flush=True)
        for name in progress.snapshots if source != attempt else ():
            _write_folder(attempt / "snapshots" / name, lambda to, name=name: _link(source / "snapshots" / name, to))
    return progress


def snapshot(attempt: Path, steps: int, model: Any, weights: dict[str, Any], start_model: Path) -> tuple[str, str]:
    """Save a transformers model with these (whole) weights and the start model's tokenizer: folder name, sha256 of the weights."""
    folder = attempt / "snapshots" / f"step-{steps:06d}"

    def write(to: Path) -> None:
        model.save_pretrained(to, state_dict=weights)
        for path in start_model.iterdir():
            if path.name.startswith(KEPT) and not (to / path.name).exists():
                shutil.copyfile(path, to / path.name)

    _write_folder(folder, write)
    return folder.name, weights_sha256(folder)


def _write_folder(folder: Path, write: Any) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(exist_ok=True)
    temporary.mkdir()
    write(temporary)
    for path in temporary.iterdir():
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # of this attempt's own earlier life
    os.rename(temporary, folder)


def _link(source: Path, to: Path) -> None:
    for path in source.iterdir():
        try:
            os.link(path, to / path.name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, to / path.name)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
