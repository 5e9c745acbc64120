"""What the linear layers returned while the model sampled, kept for the update that follows.

The first update of a step runs the policy forward over tokens that the same weights have just produced one by one. So the
product of every linear layer in it is known: `Recorder` keeps them while decoding, `Recall.replay` hands them to a forward
over the same tokens, which is left with attention and elementwise arithmetic. Its gradients are those of the plain
forward; values differ by rounding, since the products were made for fewer rows at a time.

Memory: the outputs of all linear layers but the head. Autograd keeps most of them anyway, and shares them.

Not covered: layers that are not `nn.Linear` (GPT-2's) and those that are not called exactly once per token (experts);
they are computed as usual. Whoever replays must see to it that the weights have not changed since.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

LIMIT = 1 << 30  # bytes; of a batch that would need more, nothing is kept


@dataclass(frozen=True)
class Recall:
    """Outputs for prompts of up to P tokens, and for completions of up to C tokens without their last, which is not fed."""

    outputs: dict[nn.Parameter, Tensor]  # weight of a layer -> (prompts * P + completions * C, size); prompts padded on the left
    shape: tuple[int, int, int]          # recorded prompts, P, C
    groups: Tensor                       # (G,) which of the recorded prompts a group has
    rows: Tensor                         # (B,) which of the recorded completions a row is

    def take(self, groups: Tensor, rows: Tensor) -> Recall:
        """For a batch of these groups and rows of the present one (bool or indices)."""
        return replace(self, groups=self.groups[groups], rows=self.rows[rows])

    @contextmanager
    def replay(self, groups: Tensor, prompt_length: Sequence[int], rows: Tensor, length: Tensor) -> Iterator[None]:
        """Inside, a forward over one row of tokens - the prompts of `groups`, one after another, then the completions
        `rows` without their last tokens - finds its products made."""
        G, P, C = self.shape
        prompts = [torch.arange(P - n, P) + P * g for g, n in zip(self.groups[groups].tolist(), prompt_length, strict=True)]
        column = torch.arange(C)
        completions = (G * P + C * self.rows[rows, None] + column)[column < length[:, None] - 1]
        with _Replay(self.outputs, torch.cat([*prompts, completions])):
            yield


class _Replay(TorchFunctionMode):
    def __init__(self, outputs: dict[nn.Parameter, Tensor], at: Tensor):
        super().__init__()
        self.outputs, self.tokens, first = outputs, len(at), int(at[0])
        whole = at.equal(torch.arange(first, first + len(at)))  # no padding, nothing left out: a view will do
        self.at = slice(first, first + len(at)) if whole else at

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is linear and args[1] in self.outputs and args[0].shape[:-1] == (1, self.tokens):
            x, weight, bias = args
            return _Known.apply(x, weight, bias, self.outputs[weight][self.at][None])
        return function(*args, **(kwargs or {}))


class _Known(torch.autograd.Function):
    """x W^T + b, whose value is known: only the gradients are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return known

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        g = gradient.flatten(0, -2)
        return ((g @ weight).view_as(x) if for_x else None, g.T @ x.flatten(0, -2) if for_weight else None,
                g.sum(0) if for_bias else None, None)


class Recorder:
    """Keeps what the linear layers of `model` return for G prompts of P tokens and N completions of C tokens at most."""

    def __init__(self, model: nn.Module, G: int, P: int, N: int, C: int):
        head = model.get_output_embeddings()
        self.layers = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
        self.shape, self.N = (G, P, C), N
        self.outputs: dict[nn.Parameter, Tensor] = {}
        self._place: tuple[Tensor | None, int] = None, 0
        self._called: set[nn.Parameter] = set()

    @property
    def bytes(self) -> int:
        (G, P, C), N = self.shape, self.N
        return (G * P + N * C) * sum(m.out_features * m.weight.element_size() for m in self.layers)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, every forward is over the prompts, at first, and then over what `decode` says."""
        (G, P, C), N = self.shape, self.N
        with torch.inference_mode(False):  # inference tensors could not be kept for a backward
            self.outputs = {m.weight: torch.empty(G * P + N * C, m.out_features, dtype=m.weight.dtype, device=m.weight.device)
                            for m in self.layers}
        hooks = [m.register_forward_hook(self._keep) for m in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def decode(self, rows: Tensor, t: int) -> None:
        """The next forward is over token t of these rows."""
        self._forget_uncalled()
        self._place = rows, t

    def recall(self) -> Recall | None:
        self._forget_uncalled()
        if not self.outputs:
            return None
        return Recall(self.outputs, self.shape, torch.arange(self.shape[0]), torch.arange(self.N))

    def _keep(self, layer: nn.Linear, args: Any, output: Tensor) -> None:
        kept, (G, P, C), (rows, t) = self.outputs.get(layer.weight), self.shape, self._place
        if kept is None:
            return
        expected = (G, P) if rows is None else (len(rows), 1)
        if output.shape[:-1] != expected or layer.weight in self._called:
            del self.outputs[layer.weight]
        elif rows is None:
            kept[:G * P] = output.flatten(0, 1)
        else:
            place = kept[G * P:].unflatten(0, (self.N, C))[:, t]
            if len(rows) == self.N:
                place.copy_(output[:, 0])
            else:
                place.index_copy_(0, rows, output[:, 0])
        self._called.add(layer.weight)

    def _forget_uncalled(self) -> None:
        for weight in self.outputs.keys() - self._called:
            del self.outputs[weight]
        self._called.clear()
