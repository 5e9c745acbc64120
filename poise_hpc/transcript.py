"""`llm.jsonl`: every LLM request before it is sent, every reply before it is used. Standard library only.

A call leaves two lines, joined by its number. The first stands on disk before a byte goes out, so that a controller
killed in between knows that money may have gone; the second before anybody reads the reply, so that it is never
paid twice.

    {"event": "sent",  "call", "key", "candidate", "operator", "turn", "sha256", "url", "model", "messages", "schema",
                       "options": {max_tokens, temperature, ...}, "worst": {tokens, cost}, "time"}
    {"event": "reply", "call", "key", "model", "body": the server's bytes as text, "spent": {tokens, cost}, "time"}
    {"event": "error", "call", "key", "model", "status", "error", "spent": {tokens, cost}, "time"}
                       and "final": "too long" where the prompt did not fit into the model's context, "refused" where a filter stopped it
    {"event": "budget", "key", "error", "time"}             refused before sending
    {"event": "too long", "key", "model", "error", "time"}  the same as "final", by agent.context_tokens

Costs are decimal strings: they add up exactly.
"""
from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from . import files
from .reply import Reply, read_body
from .types import PoiseError


TAIL = 2**20  # bytes: what calls in flight have left stands near the end
TOKEN_KEYS = ("max_tokens", "max_completion_tokens")  # what servers call the limit of a reply


class BudgetExceeded(PoiseError):
    """The next call could cost more than is left. Nothing was sent."""


@dataclass(frozen=True)
class Request:
    """One turn of a conversation. Equal requests have equal keys, whatever process builds them."""

    operator: str                          # of agent_config.OPERATORS
    candidate: str                         # "c0007"
    turn: int                              # of this conversation, from 0
    messages: tuple[dict[str, str], ...]   # {"role", "content"}, oldest first
    schema: dict[str, Any] | None = None   # JSON schema of the wanted reply

    @property
    def sha256(self) -> str:
        return hashlib.sha256(files.dumps([list(self.messages), self.schema]).encode()).hexdigest()

    @property
    def key(self) -> str:
        return f"{self.candidate}/{self.operator}/{self.turn}/{self.sha256}"


@dataclass(frozen=True)
class Amount:
    """What a call costs. In the currency of the configured prices."""

    tokens: int = 0             # prompt + completion
    cost: Decimal = Decimal(0)

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.cost + other.cost)

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "cost": str(self.cost)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Amount:
        return cls(data["tokens"], Decimal(data["cost"]))


@dataclass(frozen=True)
class Limit:
    """Of a whole campaign. None: without limit."""

    tokens: int | None = None
    cost: Decimal | None = None

    def over(self, spent: Amount, worst: Amount) -> str:
        """Why a call is not made, by what has a limit and would pass it."""
        said, raised = [], []
        if self.tokens is not None and (spent + worst).tokens > self.tokens:
            said.append(f"{spent.tokens} of {self.tokens} tokens are used, and the call could take {worst.tokens}")
            raised.append("agent.budget_tokens")
        if self.cost is not None and (spent + worst).cost > self.cost:
            said.append(f"{spent.cost} of a budget of {self.cost} is spent, and the call could cost {worst.cost}")
            raised.append("agent.budget_cost")
        return f"{'; '.join(said)}. Raise {' and '.join(raised)} to go on"

    def holds(self, amount: Amount) -> bool:
        return (self.tokens is None or amount.tokens <= self.tokens) and (self.cost is None or amount.cost <= self.cost)


