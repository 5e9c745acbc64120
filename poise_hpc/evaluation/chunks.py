"""Completions as files: of a chunk, which a killed evaluation goes on from, and of an element.

    chunks/<at>-<benchmark>-<number>.npz    tokens, offsets, truncated, and `question`: what these are completions of

A chunk is written whole or not at all, and removed when its element is complete. It is taken over from an earlier attempt
if it answers the same question: weights, data, engine, sampling parameters and problems.
"""
from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import files

Drawn = tuple[list[list[int]], list[bool]]  # completions, truncated: in the order of the chunk's rows


def write(path: Path, question: dict[str, Any], drawn: Drawn) -> None:
    files.write_atomic(path, compress(*drawn, question=np.frombuffer(files.dumps(question).encode(), dtype=np.uint8)))


def read(path: Path, question: dict[str, Any]) -> Drawn | None:
    """None if it is not there, damaged, or answers another question."""
    try:
        with np.load(path) as data:
            if data["question"].tobytes() != files.dumps(question).encode():
                return None
            return decompress(data), data["truncated"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def compress(completions: Sequence[Sequence[int]], truncated: Sequence[bool], **more: np.ndarray) -> bytes:
    """npz: `tokens` of all rows in a row, `offsets` (N + 1,), `truncated` (N,), and more arrays."""
    flat = np.array([t for c in completions for t in c], dtype=np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, tokens=flat.astype(np.uint16 if flat.max(initial=0) < 2**16 else np.uint32),
                        offsets=np.cumsum([0, *map(len, completions)]), truncated=np.array(truncated), **more)
    return buffer.getvalue()


def decompress(data: Any) -> list[list[int]]:
    return [part.tolist() for part in np.split(data["tokens"], data["offsets"][1:-1])]


def join(parts: Iterable[tuple[Sequence[int], Any]]) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` and `offsets` of an element from those of its parts, each with the rows where its completions belong."""
    pieces = [(rows, data["tokens"], data["offsets"]) for rows, data in parts]
    if len(pieces) == 1:
        return pieces[0][1:]
    found = {row: part for rows, tokens, offsets in pieces for row, part in zip(rows, np.split(tokens, offsets[1:-1]), strict=True)}
    ordered = [found[row] for row in range(len(found))]
    return np.concatenate(ordered), np.cumsum([0, *map(len, ordered)])
