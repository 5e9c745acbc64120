"""LLM calls to an OpenAI-compatible endpoint, paid once and within a budget. The only home of `openai`.

`Client.complete(request)` answers from the transcript if the request was ever answered; otherwise it tries the
operator's models in order. Per attempt: reserve the worst case, note the request, send, note the reply, hand it out.

Retried with backoff: 408, 429 (Retry-After is honoured), 5xx, timeouts, lost connections. Not retried: other 4xx, but a 400 or 422
to something that can be left out (`dialect`). A web page in an answer's place is retried, too, and then needs a person. The openai client's own retries are off: it would generate, and charge, again without telling.

A prompt that the model's context cannot hold is `TooLong`, if it is one that may be shortened (`LEAST_TOKENS`); one that a provider's
filter stops is `Refused`.

Not covered: streaming, tools, images.
"""
from __future__ import annotations

import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

from .access import address, read_key, without_key
from .agent_config import Agent
from .dialect import Dialect
from .pace import Pace
from .replay import LLMError, NoList, Refused, Rejected, TooLong, Unavailable, models_for, recorded, unusable
from .reply import Reply, is_page, no_api, read_body
from .transcript import Amount, Limit, Request, Transcript

CONNECT_S = 10.0      # to open a connection; `agent.timeout_s` is the server's silence after that
LIST_S = 30.0         # the server's silence where it is only asked for its models
FRAMING_TOKENS = 32   # a chat template's own tokens per message, more than any seen
RETRIED = frozenset({408, 429})
ALL_CUT = 3           # replies in a row that were cut before any answer: the next will be, too
BYTES_A_TOKEN = 3     # of prose, code and figures; a little less than any tokenizer in use has
LEAST_TOKENS = 14_000  # a context that cannot hold such a prompt beside the reply is too small for the agent: a person must look
NO_ROOM = re.compile(r"context_length_exceeded|context (length|window|size)|(prompt|input|request) is too long|input token count", re.I)
FILTERED = frozenset({"content_filter", "content_policy_violation", "invalid_prompt"})  # error codes of a prompt that a filter has stopped
HINTS = {401: "Check the key (agent.api_key_file or agent.api_key_env)", 403: "Check the key and what it may use",
         402: "The account has no credit left", 429: "The account has no credit left", 404: "Check agent.base_url and agent.models"}
NO_ENTRY = frozenset({401, 402, 403})
CHECK = "Check agent.models, agent.max_tokens and agent.temperature"
NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"})


@dataclass(eq=False)
class Failure(Exception):
    """One attempt without a reply."""

    status: int | None           # HTTP; None: no answer came
    message: str
    retry: bool
    billable: bool = False       # the server may have generated, and charge for it
    page: bool = False           # a web page came: no model has seen the request
    final: str = ""              # "too long": the prompt, for the model's context; "refused": by a filter
    retry_after_s: float | None = None


