"""The lab's start model: a tiny stock GPT-2 that writes well-formed chains, knows part of the digit facts wrong, and is careless.

Supervised, seeded, 20 s on one thread. Two phases over fresh training problems, loss on the response only:
1. scratch-pad traces and some direct answers; the facts in `wrong_facts` are always wrong;
2. a mixture of styles (`STYLES`), some of them bad; a wrong fact stays wrong with probability `stays_wrong`.

Facts that are wrong most of the time must be discovered one by one: that is what makes a learning curve gradual.
Noisy or broken traces alone are repaired by reinforcement within five steps.
"""
from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from ..section import Positive, Section
from .base import Progress
from .chain import (FACTS, ID, MAX_NEW_TOKENS, PROMPT_TOKENS, SYMBOLS, Mix, Share, Value, chain, encode, fact, purpose_of,
                    running_values, write_prompt)


# Standard deviation of the initial weights. GPT-2's own 0.02 is meant for widths of 768 and more: at width 64 the model
# was still guessing after a whole warm start; with 0.1 all digit facts are known after 400 steps (docs/LAB.md).
INIT = 0.1


class ModelOptions(Section):
    """The config's `model.options`: size and warm start."""

    d: Positive = 64                # width
    layers: Positive = 2
    heads: Positive = 4
    seed: int = 0
    steps: Positive = 700           # optimizer steps, both phases
    batch: Positive = 32            # traces a step
    learning_rate: Annotated[float, Field(gt=0)] = 6e-3  # at the start, falling to 0 as a cosine
    first_phase: Share = 0.6        # of the steps
    wrong_facts: Share = 0.3        # of the digit facts
    stays_wrong: Share = 0.75       # probability, in phase 2

    @model_validator(mode="after")
    def _heads(self) -> ModelOptions:
        if self.d % self.heads:
            raise ValueError(f"'d' ({self.d}) must be a multiple of 'heads' ({self.heads})")
        return self


def wrong_table(rng: random.Random, share: float) -> dict[tuple[str, int, int], int]:
    """The wrong value of each fact that is to be learned wrong."""
    chosen = rng.sample(FACTS, round(share * len(FACTS)))
    return {f: rng.choice([v for v in range(10) if v != fact(*f)]) for f in chosen}


# --- styles of a response, as text; `values` are the running values


def scratch(rng: random.Random, values: list[Value]) -> str:
    return "".join("%d%d;" % v for v in values) + direct(rng, values)


def direct(rng: random.Random, values: list[Value]) -> str:
    return "<a>%d%d</a>" % values[-1]


def buggy(rng: random.Random, values: list[Value]) -> str:
    """A scratch-pad that leaves a value out, or answers with something else than its last value."""
    if len(values) > 1 and rng.random() < 0.5:
        skipped = rng.randrange(len(values))
        return scratch(rng, values[:skipped] + values[skipped + 1:])
    wrong = (rng.randrange(10), rng.randrange(10))
    return scratch(rng, values)[:-len("00</a>")] + "%d%d</a>" % wrong


def broken(rng: random.Random, values: list[Value]) -> str:
    """A right answer that nobody can read: five kinds."""
    text, answer = scratch(rng, values), "%d%d" % values[-1]
    return rng.choice([
        text.replace("<a>", ""),             # never opened
        text.replace("</a>", ""),            # never closed
        text.replace(answer + "</a>", answer[0] + "</a>"),  # one digit
        text.replace("<a>", "="),            # a foreign symbol
        "<a>%s</a>" % answer * 2,            # two answers
    ])


STYLES = {  # style -> (weight in phase 1, in phase 2)
    scratch: (0.9, 0.5),
    direct: (0.1, 0.15),
    buggy: (0.0, 0.15),
    broken: (0.0, 0.2),
}


def trace(rng: random.Random, mix: Mix, phase: int, wrong: dict[tuple[str, int, int], int], stays_wrong: float) -> tuple[str, str]:
    """A prompt and a response of the warm start's phase 0 or 1. Selection and confirmation prompts never occur."""
    def believed(*f: Any) -> int:
        return wrong[f] if f in wrong and (phase == 0 or rng.random() < stays_wrong) else fact(*f)

    while True:
        start, steps = chain(rng, mix)
        prompt = write_prompt(start, steps)
        if purpose_of(prompt) == "train":
            break
    style = rng.choices(list(STYLES), [weights[phase] for weights in STYLES.values()])[0]
    return prompt, style(rng, running_values(start, steps, believed))


def batch(traces: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
    """Token ids (B, T) and labels (B, T - P), P the prompt's tokens: the response with its end, then -100."""
    import torch

    rows = [[*encode(prompt), *tokens(response), ID["<eos>"]] for prompt, response in traces]
    width = max(map(len, rows))
    # No attention mask: padding stands on the right, where a causal model does not look.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])[:, PROMPT_TOKENS:]
    return ids, labels


def tokens(response: str) -> list[int]:
    return [ID[symbol] for symbol in re.findall(r"<a>|</a>|.", response)]


def new_model(options: ModelOptions) -> Any:
    """GPT-2 with learned absolute positions, just long enough, random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=len(SYMBOLS), n_positions=PROMPT_TOKENS + MAX_NEW_TOKENS, n_embd=options.d, n_layer=options.layers,
            n_head=options.heads, initializer_range=INIT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=ID["<bos>"], eos_token_id=ID["<eos>"], pad_token_id=ID["<pad>"]))


def warm_start(mix: Mix, options: ModelOptions, folder: Path, progress: Progress) -> None:
    """Train and write the start model. The same arguments give the same bytes (same machine and torch)."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums do not depend on the number of cores, and a model this small is no slower
    try:
        model = train(mix, options, progress)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)


def train(mix: Mix, options: ModelOptions, progress: Progress) -> Any:
    import torch
    from torch.nn.functional import cross_entropy

    rng = random.Random(f"chain warm start {options.seed}")
    wrong = wrong_table(rng, options.wrong_facts)
    model = new_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        phase = int(step >= options.first_phase * options.steps)
        ids, labels = batch([trace(rng, mix, phase, wrong, options.stays_wrong) for _ in range(options.batch)])
        logits = model(input_ids=ids).logits[:, PROMPT_TOKENS - 1:-1]  # (B, T - P, V): each predicts the next token
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress("warm start", step + 1, options.steps, loss=float(loss.detach()))
    return model
