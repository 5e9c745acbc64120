"""The contract of an algorithm as properties. Seeds meet CHECKS as tests, candidates as a gate before any training.

    fields, shapes, finite values       padding ignored, rows permuted, microbatches add up
    no side effects, deterministic      right completions gain on wrong ones, equal rewards teach nothing

Not checked: whether the algorithm is any good, nor whether it does what its proposal says (`response_report` gives evidence).
"""
from __future__ import annotations

import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..types import CandidateError
from . import gate, specimens
from .base import NEEDS, Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from .load import load
from .ops import token_weights
from .specimens import KINDS, policy_batch, random_advantage, rollouts, rows

STATE_CHARS = 20_000  # of the state as JSON: it goes into every checkpoint and record
INPUTS = ("reward", "components", "valid", "truncated", "group", "length", "logp_old", "logp_rollout", "logp_ref", "entropy", "progress", "step")


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Algorithm, int], None]  # of the algorithm and a seed; raises Failed


@dataclass(frozen=True)
class CheckResult:
    name: str
    passed: bool
    message: str    # "" when passed
    seconds: float


class Failed(Exception):
    """What is wrong, what was wanted."""


def run_checks(algorithm: Algorithm, seed: int = 0, clock: Callable[[], float] = time.perf_counter,
               checks: Sequence[Check] | None = None) -> list[CheckResult]:
    """Every check's result, in order; only the first one's if the declarations are wrong."""
    results: list[CheckResult] = []
    for check in CHECKS if checks is None else checks:
        start, message = clock(), ""
        try:
            check.run(algorithm, seed)
        except Failed as failed:
            message = str(failed)
        except Exception as error:  # the candidate's own: nothing else runs in here
            message = _explain(error)
        results.append(CheckResult(check.name, not message, message, round(clock() - start, 4)))
        if check is DECLARATIONS and message:
            break
    return results


