"""Completions of an element, a few problems at a time: what a killed evaluation goes on from.

    chunks/<at>-<benchmark>-<number>.npz    tokens, offsets, truncated, and `question`: what these are completions of

A chunk is written whole or not at all, and removed when its element is complete. It is taken over from an earlier attempt
if it answers the same question: weights, data, engine, sampling parameters and problems.
"""
from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import files

Drawn = tuple[list[list[int]], list[bool]]  # completions, truncated: row i * n + j is sample j of problem i


def split(lengths: Sequence[int], per_chunk: int) -> list[list[int]]:
    """Indices of problems whose prompts have these lengths, in chunks of similar length: what is padded, or waited for, is little."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])  # stable: equal lengths stay in their order
    return [order[i:i + per_chunk] for i in range(0, len(order), per_chunk)]


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
