"""What every rollout engine must do, as one executable check. `check(engine, model)` raises AssertionError naming
what is broken; it serves the tests, and anyone who writes or installs another engine.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import RolloutEngine, Rollouts, stream_key


def check(engine: RolloutEngine, model: nn.Module, tolerance: float = 1e-4) -> None:
    """`engine` must hold `model`'s weights. `model` is changed, then changed back, to see whether new weights arrive."""
    V = model.config.vocab_size
    eos, pad = 1, 0
    prompts = [[2, 3, 4], [5, 6, 7, 8, 2], [3, 3]]
    keys = [stream_key(i) for i in range(len(prompts))]
    arguments = {"max_new_tokens": 6, "eos_id": eos, "pad_id": pad}

    for temperature in (1.0, 0.7):
        drawn = engine.generate(prompts, 4, temperature=temperature, keys=keys, **arguments)
        _well_formed(drawn, len(prompts) * 4, V, 6, eos, pad)
        _log_probs_are_the_models(drawn, [p for p in prompts for _ in range(4)], model, temperature, tolerance)
        _same(drawn, engine.generate(prompts, 4, temperature=temperature, keys=keys, **arguments), "a repeated call")

    alone = engine.generate([prompts[1]], 2, temperature=0.7, keys=[keys[1]], **arguments)
    for j in range(2):
        a, b = alone.tokens[j, :alone.length[j]], drawn.tokens[4 + j, :drawn.length[4 + j]]
        assert a.equal(b), f"a row depends on its batch: {a.tolist()} alone, {b.tolist()} among others"
    later = engine.generate(prompts, 2, temperature=0.7, keys=keys, first=2, **arguments)
    for i, j in ((i, j) for i in range(len(prompts)) for j in range(2)):
        a, b = later.tokens[2 * i + j, :later.length[2 * i + j]], drawn.tokens[4 * i + 2 + j, :drawn.length[4 * i + 2 + j]]
        assert a.equal(b), f"sample {2 + j} is another one when the first two are not asked for: {a.tolist()}, {b.tolist()} with them"
    others = engine.generate(prompts, 4, temperature=1.0, keys=[k + 1 for k in keys], **arguments)
    assert not others.tokens.equal(engine.generate(prompts, 4, temperature=1.0, keys=keys, **arguments).tokens), \
        "other keys gave the same completions"

    greedy = engine.generate(prompts, 1, temperature=0.0, keys=keys, **arguments)
    _log_probs_are_the_models(greedy, prompts, model, 1.0, tolerance, most_likely=True)

    _new_weights_arrive(engine, model, prompts, keys, arguments, tolerance)
    engine.rest()
    engine.load_weights(model)
    again = engine.generate(prompts, 4, temperature=0.7, keys=keys, **arguments)
    _same(drawn, again, "a call after other weights, and a rest,")


def _well_formed(r: Rollouts, N: int, V: int, T: int, eos: int, pad: int) -> None:
    assert r.tokens.shape == r.logp.shape and r.tokens.shape[0] == N and r.tokens.shape[1] == r.length.max() <= T, \
        f"shapes: tokens {tuple(r.tokens.shape)}, logp {tuple(r.logp.shape)}, longest {int(r.length.max())}, {N} rows wanted"
    assert r.tokens.dtype == r.length.dtype == torch.int64 and r.logp.dtype == torch.float32 and r.truncated.dtype == torch.bool
    assert bool((r.length >= 1).all()) and bool(((r.tokens >= 0) & (r.tokens < V)).all())
    assert bool((r.tokens[~r.mask] == pad).all()) and bool((r.logp[~r.mask] == 0).all()), "padding is not pad_id and 0"
    last = r.tokens.gather(1, r.length[:, None] - 1).squeeze(1)
    assert (last == eos).equal(~r.truncated) and bool((r.length[r.truncated] == T).all()), "truncated is not 'no end token'"
    assert int(((r.tokens == eos) & r.mask).sum()) == int((~r.truncated).sum()), "a completion goes on after its end token"


def _log_probs_are_the_models(r: Rollouts, prompts: list[list[int]], model: nn.Module, temperature: float,
                              tolerance: float, most_likely: bool = False) -> None:
    for i, prompt in enumerate(prompts):
        y = r.tokens[i, :r.length[i]]
        scores = _plain_log_probs(model, prompt, y, temperature)
        gap = float((scores.gather(1, y[:, None]).squeeze(1) - r.logp[i, :len(y)]).abs().max())
        assert gap <= tolerance, f"row {i}: log-probs differ from the model's by {gap:.2g} (temperature {temperature:g})"
        if most_likely:
            assert y.equal(scores.argmax(1)), f"row {i}: greedy gave {y.tolist()}, the model prefers {scores.argmax(1).tolist()}"


@torch.no_grad()
def _plain_log_probs(model: nn.Module, prompt: list[int], y: Tensor, temperature: float) -> Tensor:
    """(T, V): one plain forward over prompt and completion, without cache or padding."""
    x = torch.cat([torch.tensor(prompt), y])[None].to(model.device)
    return torch.log_softmax(model(input_ids=x).logits[0, len(prompt) - 1:-1].float().cpu() / temperature, -1)


def _same(a: Rollouts, b: Rollouts, what: str) -> None:
    assert a.tokens.equal(b.tokens) and a.logp.equal(b.logp) and a.length.equal(b.length), f"{what} gave other rollouts"


def _new_weights_arrive(engine: RolloutEngine, model: nn.Module, prompts: list[list[int]], keys: list[int],
                        arguments: dict[str, int], tolerance: float) -> None:
    """Stale weights are the classic silent failure of a sampler that keeps its own copy."""
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(before.flip(0))
    try:
        engine.load_weights(model)
        changed = engine.generate(prompts, 2, temperature=1.0, keys=keys, **arguments)
        _log_probs_are_the_models(changed, [p for p in prompts for _ in range(2)], model, 1.0, tolerance)
    finally:
        with torch.no_grad():
            weight.copy_(before)
        engine.load_weights(model)
