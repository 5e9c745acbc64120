"""How a server wants to be asked. What one requires another answers with 400; that is free, and `after` reads what to leave out.

    {"max_tokens": 16384, "temperature": 1.0, "response_format": {"type": "json_schema", ...}}
     max_completion_tokens    left out         json_object, then nothing: every prompt describes its JSON, too

Pure. Not covered: streaming, tools, images. What `agent.extra` says is never left out.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from .agent_config import Agent
from .transcript import TOKEN_KEYS, Request

LOOSER = {"json_schema": "json_object", "json_object": ""}  # format of a reply that is to be JSON -> what fewer servers dislike
NOT_TAKEN = re.compile(r"unsupported|not support|unrecognized|unknown|unexpected|not permitted|not allowed|extra|deprecated|only the default", re.I)
OBJECTIONS = frozenset({400, 422})  # status codes of a request that is understood and disliked


@dataclass(frozen=True)
class Dialect:
    tokens_key: str
    temperature: float | None        # None: not said
    format: str = "json_schema"      # or "json_object", or ""

    @classmethod
    def first(cls, settings: Agent) -> Dialect:
        return cls(settings.max_tokens_key, settings.temperature)

    def options(self, request: Request, settings: Agent) -> dict[str, Any]:
        """What a request says beside model and messages."""
        out: dict[str, Any] = {**settings.extra, self.tokens_key: settings.max_tokens}
        if self.temperature is not None:
            out["temperature"] = self.temperature
        if request.schema is not None and self.format == "json_schema":
            out["response_format"] = {"type": self.format, "json_schema": {"name": request.operator, "strict": True, "schema": request.schema}}
        elif request.schema is not None and self.format:
            out["response_format"] = {"type": self.format}
        return out

    def after(self, status: int | None, said: str, request: Request) -> Dialect | None:
        """What to try after this answer; None if nothing that could be left out explains it."""
        if status not in OBJECTIONS:
            return None
        if NOT_TAKEN.search(said):
            if re.search("max_(completion_)?tokens", said):
                return replace(self, tokens_key=next(key for key in TOKEN_KEYS if key != self.tokens_key))
            if "temperature" in said and self.temperature is not None:
                return replace(self, temperature=None)
        return replace(self, format=LOOSER[self.format]) if request.schema is not None and self.format else None
