"""Log-probs of sampled tokens, and entropies, from logits or from what the output head is about to make logits of.

`from_logits` keeps all logits: fast where there are few. `Head` never holds more than `AT_ONCE` of them: it computes the
logits of some rows at a time, keeps one number a row, and computes them again in its backward. So what the loss costs does
not grow with tokens x vocabulary. One more product with the head, 2 of 8 in its share of the work, is the price.

U rows of hidden states, D wide; V symbols; M sampled tokens, token m from row source[m]: several may come from one row.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 1 << 27   # logits; 512 MiB in float32. Fewer would add up the weight's gradient in too many pieces
LARGE = 4096        # symbols; with fewer, a microbatch hardly ever has more logits than that


def from_logits(logits: Tensor, source: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """log p (M,) and entropies in nats (U,), if asked for, from logits (U, V)."""
    return LogProb.apply(logits, source, target), entropies(logits) if entropy else None


class LogProb(torch.autograd.Function):
    """log softmax(logits[source])[target] (M,): keeps the logits it was given and nothing else of their size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
        normalizer = torch.logsumexp(wide(logits), -1)
        ctx.save_for_backward(logits, normalizer, source, target)
        return wide(logits[source, target]) - normalizer[source]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # d log p_target / d logits = onehot(target) - softmax
        logits, normalizer, source, target = ctx.saved_tensors
        per_row = torch.zeros_like(normalizer).index_add_(0, source, gradient)
        out = (wide(logits) - normalizer[:, None]).exp_().mul_(-per_row[:, None])
        out.index_put_((source, target), gradient, accumulate=True)
        return out.to(logits.dtype), None, None


def entropies(logits: Tensor) -> Tensor:
    """(U,) nats, differentiable."""
    logp = torch.log_softmax(wide(logits), -1)
    return -(logp.exp() * logp).sum(-1)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Form:
    """How a model makes logits z of its head's products r: z = cap tanh(scale r / cap), or scale r without a cap."""

    scale: float = 1.0
    cap: float | None = None


class Head(nn.Module):
    """The head of a causal LM, giving log-probs instead of logits. It shares the model's parameters.

    A module of its own, so that ZeRO-3 gathers the weight around its forward and its backward, once each.
    """

    def __init__(self, linear: nn.Linear, form: Form):
        super().__init__()
        self.weight, self.bias, self.form = linear.weight, linear.bias, form

    def forward(self, hidden: Tensor, source: Tensor, target: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
        """(log p (M,),) or (log p (M,), entropies in nats (U,)) from hidden states (U, D)."""
        return HeadLogProb.apply(hidden, self.weight, self.bias, source, target, self.form, temperature, entropy)


class HeadLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor, target: Tensor,
                form: Form, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
        number = torch.promote_types(hidden.dtype, torch.float32)
        logp, normalizer = hidden.new_empty(len(source), dtype=number), hidden.new_empty(len(hidden), dtype=number)
        H = torch.empty_like(normalizer) if entropy else None
        for rows, tokens in pieces(source, len(hidden), len(weight)):
            z = logits(hidden[rows], weight, bias, form, temperature)
            n = normalizer[rows] = torch.logsumexp(z, -1)
            local = source[tokens] - rows.start
            logp[tokens] = z[local, target[tokens]] - n[local]
            if H is not None:
                z -= n[:, None]
                H[rows] = -z.exp().mul_(z).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, source, target, normalizer, H)
        ctx.form, ctx.temperature = form, temperature
        return (logp,) if H is None else (logp, H)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_H: Tensor | None = None) -> tuple[Tensor | None, ...]:
        # With p = softmax(z):  d log p_target / dz = onehot(target) - p,   dH / dz = -p (log p + H)
        hidden, weight, bias, source, target, normalizer, H = ctx.saved_tensors
        form, temperature = ctx.form, ctx.temperature
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        per_row = torch.zeros_like(normalizer).index_add_(0, source, g)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=g.dtype) if need_weight else None  # bfloat16 would lose the later pieces
        d_bias = torch.zeros_like(bias, dtype=g.dtype) if need_bias else None
        for rows, tokens in pieces(source, len(hidden), len(weight)):
            z = logits(hidden[rows], weight, bias, form, temperature)
            slope = None if form.cap is None else 1 - (z * (temperature / form.cap)) ** 2   # tanh' = 1 - tanh^2
            z -= normalizer[rows, None]
            p = z.exp()
            if H is None:
                d = p.mul_(-per_row[rows, None])
            else:
                d = z.add_(H[rows, None]).mul_(g_H[rows, None]).add_(per_row[rows, None]).mul_(p).neg_()
            d.index_put_((source[tokens] - rows.start, target[tokens]), g[tokens], accumulate=True)
            d = d if slope is None else d.mul_(slope)
            d = d.mul_(form.scale / temperature).to(hidden.dtype)
            del z, p, slope
            if d_hidden is not None:
                torch.mm(d, weight, out=d_hidden[rows])
            if d_weight is not None:
                if d.dtype == d_weight.dtype:
                    d_weight.addmm_(d.t(), hidden[rows])
                else:
                    d_weight += d.t() @ hidden[rows]
            if d_bias is not None:
                d_bias += d.sum(0, dtype=g.dtype)
        return (d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None if d_bias is None else d_bias.to(bias.dtype),
                None, None, None, None, None)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Form, temperature: float) -> Tensor:
    """(rows, V) at least float32, over the temperature. For use without autograd: it writes in place."""
    z = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
    z = wide(z)
    if form.scale != 1:
        z *= form.scale
    if form.cap is not None:
        z.div_(form.cap).tanh_().mul_(form.cap)
    return z if temperature == 1 else z.div_(temperature)


