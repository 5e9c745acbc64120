"""How often an endpoint is asked (agent.requests_per_min)."""
from __future__ import annotations

import threading
from collections.abc import Callable


class Pace:
    """At most `per_min` sends a minute, evenly spaced."""

    def __init__(self, per_min: float | None, sleep: Callable[[float], None], clock: Callable[[], float]):
        self._gap_s = 60.0 / per_min if per_min else 0.0
        self._sleep, self._clock, self._next, self._lock = sleep, clock, float("-inf"), threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = self._clock()
            slot = max(now, self._next)
            self._next = slot + self._gap_s
        if slot > now:
            self._sleep(slot - now)
