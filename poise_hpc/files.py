"""Whole files or none: the primitives every other module writes with. Standard library only.

A write is: temporary file in the same directory, flush, fsync, `os.replace`. A reader therefore sees the old file
or the new one. A lock is an exclusively created file (not flock: Lustre and NFS differ on it).
"""
from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .types import PoiseError


class CorruptFile(PoiseError):
    """A file that should be whole is not."""


FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in here names the file: those of a write do not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def full(error: BaseException) -> bool:
    """Is it a disk or a quota that is used up? Libraries in other languages have types of their own for it."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"os error {number})" in str(error) or os.strerror(number) in str(error) for number in FULL)


def write_atomic(path: Path, data: bytes | str, *, sync: bool = True) -> None:
    """Write a whole file or none. `sync=False` skips fsync: safe against a killed process, not a power cut."""
    temporary = _beside(path)
    try:
        _write(temporary, path, data, sync)
        os.replace(temporary, path)
    except BaseException:  # a full disk or Ctrl-C: nothing is left behind, and nothing is swallowed
        _forget(temporary)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")


def _write(temporary: Path, path: Path, data: bytes | str, sync: bool) -> None:
    with naming(path), open(temporary, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        if sync:
            f.flush()
            os.fsync(f.fileno())


def _forget(temporary: Path) -> None:
    with suppress(OSError):  # a read-only disk refuses this, too, and has refused the file
        temporary.unlink()


def dumps(data: Any) -> str:
    """Canonical JSON: sorted keys, NaN refused, so that equal data have equal bytes."""
    return json.dumps(data, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(", ", ": "))


def write_json(path: Path, data: Any, *, sync: bool = True) -> None:
    write_atomic(path, dumps(data) + "\n", sync=sync)


def read_json(path: Path) -> Any | None:
    """The file's content; None if it is not there; CorruptFile if it is not JSON."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return json.loads(raw)
    except ValueError as error:
        raise CorruptFile(f"{path} is not valid JSON ({error}); it is {len(raw)} bytes long") from None


def read_listed(folder: Path, manifest: Mapping[str, str], cure: str) -> dict[str, bytes]:
    """The files that a manifest {name: sha256} lists; CorruptFile, which ends with the cure, if one is not what it was."""
    out = {}
    for name, sha256 in manifest.items():
        path = folder / name
        if not path.is_file():
            raise CorruptFile(f"{path} is missing. {cure}")
        out[name] = path.read_bytes()
        if hashlib.sha256(out[name]).hexdigest() != sha256:
            raise CorruptFile(f"{path} is not what its manifest says: it was edited or damaged. {cure}")
    return out


def create_exclusive(path: Path, data: Any) -> bool:
    """Create `path` with `data` if nobody has; False if it exists. The file is whole as soon as it is visible."""
    temporary = _beside(path)
    try:
        _write(temporary, path, dumps(data) + "\n", sync=True)
        os.link(temporary, path)
        return True
    except FileExistsError:  # of an NFS server that was asked twice, it may be ours all the same
        return os.stat(temporary).st_nlink > 1
    finally:
        _forget(temporary)


def append_line(path: Path, data: Any, *, sync: bool = False) -> None:
    """Append one JSON line with a single write, after closing a line that a killed writer left open."""
    with naming(path):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            line = (b"\n" if torn else b"") + dumps(data).encode() + b"\n"
            if (written := os.write(fd, line)) != len(line):  # a full disk or a quota takes a part without an error
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written")
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)


def read_lines(path: Path, last: int | None = None) -> Iterator[Any]:
    """JSON lines; a torn line (a writer was killed in it) is left out. `last`: of so many bytes at the file's end only."""
    try:
        with open(path, "rb") as file:
            if last is not None:
                file.seek(max(file.seek(0, os.SEEK_END) - last, 0))
            raw = file.read()
    except FileNotFoundError:
        return
    for line in raw.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def process_start(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot (tells a reused pid apart); None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def process_identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}


def same_host_alive(owner: dict[str, Any]) -> bool | None:
    """Is the process `owner` (from `process_identity`) alive? None when it is on another host."""
    if owner.get("host") != socket.gethostname():
        return None
    return process_start(owner["pid"]) == owner.get("start")
