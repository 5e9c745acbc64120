"""Calls to the proposer that may take minutes, beside the loop: one thread a call, its end taken by the loop.

A thread writes nothing but the transcript (llm.jsonl). What it found is written to the campaign by the loop; after a kill it
is found again from the transcript, without paying. Threads are daemons: a controller that is told to stop does not
wait for a slow server. How many requests are in flight at once is the client's business (agent.max_parallel).
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from .replay import LLMError, Unavailable

T = TypeVar("T")
Call = Callable[[], T]


class Thinking:
    def __init__(self, threads: bool, pause_s: float, clock: Callable[[], float], tell: Callable[[str, str, str], Any]):
        self.threads = threads    # False: a call is made at once, by the loop itself (a proposer that needs no network)
        self.blocked = ""         # why a person must look: a wrong key, model or address; nothing further is asked
        self.closed = False       # no new calls
        self._pause_s, self._clock, self._tell = pause_s, clock, tell
        self._calls: dict[tuple[str, str], Future[Any]] = {}
        self._not_before: dict[tuple[str, str], float] = {}
        self._told: dict[tuple[str, str], str] = {}  # why a call waits, as it was told: the same is not told again
        self._others: dict[tuple[str, str], list[Future[Any]]] = {}  # that a call waits for

    def ask(self, id: str, what: str, gather: Callable[[], Call[T]]) -> Future[T] | None:
        """The end of call (id, what); None while there is none. `gather` collects what the call may see, in the loop.
        An endpoint that is away is no end: the call is made again after a pause."""
        key = (id, what)
        if key not in self._calls:
            if self.closed or self.blocked or self.paused(id, what):
                return None
            self._calls[key] = self._start(id, what, gather())
        future = self._calls[key]
        if not future.done():
            return None
        del self._calls[key]
        match future.exception():
            case Unavailable() as error:
                self._not_before[key] = self._clock() + self._pause_s
                if self._told.get(key) != str(error):
                    self._told[key] = str(error)
                    self._tell(id, f"{what} waits", f"{error}; again every {self._pause_s:.0f} s")
                return None
            case LLMError() as error:
                self.blocked = str(error)
                self._tell(id, f"{what} blocked", f"{error}; run again after that")
                return None
        self._told.pop(key, None)
        return future

    def paused(self, id: str, what: str) -> bool:
        """Does this call wait for an endpoint that was away, or for others?"""
        key = (id, what)
        return self._clock() < self._not_before.get(key, float("-inf")) or not all(f.done() for f in self._others.get(key, ()))

    def after_others(self, id: str, what: str) -> bool:
        """Make this call again when those in flight have ended; False if there are none."""
        self._others[id, what] = list(self._calls.values())
        return bool(self._calls)

    def settle(self, alive: Callable[[], None], every_s: float = 5.0) -> None:
        """Wait for the calls in flight, start no others; `alive` is called now and then."""
        self.closed = True
        while wait(self._calls.values(), timeout=every_s).not_done:
            alive()

    def _start(self, id: str, what: str, call: Call[T]) -> Future[T]:
        future: Future[T] = Future()
        if self.threads:
            if (id, what) not in self._told:
                self._tell(id, f"{what} asked", "")
            threading.Thread(target=_run, args=(future, call), name=f"{id} {what}", daemon=True).start()
        else:
            _run(future, call)
        return future


def _run(future: Future[T], call: Call[T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # raised again where the future is read
        future.set_exception(error)
