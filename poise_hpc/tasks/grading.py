"""Is a final answer right? The rules first (`grading_rules`), then math-verify in processes that may be killed.

Without math-verify what the rules cannot decide counts as wrong; `Grader.version` says which it was, and is part of the
task's data hash, so that numbers graded differently are never compared. Verdicts are cached by (gold, answer).

Not covered: relative tolerances (a Minerva answer rounded to three digits is wrong), proofs, units as such.
"""
from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from ..types import PoiseError, UsageError
from .grading_rules import same

RULES = "rules-1"      # raise it with every change of the rules' verdicts
MAX_ANSWER = 300       # characters; longer ones are wrong unread
CACHED = 200_000       # verdicts
WORKER = "poise_hpc.tasks.grading_worker"

Pair = tuple[str, str]  # gold, answer


class Verdict(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"  # beyond the rules, and there is no math-verify
    TIMEOUT = "timeout"      # math-verify was killed at its limit
    DIED = "died"            # it crashed or ran out of memory
    TOO_LONG = "too-long"

FAILED = frozenset({Verdict.TIMEOUT, Verdict.DIED})  # counted as wrong, and reported


class Grader:
    def __init__(self, verifier: Literal["auto", "math-verify", "rules"], workers: int, seconds: float):
        installed = None if verifier == "rules" else _installed()
        if verifier == "math-verify" and installed is None:
            raise UsageError("task.options.verifier is 'math-verify', which is not installed here: pip install 'poise_hpc[math]', "
                             "or choose 'rules'")
        self.version = RULES if installed is None else f"{RULES}+math-verify-{installed}-{seconds:g}s"
        self._pool = None if installed is None else Pool(workers, seconds)
        self._cache: dict[Pair, Verdict] = {}

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        if len(self._cache) > CACHED:
            self._cache.clear()
        hard = []
        for pair in dict.fromkeys(pairs):
            if pair not in self._cache and (verdict := by_rules(pair)) is not None:
                self._cache[pair] = verdict
            elif pair not in self._cache:
                hard.append(pair)
        found = self._pool.verdicts(hard) if self._pool else [Verdict.UNDECIDED] * len(hard)
        self._cache.update(zip(hard, found, strict=True))
        return [self._cache[pair] for pair in pairs]

    def close(self) -> None:
        if self._pool:
            self._pool.close()


def by_rules(pair: Pair) -> Verdict | None:
    if len(pair[1]) > MAX_ANSWER:
        return Verdict.TOO_LONG
    return {True: Verdict.EQUAL, False: Verdict.DIFFERENT, None: None}[same(*pair)]


def _installed() -> str | None:
    try:
        return version("math-verify")
    except PackageNotFoundError:
        return None


class Pool:
    """Verifying processes, started when first needed, started again when one was killed."""

    def __init__(self, workers: int, seconds: float):
        self.workers, self.seconds = workers, seconds
        self._idle: list[subprocess.Popen[str]] = []

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        out: list[Verdict] = [Verdict.DIED] * len(pairs)
        waiting, working = deque(range(len(pairs))), {}
        with selectors.DefaultSelector() as selector:
            def next_pair() -> None:
                if waiting:
                    process, i = self._idle.pop() if self._idle else self._start(), waiting.popleft()
                    process.stdin.write(json.dumps(pairs[i]) + "\n")
                    process.stdin.flush()
                    working[process.stdout] = (process, i)
                    selector.register(process.stdout, selectors.EVENT_READ)

            for _ in range(self.workers):
                next_pair()
            while working:
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    process, i = working.pop(key.fileobj)
                    if reply := process.stdout.readline():
                        out[i] = Verdict.EQUAL if json.loads(reply) else Verdict.DIFFERENT
                        self._idle.append(process)
                    else:
                        out[i] = _end(process)
                    next_pair()
        return out

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-m", WORKER, str(self.seconds)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if not process.stdout.readline():  # its greeting
            raise PoiseError(f"the answer checker does not start (exit code {process.wait()}); its error stands above in the log. "
                             "Repair math-verify, or set task.options.verifier: rules")
        return process

    def close(self) -> None:
        for process in self._idle:
            process.stdin.close()
            process.stdout.close()
            process.wait()
        self._idle.clear()


def _end(process: subprocess.Popen[str]) -> Verdict:
    process.stdin.close()
    process.stdout.close()
    return Verdict.TIMEOUT if process.wait() in (-signal.SIGPROF, -signal.SIGALRM) else Verdict.DIED
