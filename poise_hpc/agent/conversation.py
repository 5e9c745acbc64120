"""A conversation with the LLM: one operator, one candidate, growing turn by turn; and how its replies are read.

A reply that cannot be read goes back once with the reason (`prompts/again.md`); then the call has failed. A first turn that
the model's context cannot hold is said in fewer words, if there are any.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..replay import LLM, LLMError, TooLong
from ..transcript import Request
from .prompts import render, system

T = TypeVar("T")
Shape = TypeVar("Shape", bound=BaseModel)


class BadReply(ValueError):
    """What is wrong with a reply, in words that its author can act on."""


class Malformed(LLMError):
    """Still not readable after the repair turn."""


class Conversation:
    def __init__(self, llm: LLM, operator: str, candidate: str):
        self.llm, self.operator, self.candidate = llm, operator, candidate
        self.model = ""  # that gave the latest reply
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system(operator)}]

    def ask(self, text: str, read: Callable[[str], T], schema: dict[str, Any] | None = None, shorter: Iterable[str] = ()) -> T:
        """Say `text`, read the reply; once more with the reason if it cannot be read; then Malformed. `shorter`: what to say
        instead while the text is too long; then TooLong."""
        try:
            return self._fitting(chain([text], shorter), read, schema)
        except BadReply as problem:
            again = render("again", problem=str(problem))
        try:
            return self._turn(again, read, schema)
        except BadReply as problem:
            raise Malformed(f"{self.candidate} {self.operator}: {self.model} was told once, still {problem}") from None

    def _fitting(self, texts: Iterator[str], read: Callable[[str], T], schema: dict[str, Any] | None) -> T:
        text = next(texts)
        while True:
            try:
                return self._turn(text, read, schema)
            except TooLong as error:
                if not (text := next(texts, "")):
                    raise error from None

    def _turn(self, text: str, read: Callable[[str], T], schema: dict[str, Any] | None) -> T:
        messages = [*self._messages, {"role": "user", "content": text}]
        turn = sum(m["role"] == "assistant" for m in messages)
        reply = self.llm.complete(Request(self.operator, self.candidate, turn, tuple(messages), schema))
        self._messages = [*messages, {"role": "assistant", "content": reply.text}]
        self.model = reply.model
        if reply.finish == "length":
            raise BadReply("the reply was cut at the token limit; say the same in fewer words, whole")
        return read(reply.text)


def json_schema(shape: type[BaseModel]) -> dict[str, Any]:
    """The shape as a JSON schema in the strict dialect: every property required, none besides."""
    def strict(node: Any) -> Any:
        if isinstance(node, list):
            return [strict(n) for n in node]
        if not isinstance(node, dict):
            return node
        out = {k: strict(v) for k, v in node.items() if k not in ("title", "default")}
        return out | {"additionalProperties": False, "required": list(out["properties"])} if "properties" in out else out

    return strict(shape.model_json_schema())


def reads_json(shape: type[Shape], check: Callable[[Shape], list[str]] = lambda value: []) -> Callable[[str], Shape]:
    """A reader of one JSON object of this shape; `check` names what is wrong with its meaning."""
    def read(text: str) -> Shape:
        try:
            value = shape.model_validate(find_object(text))
        except ValidationError as error:
            raise BadReply("the JSON object does not fit: " + "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'the object'}: {e['msg']}" for e in error.errors()[:8])) from None
        if problems := check(value):
            raise BadReply("; ".join(problems))
        return value

    return read


STRING_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[\]}])', re.S)


def find_object(text: str) -> dict[str, Any]:
    """The largest JSON object in a reply, whatever stands around it (prose, fences). Trailing commas and raw line
    ends inside strings are forgiven; what is missing is not made up."""
    forgiving = STRING_OR_COMMA.sub(lambda m: "" if m[0] == "," else m[0], text)
    found = [*_objects(text), *_objects(forgiving)]
    if not found:
        raise BadReply("the reply holds no complete JSON object" if "{" in text else "the reply holds no JSON object")
    return max(found, key=lambda pair: pair[0])[1]


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(length, object) of every JSON object that is not inside another one."""
    decoder, at = json.JSONDecoder(strict=False), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            yield end - at, value
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