def run(job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    """The check job: gate, import, CHECKS, response. Results are in checks.json whatever comes out."""
    from ..worker import progress

    payload: dict[str, Any] = {"checks": [], "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    package = Path(job["package"])
    try:
        if found := gate.check_package(package):
            raise CandidateError("gate", "\n".join(map(str, found)))
        algorithm = load(package)
    except CandidateError as error:
        payload["checks"] = [asdict(CheckResult(error.cause, False, error.message, 0.0))]
        files.write_json(attempt_dir / "checks.json", payload)
        raise
    for number, check in enumerate(CHECKS):
        progress("check", number, len(CHECKS), name=check.name)
        payload["checks"] += map(asdict, run_checks(algorithm, checks=[check]))
        if check is DECLARATIONS and not payload["checks"][-1]["passed"]:
            break
    failing = [f"{c['name']}: {c['message']}" for c in payload["checks"] if not c["passed"]]
    if not failing:
        payload["response"] = response_report(algorithm)
    files.write_json(attempt_dir / "checks.json", payload)
    if failing:
        raise CandidateError("check-failed", "\n".join(failing))
    return payload


def _explain(error: Exception) -> str:
    """The exception, and the innermost lines that led to it from the candidate's code on."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__][-6:]
    return "\n".join([f"raised {type(error).__name__}: {error}", *(f"  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames)])


# -- calls -------------------------------------------------------------------------------------------------------------

def advantages(algorithm: Algorithm, r: RolloutBatch, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A (N, T), 0 at padding, and keep (N,) with `select` in it; Failed if they are no such thing."""
    chosen = algorithm.select(r, state)
    if chosen is not None:
        _wanted(chosen, "select", (r.groups,), torch.bool)
    result = algorithm.advantages(r, state)
    if not isinstance(result, Advantages):
        raise Failed(f"advantages returned {type(result).__name__}; Advantages was wanted")
    N, T = r.mask.shape
    value, keep = result.value, result.keep
    _wanted(value, "advantages: value", (N,) if isinstance(value, Tensor) and value.dim() == 1 else (N, T))
    if not value.is_floating_point():
        raise Failed(f"advantages: value is of {value.dtype}; floating point was wanted")
    if value.requires_grad:
        raise Failed("advantages: value carries a gradient; it must be a constant")
    if keep is None:
        keep = torch.ones(N, dtype=torch.bool)
    _wanted(keep, "advantages: keep", (N,), torch.bool)
    if chosen is not None:
        keep = keep & chosen[r.group]
    value = value[:, None].expand(N, T) if value.dim() == 1 else value
    _finite(value[r.mask & keep[:, None]], "advantages")
    return torch.where(r.mask & keep[:, None], value.float(), 0.0), keep


@dataclass(frozen=True)
class Loss:
    """token_loss and its derivatives, each row weighted alike; 0 at padding."""

    value: Tensor   # (B, T)
    logp: Tensor    # (B, T) d sum / d logp
    entropy: Tensor # (B, T) d sum / d entropy


def loss(algorithm: Algorithm, batch: PolicyBatch, state: dict[str, Any], weight: Tensor | None = None) -> Loss:
    """The loss and the derivative of sum(weight (B, T) * loss); Failed if they are no such thing."""
    leaves = [x.detach().clone().requires_grad_() for x in (batch.logp, batch.entropy) if x is not None]
    inner = [leaf.clone() for leaf in leaves]
    value = algorithm.token_loss(replace(batch, logp=inner[0], entropy=inner[1] if len(inner) > 1 else None), state)
    _wanted(value, "token_loss", tuple(batch.mask.shape))
    _finite(value.detach()[batch.mask], "token_loss")
    if not value.requires_grad:
        raise Failed("token_loss returned a constant; it must be computed from batch.logp")
    live = torch.where(batch.mask, value, 0.0)
    total = (live if weight is None else live * weight).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if d is None else torch.where(batch.mask, d, 0.0) for d, leaf in zip(found, leaves, strict=True)]
    for d in gradients:
        _finite(d, "the gradient of token_loss")
    return Loss(live.detach(), gradients[0], gradients[-1] if len(gradients) > 1 else torch.zeros_like(gradients[0]))


def _wanted(value: Any, what: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if not isinstance(value, Tensor):
        raise Failed(f"{what} is of type {type(value).__name__}; a tensor of shape {shape} was wanted")
    if tuple(value.shape) != shape:
        raise Failed(f"{what} has shape {tuple(value.shape)}; {shape} was wanted")
    if dtype is not None and value.dtype != dtype:
        raise Failed(f"{what} is of {value.dtype}; {dtype} was wanted")


def _finite(value: Tensor, what: str) -> None:
    if bad := int((~torch.isfinite(value)).sum()):
        raise Failed(f"{what}: {bad} of {value.numel()} values are NaN or infinite")


def _same(a: Tensor, b: Tensor, what: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    if not torch.allclose(a.float(), b.float(), rtol=rtol, atol=atol):
        raise Failed(f"{what}: differs by up to {float((a.float() - b.float()).abs().max()):.3g}")


def _on(kind: str, call: Callable[[], Any]) -> None:
    """Says on which batch a check failed."""
    try:
        call()
    except Failed as failed:
        raise Failed(f"on the batch {kind!r}: {failed}") from None


# -- the properties ----------------------------------------------------------------------------------------------------

def declarations(algorithm: Algorithm, seed: int) -> None:
    kind = type(algorithm)
    if not is_dataclass(algorithm) or "__dataclass_params__" not in vars(kind) or not vars(kind)["__dataclass_params__"].frozen:
        raise Failed(f"{kind.__name__} is no frozen dataclass; write @dataclass(frozen=True) above the class")
    try:
        files.dumps(asdict(algorithm))
    except (TypeError, ValueError) as error:
        raise Failed(f"hyperparameters must be plain finite JSON data ({error})") from None
    if not isinstance(algorithm.needs, frozenset) or not algorithm.needs <= NEEDS:
        raise Failed(f"needs is {algorithm.needs!r}; a frozenset of {', '.join(sorted(NEEDS))} was wanted")
    if not isinstance(algorithm.reduction, Reduction):
        raise Failed(f"reduction is {algorithm.reduction!r}; one of Reduction.{', Reduction.'.join(Reduction.__members__)} was wanted")
    if not isinstance(algorithm.zero_advantage_zero_loss, bool):
        raise Failed(f"zero_advantage_zero_loss is {algorithm.zero_advantage_zero_loss!r}; True or False was wanted")
    _mechanisms_declared(algorithm)


def _mechanisms_declared(algorithm: Algorithm) -> None:
    if not isinstance(algorithm.mechanisms, tuple) or not all(isinstance(m, Mechanism) for m in algorithm.mechanisms):
        raise Failed(f"mechanisms is {algorithm.mechanisms!r}; a tuple of Mechanism was wanted")
    names = [m.name for m in algorithm.mechanisms]
    if len(set(names)) < len(names):
        raise Failed(f"mechanisms have the names {names}; each name may stand once")
    known = {f.name for f in fields(algorithm)}
    for m in algorithm.mechanisms:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", m.name):
            raise Failed(f"mechanism {m.name!r}: a name of lower-case letters, digits and - was wanted")
        if unknown := sorted(set(m.off) - known):
            raise Failed(f"mechanism {m.name}: `off` sets {', '.join(unknown)}; the hyperparameters are {', '.join(sorted(known)) or 'none'}")


def shapes(algorithm: Algorithm, seed: int) -> None:
    """Shapes, types and finite values on every kind of batch, near the old policy and far from it."""
    for kind in KINDS:
        _on(kind, lambda: _whole_step(algorithm, rollouts(algorithm, kind, seed), seed))


def _whole_step(algorithm: Algorithm, r: RolloutBatch, seed: int) -> None:
    state = algorithm.initial_state()
    A, _ = advantages(algorithm, r, state)
    for drift in (0.0, 0.3, 20.0):
        try:
            loss(algorithm, policy_batch(r, A, drift, seed), state)
            loss(algorithm, policy_batch(r, random_advantage(r, seed), drift, seed), state)
        except Failed as failed:
            raise Failed(f"with log-ratios up to {drift:g}: {failed}") from None


def state_is_plain(algorithm: Algorithm, seed: int) -> None:
    """Survives a checkpoint, stays small, and does not depend on whether a checkpoint came between."""
    state: Any = algorithm.initial_state()
    for step in range(12):
        if not isinstance(state, dict):
            raise Failed(f"initial_state returned {type(state).__name__}; a dict was wanted")
        try:
            text = files.dumps(state)
        except (TypeError, ValueError) as error:
            raise Failed(f"after {step} steps the state is no plain finite JSON data ({error}); use float(x), int(x), lists and dicts") from None
        if len(text) > STATE_CHARS:
            raise Failed(f"after {step} steps the state has {len(text)} characters as JSON; at most {STATE_CHARS} were wanted")
        state = files.json.loads(text)
        _on(f"step {step} from a restored state", lambda: advantages(algorithm, rollouts(algorithm, "mixed", seed, step), state))


def no_side_effects(algorithm: Algorithm, seed: int) -> None:
    r, state = rollouts(algorithm, seed=seed), algorithm.initial_state()
    given = specimens.copy(r)
    algorithm.select(given, state)
    algorithm.advantages(given, state)
    _untouched("advantages", r, given)
    batch = policy_batch(r, random_advantage(r, seed), seed=seed)
    given, before = specimens.copy(batch), deepcopy(state)
    algorithm.token_loss(given, state)
    _untouched("token_loss", batch, given)
    if state != before:
        raise Failed("token_loss changed the state; only advantages may: it runs once a step, token_loss once a microbatch")


def _untouched(what: str, before: RolloutBatch | PolicyBatch, after: RolloutBatch | PolicyBatch) -> None:
    now = dict(specimens.tensors(after))
    changed = [name for name, x in specimens.tensors(before) if name not in now or not torch.equal(x, now[name])]
    if changed or len(now) != len(list(specimens.tensors(before))):
        raise Failed(f"{what} wrote into its input: {', '.join(changed) or 'components'}; use operations that make new tensors")


def deterministic(algorithm: Algorithm, seed: int) -> None:
    r, state = rollouts(algorithm, "continuous", seed), algorithm.initial_state()
    first, second = deepcopy(state), deepcopy(state)
    (A, keep), (B, kept) = advantages(algorithm, r, first), advantages(algorithm, r, second)
    if not torch.equal(A, B) or not torch.equal(keep, kept) or first != second:
        raise Failed("advantages gave two answers to the same question; draw no random numbers, keep nothing but the state")
    batch = policy_batch(r, random_advantage(r, seed), seed=seed)
    if not torch.equal(loss(algorithm, batch, first).value, loss(algorithm, batch, first).value):
        raise Failed("token_loss gave two answers to the same question; draw no random numbers, keep nothing")


def padding_is_ignored(algorithm: Algorithm, seed: int) -> None:
    r = rollouts(algorithm, seed=seed)
    first, second = algorithm.initial_state(), algorithm.initial_state()
    (A, keep), (B, kept) = advantages(algorithm, r, first), advantages(algorithm, specimens.garbage_padding(r, seed), second)
    _same(A, B, "advantages depend on padded positions")
    _same(keep, kept, "keep depends on padded positions")
    batch = policy_batch(r, random_advantage(r, seed), seed=seed)
    a, b = loss(algorithm, batch, first), loss(algorithm, specimens.garbage_padding(batch, seed), first)
    _same(a.value, b.value, "token_loss depends on padded positions")
    _same(a.logp, b.logp, "the gradient of token_loss depends on padded positions")
    _same(a.entropy, b.entropy, "the gradient of token_loss depends on padded positions")


def order_is_ignored(algorithm: Algorithm, seed: int) -> None:
    """Completions in another order, groups under other numbers: the same advantages, the same loss."""
    r = rollouts(algorithm, "continuous", seed)
    g = torch.Generator().manual_seed(seed)
    order, number = torch.randperm(len(r.group), generator=g), torch.randperm(r.groups, generator=g)
    shuffled = rows(r, order)
    state = algorithm.initial_state()
    A, keep = advantages(algorithm, r, state)
    B, kept = advantages(algorithm, replace(shuffled, group=number[shuffled.group]), algorithm.initial_state())
    _same(A[order], B, "advantages depend on the order of the completions", rtol=1e-3, atol=1e-4)
    _same(keep[order], kept, "keep depends on the order of the completions")
    batch = policy_batch(r, random_advantage(r, seed), seed=seed)
    _same(loss(algorithm, batch, state).value[order], loss(algorithm, rows(batch, order), state).value,
          "token_loss depends on the order of the completions")


def microbatches_add_up(algorithm: Algorithm, seed: int) -> None:
    """sum(m l) / Z and its gradient are those of the whole batch if it comes in three parts, each padded to its own width."""
    r, state = rollouts(algorithm, seed=seed), algorithm.initial_state()
    A, keep = advantages(algorithm, r, state)
    batch = policy_batch(r, torch.where(keep[:, None], random_advantage(r, seed), A), seed=seed)
    whole, _ = _weighted(algorithm, batch, keep, state)
    parts = [rows(batch, i) for i in torch.arange(len(keep)).split([1, 10, len(keep) - 11])]
    found, z = zip(*(_weighted(algorithm, specimens.trimmed(p), k, state) for p, k in zip(parts, keep.split([1, 10, len(keep) - 11]), strict=True)), strict=True)
    Z = token_weights(algorithm.reduction, batch.mask, batch.length, keep, batch.max_length)[1]
    _same(torch.stack(z).sum(), Z, "Z of the parts does not add up")
    for what in ("value", "logp", "entropy"):
        together = torch.cat([torch.nn.functional.pad(getattr(f, what), (0, batch.mask.shape[1] - f.value.shape[1])) for f in found])
        _same(getattr(whole, what), together, f"token_loss ({what}) depends on how the batch is split; no mean, sum or maximum over the microbatch",
              atol=1e-5)


def _weighted(algorithm: Algorithm, batch: PolicyBatch, keep: Tensor, state: dict[str, Any]) -> tuple[Loss, Tensor]:
    m, z = token_weights(algorithm.reduction, batch.mask, batch.length, keep, batch.max_length)
    found = loss(algorithm, batch, state, m)
    return replace(found, value=found.value * m), z


def right_completions_gain(algorithm: Algorithm, seed: int) -> None:
    """A gradient step raises the log-probability of right completions over that of wrong ones of the same prompt."""
    for step in (0, 5):
        r, state = specimens.contest(algorithm, step), algorithm.initial_state()
        A, keep = advantages(algorithm, r, state)
        m, Z = token_weights(algorithm.reduction, r.mask, r.length, keep, r.max_length)
        if not keep.any():
            raise Failed("nothing is kept of groups with right and wrong completions: it cannot learn")
        gain = -loss(algorithm, policy_batch(r, A, drift=0.0), state, m / Z).logp.sum(1)
        right = r.components["correct"] > 0
        difference = float((gain[right & keep].sum() / (right & keep).sum().clamp(min=1)) - (gain[~right & keep].sum() / (~right & keep).sum().clamp(min=1)))
        if difference <= 0:
            raise Failed(f"at progress {r.progress:g} a step moves right completions by {difference:.3g} against wrong ones; more than 0 was wanted"
                         + (". Is the loss to be minimized, and computed from batch.advantage?" if difference < 0 else ""))


def equal_rewards_teach_nothing(algorithm: Algorithm, seed: int) -> None:
    """Also where the reward, such as 0.1, has a mean that rounds: a small std_floor makes an advantage of the rounding error."""
    if not algorithm.zero_advantage_zero_loss:
        return
    r = rollouts(algorithm, "equal", seed)
    for reward in (0.0, 0.1, 1.0, 1.1):
        A, _ = advantages(algorithm, replace(r, reward=torch.full_like(r.reward, reward)), algorithm.initial_state())
        if float(A.abs().max()) > 1e-6:
            raise Failed(f"completions alike in everything, all with reward {reward:g}, have advantages up to {float(A.abs().max()):.3g}; 0 was wanted. "
                         "Use ops.group_mean; if they are meant to teach, set zero_advantage_zero_loss = False")


def zero_advantage_zero_loss(algorithm: Algorithm, seed: int) -> None:
    if not algorithm.zero_advantage_zero_loss:
        return
    r, state = rollouts(algorithm, seed=seed), algorithm.initial_state()
    advantages(algorithm, r, state)
    zero = (torch.arange(len(r.group)) % 2 == 0)[:, None]
    for drift in (0.0, 0.3, 20.0):
        found = loss(algorithm, policy_batch(r, torch.where(zero, 0.0, random_advantage(r, seed)), drift, seed), state)
        for what, x in (("loss", found.value), ("gradient", found.logp), ("gradient", found.entropy)):
            if (x * zero).any():
                raise Failed(f"where A is 0 the {what} is up to {float((x * zero).abs().max()):.3g}, but zero_advantage_zero_loss promises exactly 0; "
                             "set it to False (a KL or entropy term acts without an advantage)")


def mechanisms_switch_off(algorithm: Algorithm, seed: int) -> None:
    for mechanism in algorithm.mechanisms:
        if not mechanism.off:
            continue
        other = algorithm.without(mechanism.name)
        try:
            declarations(other, seed)
            for kind in ("mixed", "all-invalid", "equal"):
                _on(kind, lambda: _whole_step(other, rollouts(other, kind, seed), seed))
        except Failed as failed:
            raise Failed(f"without {mechanism.name}: {failed}") from None
        if other == algorithm:
            raise Failed(f"`off` of {mechanism.name} changes nothing: {mechanism.off} are the values it has")


DECLARATIONS = Check("declarations", declarations)
CHECKS: tuple[Check, ...] = (
    DECLARATIONS,
    Check("shapes-and-finite-values", shapes),
    Check("state", state_is_plain),
    Check("no-side-effects", no_side_effects),
    Check("deterministic", deterministic),
    Check("padding-is-ignored", padding_is_ignored),
    Check("order-is-ignored", order_is_ignored),
    Check("microbatches-add-up", microbatches_add_up),
    Check("right-completions-gain", right_completions_gain),
    Check("equal-rewards-teach-nothing", equal_rewards_teach_nothing),
    Check("zero-advantage-zero-loss", zero_advantage_zero_loss),
    Check("mechanisms-switch-off", mechanisms_switch_off),
)


# -- evidence ----------------------------------------------------------------------------------------------------------

def response_report(algorithm: Algorithm, seed: int = 0) -> dict[str, float]:
    """Which inputs the values answer to: input -> how much advantages, loss or gradient change when it alone is perturbed.

    The largest ||x' - x|| / (||x'|| + ||x||), in [0, 1], over batches; 0.0 means that nothing changes. `logp_rollout` of a
    microbatch, the reduction and the framework's masks are not part of it.
    """
    return {name: max(_response(algorithm, rollouts(algorithm, kind, seed), name, seed) for kind in ("mixed", "continuous", "all-right"))
            for name in INPUTS}


def _response(algorithm: Algorithm, r: RolloutBatch, name: str, seed: int) -> float:
    perturb = specimens.Perturbation(seed)
    other = perturb(r, name)
    if other is None:
        return 0.0
    return max(_distance(a, b) for a, b in zip(_values(algorithm, r, r, seed), _values(algorithm, r, other, seed), strict=True))


def _values(algorithm: Algorithm, base: RolloutBatch, r: RolloutBatch, seed: int) -> Iterator[Tensor]:
    """What the algorithm makes of r, at the current policy that `base` led to."""
    state = algorithm.initial_state()
    A, keep = advantages(algorithm, r, state)
    yield A
    yield keep.float()
    logp = policy_batch(base, A, seed=seed).logp
    found = loss(algorithm, replace(policy_batch(r, A, seed=seed), logp=logp), state)
    yield from (found.value, found.logp, found.entropy)


def _distance(a: Tensor, b: Tensor) -> float:
    share = float((a - b).norm() / (a.norm() + b.norm()).clamp(min=1e-12))
    return round(share, 4) if share > 1e-5 else 0.0