class Client:
    """Thread-safe: `agent.max_parallel` requests in flight at most."""

    def __init__(self, settings: Agent, transcript: Transcript, *, seed: int = 0,
                 environ: Mapping[str, str] = os.environ, sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic):
        self.settings, self.transcript, self._seed, self._sleep = settings, transcript, seed, sleep
        key = read_key(settings, environ)
        self._send = _endpoint(settings, key)
        self._url = lambda: without_key(key, address(settings))  # as it may be written down
        self._slots = threading.Semaphore(settings.max_parallel)
        self._pace = Pace(settings.requests_per_min, sleep, clock)
        self._dialects: dict[str, Dialect] = {}  # model -> what it has taken
        self._limit = Limit(settings.budget_tokens,
                            None if settings.budget_cost is None else Decimal(str(settings.budget_cost)))

    def complete(self, request: Request) -> Reply:
        models = models_for(self.settings, request.operator)
        if reply := recorded(self.transcript, request, models):
            return reply
        failures: list[LLMError] = []
        for model in models:
            try:
                # a recorded reply is unusable here: refused or empty, and not to be paid for again
                reply = self.transcript.replies(request.key).get(model) or self._ask(model, request)
            except LLMError as error:
                failures.append(error)
                continue
            if reply.usable:
                return reply
            failures.append(unusable(request, reply))
        # What time or a person may cure comes first: the others are final, and end the candidate.
        raise min(failures, key=lambda f: (not isinstance(f, Unavailable), not isinstance(f, Rejected)))

    def _ask(self, model: str, request: Request) -> Reply:
        where = f"{request.candidate} {request.operator}: {model} at {address(self.settings)}"
        if (room := self.settings.context_tokens) and prompt_tokens(request) + self.settings.max_tokens > room:
            reason = (f"{where}: a prompt of about {prompt_tokens(request)} tokens and a reply of {self.settings.max_tokens} (agent.max_tokens) "
                      f"do not fit into {room} (agent.context_tokens)")
            self.transcript.refuse(request, model, reason)
            raise TooLong(reason)
        cut, at = self.transcript.cut(model)
        if cut >= ALL_CUT and self.settings.max_tokens <= at:
            raise Rejected(f"{where}: its last {cut} replies were cut at {at} tokens before any answer, spent on reasoning perhaps. Raise agent.max_tokens")
        dialect, attempt = self._dialects.get(model) or Dialect.first(self.settings), 1
        disliked: dict[Dialect, str] = {}
        while True:
            try:
                reply = self._attempt(model, request, dialect)
                self._dialects[model] = dialect
                return reply
            except Failure as error:
                if error.final == "too long":
                    raise self._no_room(where, request, error.message) from None
                if error.final == "refused":
                    raise Refused(f"{where}: stopped by the provider's filter: {error.message}") from None
                disliked[dialect] = error.message
                if (other := dialect.after(error.status, error.message, request)) and other not in disliked:
                    dialect = other
                    continue
                if not error.retry:
                    said = "; then ".join(dict.fromkeys(disliked.values()))
                    raise Rejected(f"{where} answered {error.status}: {said}. {HINTS.get(error.status or 0, CHECK)}") from None
                wait = self._wait_s(error, f"{self._seed}/{request.key}/{model}/{attempt}", attempt)
                if error.page and attempt == self.settings.max_attempts:
                    raise Rejected(f"{where}: {error.message}") from None
                if attempt == self.settings.max_attempts or wait > self.settings.backoff_max_s:
                    raise Unavailable(f"{where}: attempt {attempt} failed ({error.message}), next wait {wait:.0f} s. "
                                      f"Run again when the endpoint is back: nothing paid is lost") from None
            self._sleep(wait)
            attempt += 1

    def _no_room(self, where: str, request: Request, said: str) -> LLMError:
        tokens = prompt_tokens(request)
        if tokens >= LEAST_TOKENS:
            return TooLong(f"{where}: the prompt, about {tokens} tokens, is too long: {said}")
        return Rejected(f"{where} has no room for a prompt of about {tokens} tokens beside a reply of {self.settings.max_tokens}: {said}. "
                        "Lower agent.max_tokens, or serve the model with a longer context")

    def _wait_s(self, error: Failure, stream: str, attempt: int) -> float:
        """Retry-After if the server says so; else exponential with up to 25 % of jitter, so that parallel calls spread."""
        if error.retry_after_s is not None:
            return error.retry_after_s
        jitter = 1 - 0.25 * random.Random(stream).random()
        return jitter * min(self.settings.backoff_s * 2.0 ** (attempt - 1), self.settings.backoff_max_s)

    def _attempt(self, model: str, request: Request, dialect: Dialect) -> Reply:
        worst = self._amount(model, prompt_bound(request), self.settings.max_tokens)
        with self._slots:
            self._pace.wait()
            more = dialect.options(request, self.settings)
            schema = more.get("response_format", {}).get("type") == "json_schema"
            noted = {k: v for k, v in more.items() if not (schema and k == "response_format")}  # the schema has a field of its own
            call = self.transcript.begin(request, model, schema, worst, self._limit, self._url(), noted)
            try:
                body = self._send(model, request, more)
            except Failure as error:
                final = error.final if error.final != "too long" or prompt_tokens(request) >= LEAST_TOKENS else ""
                self.transcript.fail(call, request, model, error.status, error.message, worst if error.billable else Amount(), final)
                raise
            try:
                reply = read_body(model, body)
            except ValueError as error:
                if is_page(body):
                    said = no_api(body)
                    self.transcript.fail(call, request, model, 200, said, Amount())
                    raise Failure(200, said, retry=True, page=True) from None
                # a cut body, another service's JSON: charged or not, nobody knows
                self.transcript.fail(call, request, model, 200, f"{error}: {body[:500]}", worst)
                raise Failure(200, str(error), retry=True, billable=True) from None
            known = reply.prompt_tokens is not None and reply.completion_tokens is not None
            spent = self._amount(model, reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) if known else worst
            return self.transcript.end(call, request, model, body, spent)

    def _amount(self, model: str, prompt: int, completion: int, cached: int = 0) -> Amount:
        """`cached`: of the prompt's tokens."""
        price = self.settings.prices.get(model)
        if price is None:
            return Amount(prompt + completion)
        rates = price.prompt, price.prompt if price.cached is None else price.cached, price.completion
        return Amount(prompt + completion, sum((Decimal(str(rate)) * n for rate, n in zip(rates, (prompt - cached, cached, completion), strict=True)),
                                               Decimal(0)) / 1_000_000)