class Transcript:
    """The only writer of one `llm.jsonl`. Thread-safe; one process at a time (the campaign's lock sees to it)."""

    def __init__(self, path: Path, clock: Callable[[], float]):
        self.path, self._clock, self._lock = path, clock, threading.Lock()
        self._replies: dict[str, dict[str, Reply]] = {}   # key -> model -> reply
        self._over: dict[str, str] = {}                   # key -> why the budget refused it
        self._final: dict[str, dict[str, tuple[str, str]]] = {}  # key -> model -> "too long" or "refused", and why
        self._cut: dict[str, tuple[int, int]] = {}        # model -> how many of its latest replies were cut before any text, and at how many tokens
        self._limits: dict[int, int] = {}                 # call -> agent.max_tokens then
        self._amounts: dict[int, tuple[str, Amount]] = {}  # call -> operator, spent (or its worst case until known)
        for line in files.read_lines(path):
            self._take(line)

    def replies(self, key: str) -> dict[str, Reply]:
        """What was answered to this request, by model."""
        with self._lock:
            return dict(self._replies.get(key, {}))

    def over_budget(self, key: str) -> str | None:
        return self._over.get(key)

    def final(self, key: str) -> dict[str, tuple[str, str]]:
        """Models that will not take this request, however often they are asked: "too long" or "refused", and the reason."""
        with self._lock:
            return dict(self._final.get(key, {}))

    def cut(self, model: str) -> tuple[int, int]:
        """How many of the model's latest replies were cut before any text, one after the other, and at how many tokens."""
        return self._cut.get(model, (0, 0))

    @property
    def answered(self) -> bool:
        """Was any request?"""
        return bool(self._replies)

    def turns(self, candidate: str, operator: str) -> list[str]:
        """Keys of all answered requests of one operator for one candidate."""
        return [key for key in self._replies if key.startswith(f"{candidate}/{operator}/")]

    def spent(self) -> dict[str, Amount]:
        """By operator. A call whose end is unknown counts with its worst case."""
        out: dict[str, Amount] = {}
        with self._lock:
            for operator, amount in self._amounts.values():
                out[operator] = out.get(operator, Amount()) + amount
        return out

    def calls(self) -> dict[str, int]:
        """Sent requests by operator, those that failed included."""
        with self._lock:
            return dict(Counter(operator for operator, _ in self._amounts.values()))

    def begin(self, request: Request, model: str, schema: bool, worst: Amount, limit: Limit, url: str = "", options: dict[str, Any] = {}) -> int:
        """Reserve the worst case and note the request, whole. BudgetExceeded if `limit` does not hold that much more."""
        with self._lock:
            total = sum((amount for _, amount in self._amounts.values()), Amount())
            if not limit.holds(total + worst):
                reason = f"{request.candidate} {request.operator}: {limit.over(total, worst)}"
                self._append({"event": "budget", "key": request.key, "error": reason})
                raise BudgetExceeded(reason)
            call = max(self._amounts, default=0) + 1
            self._append({"event": "sent", "call": call, "key": request.key, "candidate": request.candidate,
                          "operator": request.operator, "turn": request.turn, "sha256": request.sha256, "url": url, "model": model,
                          "messages": list(request.messages), "schema": request.schema if schema else None, "options": options,
                          "worst": worst.to_json()})
            return call

    def end(self, call: int, request: Request, model: str, body: str, spent: Amount) -> Reply:
        """Note the reply, then hand it out."""
        with self._lock:
            self._append({"event": "reply", "call": call, "key": request.key, "model": model, "body": body,
                          "spent": spent.to_json()})
            return self._replies[request.key][model]

    def fail(self, call: int, request: Request, model: str, status: int | None, error: str, spent: Amount, final: str = "") -> None:
        with self._lock:
            self._append({"event": "error", "call": call, "key": request.key, "model": model, "status": status,
                          "error": error, "spent": spent.to_json()} | ({"final": final} if final else {}))

    def refuse(self, request: Request, model: str, error: str) -> None:
        """Note that the request is too long for the model, and is not sent."""
        with self._lock:
            self._append({"event": "too long", "key": request.key, "model": model, "error": error})

    def _append(self, line: dict[str, Any]) -> None:
        line["time"] = round(self._clock(), 3)
        files.append_line(self.path, line, sync=True)
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        match line.get("event"):
            case "sent":
                self._amounts[line["call"]] = (line["operator"], Amount.from_json(line["worst"]))
                self._limits[line["call"]] = max((n for key, n in line.get("options", {}).items() if key in TOKEN_KEYS), default=0)
            case "reply":
                self._settle(line)
                reply = self._replies.setdefault(line["key"], {})[line["model"]] = read_body(line["model"], line["body"])
                limit, (count, at) = self._limits.get(line["call"], 0), self.cut(reply.model)
                silent = reply.finish == "length" and not reply.text.strip()
                self._cut[reply.model] = (count + 1 if at == limit else 1, limit) if silent else (0, 0)
            case "error":
                self._settle(line)
                if line.get("final"):
                    self._final.setdefault(line["key"], {})[line["model"]] = line["final"], line["error"]
            case "too long":
                self._final.setdefault(line["key"], {})[line["model"]] = "too long", line["error"]
            case "budget":
                self._over[line["key"]] = line["error"]

    def _settle(self, line: dict[str, Any]) -> None:
        operator = line["key"].split("/")[1]
        self._amounts[line["call"]] = (operator, Amount.from_json(line["spent"]))


def pending(path: Path) -> list[dict[str, str]]:
    """What is being asked for: {candidate, operator, model, error: the last attempt's, "" while the first is under way}. From the
    file's end alone: it is read every few seconds."""
    last: dict[str, dict[str, str]] = {}
    for line in files.read_lines(path, TAIL):
        candidate, operator = line["key"].split("/")[:2]
        before = last.pop(candidate, {})
        error = line.get("error", before.get("error", "") if before.get("operator") == operator else "")
        if line["event"] == "sent" or (line["event"] == "error" and not line.get("final")):
            last[candidate] = {"candidate": candidate, "operator": operator, "model": line["model"], "error": error}
    return list(last.values())
