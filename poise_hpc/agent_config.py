"""The config's section `agent`: which language model, where, how often and for how much."""
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .section import Positive, Section, Tuple


class Price(Section):
    """Currency units per million tokens."""

    prompt: Annotated[float, Field(ge=0)]      # currency units
    completion: Annotated[float, Field(ge=0)]  # currency units
    cached: Annotated[float, Field(ge=0)] | None = None  # currency units, of prompt tokens from the provider's cache; None: as the others


OURS = frozenset("model messages max_tokens max_completion_tokens temperature response_format n stream tools".split())  # fields that are not `extra`
OPERATORS = ("propose", "implement", "repair", "review", "reflect", "synthesize")


class Agent(Section):
    """The LLM behind `search.proposer: llm`, see docs/AGENT.md. It says where the key is, never the key."""

    base_url: str = "http://127.0.0.1:8000/v1"  # any OpenAI-compatible endpoint
    base_url_file: str | None = None            # instead: a file with the address, as slurm/vllm-server.sbatch writes it
    api_key_file: str | None = None             # one line, readable by its owner only
    api_key_env: str | None = None              # name of a variable of the login node
    models: dict[str, tuple[str, ...]] = {}     # operator or "default" -> a model, then its fallbacks
    temperature: Annotated[float, Field(ge=0)] | None = 1.0  # None: the server's own, as where a model takes none
    max_tokens: Positive = 16384                # of one reply, reasoning included
    context_tokens: Positive | None = None      # of the model, prompt and reply; longer prompts are cut down. None: when it says so
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # what is tried first; the other where a model does not take it
    extra: dict[str, Any] = {}                  # further fields of every request, e.g. {reasoning_effort: high}
    timeout_s: Annotated[float, Field(gt=0)] = 600.0         # silence of the server
    max_attempts: Positive = 6                  # per model, on 408, 429, 5xx, timeouts and lost connections
    backoff_s: Annotated[float, Field(gt=0)] = 2.0           # before attempt 2; doubles
    backoff_max_s: Annotated[float, Field(gt=0)] = 120.0     # longest wait between attempts
    max_parallel: Positive = 4                  # requests in flight
    requests_per_min: Annotated[float, Field(gt=0)] | None = None  # at most; None: no limit of ours
    prices: dict[str, Price] = {}               # model -> currency units per million tokens
    budget_cost: Annotated[float, Field(ge=0)] | None = None   # currency units of `prices`, whole campaign
    budget_tokens: Annotated[int, Field(ge=0)] | None = None   # prompt + completion, whole campaign
    proposals: Positive = 3                     # ideas per call
    duplicate_rounds: Annotated[int, Field(ge=0)] = 2        # times that duplicates go back
    repair_rounds: Annotated[int, Field(ge=0)] = 3           # times that code goes back to its author
    synthesize_every: Positive = 8              # candidates between two revisions of the living notes
    cards: Annotated[tuple[str, ...], Tuple] = ()  # folders with the user's own literature cards

    @property
    def unlimited(self) -> str:
        """A warning, where nothing limits what the agent spends."""
        return "" if self.budget_cost is not None or self.budget_tokens is not None else \
            "the language model's calls have no limit: neither agent.budget_cost nor agent.budget_tokens is set"

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: Any) -> Any:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("extra")
    @classmethod
    def _extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ours := sorted(value.keys() & OURS):
            raise ValueError(f"extra: {', '.join(ours)} cannot be given: the agent sets it, or does not cover it")
        return value

    @model_validator(mode="after")
    def _check(self) -> Agent:
        for operator, models in self.models.items():
            if operator not in (*OPERATORS, "default"):
                raise ValueError(f"models: {operator!r} is not an operator; known: {', '.join(OPERATORS)}, default")
            if not models or len(set(models)) != len(models):
                raise ValueError(f"models: {operator!r} needs at least one model, each named once, got {list(models)}")
        used = {m for models in self.models.values() for m in models}
        if self.budget_cost is not None and (unpriced := used - self.prices.keys()):
            raise ValueError(f"budget_cost needs a price for every model; missing: {', '.join(sorted(unpriced))}")
        if self.context_tokens is not None and self.context_tokens <= self.max_tokens:
            raise ValueError(f"context_tokens ({self.context_tokens}) leaves nothing for a prompt beside max_tokens ({self.max_tokens})")
        if self.api_key_file and self.api_key_env:
            raise ValueError("give 'api_key_file' or 'api_key_env', not both")
        return self