def prompt_bound(request: Request) -> int:
    """Tokens of the prompt, at most: a token of a byte-level tokenizer is at least one byte."""
    return sum(len(text.encode()) + FRAMING_TOKENS for text in _texts(request))


def prompt_tokens(request: Request) -> int:
    """Tokens of the prompt, about."""
    return sum(len(text.encode()) // BYTES_A_TOKEN + FRAMING_TOKENS for text in _texts(request))


def _texts(request: Request) -> list[str]:
    return [m["content"] for m in request.messages] + ([str(request.schema)] if request.schema else [])


def served_models(settings: Agent, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the endpoint offers: one free call that proves address and key. Rejected: a person must look; NoList: it does not say;
    Unavailable: later perhaps."""
    import openai

    key, url = read_key(settings, environ), address(settings)
    if not url:
        raise Unavailable(_silent(settings))
    try:
        raw = _connect(settings, url, key, LIST_S).models.with_raw_response.list()
    except openai.APIStatusError as error:
        code, said = error.status_code, without_key(key, str(error))[:500]
        if code in NO_ENTRY and not (code == 403 and "scope" in said):  # a key that may do all but this
            raise Rejected(f"{url} answered {code}: {said}. {HINTS[code]}") from None
        raise (Unavailable if code in RETRIED or code >= 500 else NoList)(f"{url} answered {code} to the list of its models: {said}") from None
    except openai.APIConnectionError as error:
        raise Unavailable(without_key(key, f"{url}: {error} ({error.__cause__})")) from None
    return _listed(url, without_key(key, raw.http_response.content.decode("utf-8", "replace")))


def _listed(url: str, body: str) -> list[str]:
    try:
        return sorted(str(model["id"]) for model in json.loads(body)["data"])
    except (ValueError, KeyError, TypeError):
        if is_page(body):
            raise Rejected(f"{url}: {no_api(body)}") from None
        raise NoList(f"{url} answered something else than a list of its models: {body[:200]!r}") from None


def _silent(settings: Agent) -> str:
    return f"no server has written its address to agent.base_url_file ({settings.base_url_file}) yet; is its job running?"


def _connect(settings: Agent, url: str, key: str, silence_s: float = math.inf) -> Any:
    import openai

    return openai.OpenAI(base_url=url, api_key=key, max_retries=0,
                         timeout=openai.Timeout(min(settings.timeout_s, silence_s), connect=min(CONNECT_S, settings.timeout_s)))


def _endpoint(settings: Agent, key: str) -> Callable[[str, Request, dict[str, Any]], str]:
    """send(model, request, options) -> the reply's body, or Failure. The key stays in this closure."""
    import openai

    client_at = lru_cache(maxsize=1)(lambda url: _connect(settings, url, key))

    def send(model: str, request: Request, more: dict[str, Any]) -> str:
        if not (url := address(settings)):
            raise Failure(None, _silent(settings), retry=True)
        try:
            raw = client_at(url).chat.completions.with_raw_response.create(model=model, messages=list(request.messages), extra_body=more)
        except openai.APIStatusError as error:
            status = error.status_code
            quota = error.code == "insufficient_quota"  # a 429 that no waiting cures
            raise Failure(status, without_key(key, str(error))[:2000], retry=not quota and (status in RETRIED or status >= 500),
                          retry_after_s=_retry_after_s(error.response.headers), final=_final(error)) from None
        except openai.APITimeoutError as error:
            raise Failure(None, f"no answer within {settings.timeout_s:g} s (agent.timeout_s)", retry=True,
                          billable=type(error.__cause__).__name__ not in NEVER_SENT) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            raise Failure(None, without_key(key, f"{error} ({type(cause).__name__}: {cause})"), retry=True,
                          billable=type(cause).__name__ not in NEVER_SENT) from None
        return without_key(key, raw.http_response.content.decode("utf-8", "replace"))

    return send


def _final(error: Any) -> str:
    """Of an answer that says that this prompt will never be taken: why."""
    if error.status_code == 413 or (error.status_code == 400 and NO_ROOM.search(f"{error} {error.code}")):
        return "too long"
    return "refused" if error.status_code == 400 and error.code in FILTERED else ""


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds, from a number or an HTTP date (RFC 9110, 10.2.3); a date counts from the server's own clock."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - parsedate_to_datetime(headers["date"])).total_seconds())
    except (KeyError, TypeError, ValueError):
        return None