def pieces(source: Tensor, rows: int, vocabulary: int) -> list[tuple[slice, Tensor]]:
    """Rows in pieces of at most AT_ONCE logits, each with the (m,) indices of the tokens that come from them."""
    size = max(1, AT_ONCE // vocabulary)
    order = source.argsort(stable=True)
    starts = torch.arange(0, rows + size, size, device=source.device)
    edges = torch.searchsorted(source[order], starts).tolist()
    return [(slice(a, min(a + size, rows)), order[i:j]) for a, i, j in zip(range(0, rows, size), edges, edges[1:])]


def find_head(model: nn.Module) -> Head | None:
    """The model's head, if a linear layer of its last hidden states is all it is, up to scale and cap; else None, and says so.

    Whether that is so is asked of the model itself. Not asked with a small vocabulary, where nothing is to be gained.
    """
    linear, base = model.get_output_embeddings(), getattr(model, "base_model", model)
    if not isinstance(linear, nn.Linear) or base is model or len(linear.weight) < LARGE:
        return None
    config = model.config.get_text_config()
    form = Form(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1),
                getattr(config, "final_logit_softcapping", None))
    x = torch.arange(1, 5, device=linear.weight.device)[None]
    with torch.no_grad():
        wanted = model(input_ids=x, use_cache=False).logits[0].float()
        hidden = getattr(base(input_ids=x, use_cache=False), "last_hidden_state", torch.empty(1, 0, 0))[0]
        alike = hidden.shape[-1] == linear.in_features and torch.allclose(
            logits(hidden, linear.weight, linear.bias, form, 1.0), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    if not alike:
        print(f"{type(model).__name__}: logits are more than a linear layer of the last hidden states; so those of a whole microbatch "
              "are held at once. With train.microbatch_tokens they take less memory.", flush=True)
        return None
    return Head(linear, form)


def peak_bytes(tokens: int, vocabulary: int, hidden: int, itemsize: int = 2) -> dict[str, int]:
    """What the loss allocates at its worst moment, its backward, beyond hidden states and head: the rows' logits and
    their softmax in float32 and their gradient in the model's own type; the weight's gradient, summed in float32 and then
    converted; the hidden states' gradient. `itemsize` of the model's type."""
    piece = min(tokens, max(1, AT_ONCE // vocabulary)) * vocabulary
    converted = vocabulary * hidden * itemsize if itemsize < 4 else 0
    return {"logits": piece * (4 + 4) + (piece * itemsize if itemsize < 4 else 0), "weight gradient": vocabulary * hidden * 4 + converted,
            "hidden gradient": tokens * hidden * itemsize}
