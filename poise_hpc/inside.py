"""Whether a worker is inside candidate code: a byte in memory that the supervisor shares with it and reads when it has ended.

A stack says whose code a worker died in where Python could still write one. It cannot when C code leaves the process, nor
when the fault lies in the candidate's part of a backward pass, which has no frame of the candidate's. The byte says it then, too.
Not covered: code that is fast enough to leave, and breaks something that dies later.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "POISE_JOB_INSIDE"  # the byte's file descriptor, in the worker


def byte() -> int:
    """The supervisor's: to be passed on to the worker."""
    shared = os.memfd_create("poise-inside")
    os.ftruncate(shared, 1)
    return shared


def was(shared: int) -> bool:
    return os.pread(shared, 1, 0) == b"\1"


@contextmanager
def candidate_code() -> Iterator[None]:
    """In the worker. Without a supervisor it does nothing."""
    if VARIABLE not in os.environ:
        yield
        return
    shared = int(os.environ[VARIABLE])
    os.pwrite(shared, b"\1", 0)
    try:
        yield
    finally:
        os.pwrite(shared, b"\0", 0)
