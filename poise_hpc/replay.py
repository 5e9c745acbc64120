"""A finished campaign's LLM replies again: no network, no key, no cost. Also what every LLM shares: its errors."""
from __future__ import annotations

from typing import Protocol

from .agent_config import Agent
from .reply import Reply
from .transcript import BudgetExceeded, Request, Transcript
from .types import PoiseError, UsageError


class LLMError(PoiseError):
    """A call without a usable reply."""


class Unavailable(LLMError):
    """The endpoint's or the network's fault: trying again later may help."""


class Rejected(LLMError):
    """The server does not accept the request (400, 401, 403, 404, 422): a person must look."""


class NoList(LLMError):
    """The endpoint does not say which models it serves; it may serve them all the same."""


class Refused(LLMError):
    """The model, or a filter, declined to answer."""


class TooLong(LLMError):
    """The prompt does not fit into the model's context: a shorter one may."""


class EmptyReply(LLMError):
    """A reply without text."""


class UnknownRequest(LLMError):
    """A replay met a request that its transcript does not answer."""


class LLM(Protocol):
    def complete(self, request: Request) -> Reply:
        """A usable reply; LLMError or BudgetExceeded otherwise."""


class Replay:
    """Answers from the transcript, or refuses."""

    def __init__(self, settings: Agent, transcript: Transcript):
        self.settings, self.transcript = settings, transcript

    def complete(self, request: Request) -> Reply:
        models = models_for(self.settings, request.operator)
        if reply := recorded(self.transcript, request, models):
            return reply
        failed = [failure for m in models if (failure := known_failure(self.transcript, request, m))]
        if len(failed) < len(models) and (reason := self.transcript.over_budget(request.key)):
            raise BudgetExceeded(reason)
        if failed:
            raise failed[0]
        known = self.transcript.turns(request.candidate, request.operator)
        raise UnknownRequest(
            f"{self.transcript.path} does not answer {request.key}; it knows {', '.join(known) or 'nothing'} for "
            f"{request.candidate} {request.operator}. The prompt differs from the recorded one: replay with the same "
            "version, configuration and archive, or go on with an endpoint")


def recorded(transcript: Transcript, request: Request, models: tuple[str, ...]) -> Reply | None:
    """A usable reply, of the configured models first; one of a model that has left the configuration is paid for, too."""
    replies = transcript.replies(request.key)
    return next((replies[m] for m in dict.fromkeys((*models, *replies)) if m in replies and replies[m].usable), None)


def known_failure(transcript: Transcript, request: Request, model: str) -> LLMError | None:
    """Why this model has no usable reply to the request, if that is settled."""
    if reply := transcript.replies(request.key).get(model):
        return unusable(request, reply)
    kind, reason = transcript.final(request.key).get(model, ("", ""))
    return {"too long": TooLong, "refused": Refused}[kind](reason) if kind else None


def unusable(request: Request, reply: Reply) -> LLMError:
    where = f"{request.candidate} {request.operator}: {reply.model}"
    if reply.refusal:
        return Refused(f"{where} refused: {reply.refusal}")
    return EmptyReply(f"{where} sent no text (finish reason {reply.finish or 'unknown'}, {reply.completion_tokens} "
                      "completion tokens); if it reasons, agent.max_tokens may be too small")


def models_for(settings: Agent, operator: str) -> tuple[str, ...]:
    models = settings.models.get(operator) or settings.models.get("default")
    if not models:
        raise UsageError(f"agent.models names no model for {operator!r} and no 'default'")
    return models
