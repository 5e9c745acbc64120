"""What the doctor says of one thing."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Call = Callable[[list[str]], str]  # a command's output; scheduler.SchedulerSilent where it fails


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    cure: str = ""
