"""A server's answer, read from its body: the same way when it arrives and when it is replayed. Standard library only.

Servers and gateways put things in different places:

    text       `content`; its text parts, where it is a list; the arguments of a tool call, where the schema was made a tool
    reasoning  left out: `reasoning_content`, `reasoning`, and <think> ... </think> before the answer
    refusal    `refusal`, or finish_reason "content_filter"
    tokens     `usage`. What the total has beyond prompt and completion is charged, too: reasoning that was not counted there
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    model: str                         # that was asked
    text: str
    finish: str                        # "stop", "length" (cut at max_tokens), "content_filter", ...
    refusal: str                       # "" unless the model or a filter refused
    prompt_tokens: int | None          # None: the server does not say
    completion_tokens: int | None      # reasoning included
    cached_tokens: int = 0             # of the prompt, read from the provider's cache

    @property
    def usable(self) -> bool:
        return bool(self.text.strip()) and not self.refusal


def read_body(model: str, body: str) -> Reply:
    """Reply from a chat-completion body; ValueError if it is none, or an error in a completion's place."""
    data = json.loads(body)
    try:
        choice = data["choices"][0]
        message, usage = choice.get("message") or {}, data.get("usage") or {}
        finish = str(choice.get("finish_reason") or "")
        if said := data.get("error") or choice.get("error") or (finish == "error" and "finish_reason error"):
            raise ValueError(f"an error instead of a completion: {said}")
        refusal = message.get("refusal") or ("content filter" if finish == "content_filter" else "")
        return Reply(model, _text(message), finish, _plain(refusal), *_tokens(usage))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion ({type(error).__name__}: {error})") from None


def _tokens(usage: dict[str, Any]) -> tuple[int | None, int | None, int]:
    prompt, completion, total = (None if usage.get(k) is None else int(usage[k]) for k in ("prompt_tokens", "completion_tokens", "total_tokens"))
    if prompt is not None and completion is not None and total is not None:
        completion = max(completion, total - prompt)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0
    return prompt, completion, min(int(cached), prompt or 0)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_plain(part.get("text")) for part in content if part.get("type") == "text")
    if not content and (calls := message.get("tool_calls")):
        said = calls[0]["function"]["arguments"]
        content = said if isinstance(said, str) else json.dumps(said)
    return _after_thinking(_plain(content))


def _after_thinking(text: str) -> str:
    """Some templates open the thoughts themselves: then only their end is to be seen."""
    thoughts, end, answer = text.partition("</think>")
    opened = thoughts.lstrip().startswith("<think>")
    if end and (opened or "<think>" not in thoughts):
        return answer
    return "" if opened else text


def _plain(text: Any) -> str:
    """Text that can be written to a file: lone surrogates, which JSON escapes allow, become '?'."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def is_page(body: str) -> bool:
    """HTML or XML: a proxy, a login, a site's own pages; no model has answered, and nothing is charged."""
    return body.lstrip("\ufeff \t\r\n").startswith("<")


def no_api(body: str) -> str:
    return f"a web page came, no JSON: {' '.join(body[:400].split())[:120]!r}. Check agent.base_url (does it end in /v1?) and the proxy of this machine"
