"""The cache of start models: `<cache>/models/<task>-<recipe hash>/`, whole or not there, verified at each use.

A model is made in a temporary folder and renamed. Two jobs that make one at the same time are both right: the first
rename wins and the other takes it over. A damaged entry is moved aside (never deleted) and made again.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

from .. import files
from ..types import PoiseError
from .base import Progress, Task, file_sha256

MANIFEST = "manifest.json"


def prepared_model(task: Task, cache_dir: Path, progress: Progress) -> Path:
    """The task's start model, from the cache or made now."""
    recipe = task.model_recipe()
    name = f"{task.name}-{hashlib.sha256(files.dumps(recipe).encode()).hexdigest()[:12]}"
    folder = cache_dir / "models" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PoiseError(f"cannot create the model cache {folder.parent}: {error.strerror}. Make it writable, or give "
                         "another cache folder") from None
    if folder.exists() and (fault := damage(folder)):
        aside = folder.with_name(f"{name}.damaged-{time.time_ns()}")
        os.rename(folder, aside)
        print(f"{fault}; moved to {aside.name} and made again", flush=True)
    if not folder.exists():
        _make(task, folder, progress)
    if fault := damage(folder):
        raise PoiseError(f"{fault}, right after it was made: is the disk full or failing?")
    return folder


def _make(task: Task, folder: Path, progress: Progress) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    temporary.mkdir()
    try:
        task.make_model(temporary, progress)
        hashes = {str(p.relative_to(temporary)): file_sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        files.write_json(temporary / MANIFEST, {"recipe": task.model_recipe(), "files": hashes})
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        # Another job was first with the same model: its entry is as good as ours.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def damage(folder: Path) -> str:
    """What is wrong with an entry, or ""."""
    try:
        manifest = files.read_json(folder / MANIFEST)
        hashes = manifest["files"]
    except (files.CorruptFile, TypeError, KeyError):
        return f"the start model {folder} has no readable {MANIFEST}"
    for name, sha256 in hashes.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            return f"the start model {folder} is damaged ({name} is missing or changed)"
    return ""
