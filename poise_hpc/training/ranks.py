"""What the ranks of one training job tell each other. With one rank nothing is communicated.

A rank that raises alone leaves the others waiting in their next collective for ever. So a fault on one rank is
carried to the next `agree`, where all ranks raise together.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import CandidateError, PoiseError


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise, in the order of the ranks: the same bits on every rank."""
        return torch.stack(self.gather(values.cpu())).sum(0)

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks if any has an error: its own on the rank that has one, else the first rank's."""
        if self.world == 1:
            told = []
        else:
            told = [e for e in self.gather(error and (getattr(error, "cause", ""), str(getattr(error, "message", error)))) if e]
        if error is not None:
            raise error
        for cause, message in told:
            raise CandidateError(cause, message) if cause else PoiseError(f"another rank failed: {message}")

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()
