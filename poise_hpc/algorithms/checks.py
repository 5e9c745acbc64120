"""The contract of an algorithm as property checks. Seeds pass them as tests, candidates meet the same tuple as a gate.

A check takes an algorithm and a seed and raises `Broken`; whatever else comes out of it was raised by the algorithm.
About a second for all. Not covered: hanging (the job's supervisor ends it) and whether an algorithm is any good.
"""
from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files, inside
from ..types import CandidateError
from . import gate, probes
from .base import NEEDS, Algorithm, Mechanism, Reduction
from .digest import digest
from .load import blame, load, verify
from .probes import Broken, Update
from .response import response_report

KINDS = frozenset("advantage normalization clipping ratio masking kl entropy length selection reduction".split())
LARGEST = 1e3          # |A| for rewards within [0, 1.1]: more is a division by almost nothing
STATE_BYTES = 64 * 1024
GARBAGE = (0.5, 200.0)  # at padded tokens; exp of the second is infinite, and so 0 * exp not a number


@dataclass(frozen=True)
class Check:
    name: str
    promise: str           # what holds, as one sentence
    run: Callable[[Algorithm, int], None]


@dataclass(frozen=True)
class CheckResult:
    name: str
    passed: bool
    message: str           # "" when it passed
    seconds: float


def run_checks(algorithm: Algorithm, seed: int = 0, package_dir: Path | None = None) -> list[CheckResult]:
    """Every check, in the order of CHECKS. A malformed declaration ends the run: the rest would only repeat it."""
    results: list[CheckResult] = []
    for check in CHECKS:
        start = time.perf_counter()
        try:
            with torch.random.fork_rng(devices=[]), inside.candidate_code():
                check.run(algorithm, seed)
            message = ""
        except Broken as error:
            message = str(error)
        except Exception as error:  # candidate code ran: the blame is set here
            message = "raised " + blame(error, package_dir or Path())
        results.append(CheckResult(check.name, not message, message, round(time.perf_counter() - start, 4)))
        if message and check is CHECKS[0]:
            break
    return results


def run(job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    """The check job: static gate, import, checks. CandidateError with every failing message; checks.json in any case."""
    package = Path(job["package"])
    payload: dict[str, Any] = {"checks": [], "versions": {"torch": torch.__version__}}
    verify(package, job.get("manifest"))
    try:
        if findings := gate.check_package(package):
            raise CandidateError("gate", "\n".join(str(f) for f in findings))
        algorithm = load(package, job.get("manifest"))
        results = run_checks(algorithm, package_dir=package)
        payload["checks"] = [asdict(r) for r in results]
        if failed := [f"{r.name}: {r.message}" for r in results if not r.passed]:
            raise CandidateError("check-failed", "\n".join(failed))
        with inside.candidate_code():
            payload |= {"response": response_report(algorithm), "digest": digest(algorithm)}
        payload["switchable"] = [m.name for m in algorithm.mechanisms if m.off]
    except CandidateError as error:
        payload["checks"] = payload["checks"] or [asdict(CheckResult(error.cause, False, error.message, 0.0))]
        raise
    finally:
        files.write_json(attempt_dir / "checks.json", payload)
    return payload


# -- the checks --------------------------------------------------------------------------------------------------------

def declared(algorithm: Algorithm, seed: int) -> None:
    if not isinstance(algorithm, Algorithm):
        raise Broken(f"ALGORITHM is of type {type(algorithm).__name__}; a subclass of Algorithm is wanted")
    if not is_dataclass(algorithm) or "__dataclass_params__" not in vars(type(algorithm)) or not algorithm.__dataclass_params__.frozen:
        raise Broken(f"{type(algorithm).__name__} is no frozen dataclass; put @dataclass(frozen=True) above it")
    for f in fields(algorithm):
        value = getattr(algorithm, f.name)
        if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            raise Broken(f"hyperparameter {f.name} = {value!r}; a finite number, a bool or a string is wanted")
    if not isinstance(algorithm.needs, frozenset) or not algorithm.needs <= NEEDS:
        raise Broken(f"needs = {algorithm.needs!r}; a frozenset within {sorted(NEEDS)} is wanted")
    if not isinstance(algorithm.reduction, Reduction):
        raise Broken(f"reduction = {algorithm.reduction!r}; one of Reduction.{', '.join(r.name for r in Reduction)} is wanted")
    if not isinstance(algorithm.zero_advantage_zero_loss, bool):
        raise Broken(f"zero_advantage_zero_loss = {algorithm.zero_advantage_zero_loss!r}; a bool is wanted")
    _declared_mechanisms(algorithm)
    _json(probes.fresh_state(algorithm), "initial_state()")


def _declared_mechanisms(algorithm: Algorithm) -> None:
    if not isinstance(algorithm.mechanisms, tuple) or not all(isinstance(m, Mechanism) for m in algorithm.mechanisms):
        raise Broken("mechanisms must be a tuple of Mechanism; write `mechanisms = (Mechanism(...),)` with the comma")
    names, known = [m.name for m in algorithm.mechanisms], {f.name for f in fields(algorithm)}
    if len(set(names)) < len(names):
        raise Broken(f"mechanism names repeat: {names}")
    for m in algorithm.mechanisms:
        if m.kind not in KINDS:
            raise Broken(f"mechanism {m.name!r} has kind {m.kind!r}; one of {', '.join(sorted(KINDS))} is wanted")
        if not set(m.off) <= known:
            raise Broken(f"mechanism {m.name!r} switches off {sorted(set(m.off) - known)}, no hyperparameters; there are {sorted(known)}")


def finite(algorithm: Algorithm, seed: int) -> None:
    for name, batch in probes.variety(algorithm, seed):
        for drift in probes.DRIFTS:
            _in(f"{name}, log-ratios of {drift:g}", probes.update, algorithm, batch, drift)


def bounded(algorithm: Algorithm, seed: int) -> None:
    for name, batch in probes.variety(algorithm, seed):
        A, _ = probes.advantages(algorithm, batch, probes.fresh_state(algorithm))
        if A.abs().max() > LARGEST:
            raise Broken(f"{name}: an advantage of {float(A.abs().max()):.3g} from rewards within [-1, 1.1]: something is divided by "
                         f"almost nothing (a std or p (1 - p) of 0 where not all completions are equal)")


def selection(algorithm: Algorithm, seed: int) -> None:
    for name, batch in probes.variety(algorithm, seed):
        state = probes.fresh_state(algorithm)
        before = copy.deepcopy(state)
        chosen = algorithm.select(batch, state)
        if chosen is not None and (not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != (batch.groups,)):
            raise Broken(f"{name}: select() must return None or bool of shape (G,) = ({batch.groups},), got "
                         f"{getattr(chosen, 'dtype', type(chosen).__name__)} {tuple(getattr(chosen, 'shape', ()))}")
        if state != before:
            raise Broken(f"{name}: select() changed the state; it may run several times a step, `advantages` runs once")


def padding(algorithm: Algorithm, seed: int) -> None:
    for name, batch in _ordinary(algorithm, seed):
        one = probes.update(algorithm, batch)
        for scale in GARBAGE:  # the small one leaks in numbers that can be read, the large one where nothing small shows
            state = probes.fresh_state(algorithm)
            where = f"{name}, log-probs of about {scale:g} at padded tokens"
            A, keep = _in(where, probes.advantages, algorithm, _with_garbage(batch, scale), state)
            policy = _with_garbage(probes.policy_batch(batch, A, 0.3), scale)
            _same(one, _in(where, probes.update_policy, algorithm, policy, keep, state), batch.mask,
                  f"{name}: values at padded tokens change")
        T, wide = batch.mask.shape[1], _widened(batch, 3)
        state = probes.fresh_state(algorithm)
        A, keep = probes.advantages(algorithm, wide, state)
        narrow = probes.policy_batch(batch, A[:, :T], 0.3)
        policy = replace(_widened(narrow, 3), advantage=A)
        out = probes.update_policy(algorithm, policy, keep, state)
        cut = replace(out, advantage=A[:, :T], loss=out.loss[:, :T], weight=out.weight[:, :T], grad=out.grad[:, :T])
        _same(one, cut, batch.mask, f"{name}: three more columns of padding change")


def permutation(algorithm: Algorithm, seed: int) -> None:
    for name, batch in _ordinary(algorithm, seed):
        one = probes.update(algorithm, batch, drift=0.0)
        order = torch.randperm(len(batch.reward), generator=torch.Generator().manual_seed(seed))
        relabelled = torch.arange(batch.groups).flip(0)[batch.group]
        other = probes.update(algorithm, probes.rows(replace(batch, group=relabelled), order), drift=0.0)
        back = torch.argsort(order)
        _same(one, replace(other, advantage=other.advantage[back], loss=other.loss[back], weight=other.weight[back],
                           grad=other.grad[back], keep=other.keep[back]), batch.mask, f"{name}: the order of completions and groups changes")


def microbatches(algorithm: Algorithm, seed: int) -> None:
    for name, batch in _ordinary(algorithm, seed):
        state = probes.fresh_state(algorithm)
        A, keep = probes.advantages(algorithm, batch, state)
        whole = probes.policy_batch(batch, A, 0.3)
        one = probes.update_policy(algorithm, whole, keep, state)
        order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))
        loss, grad, z = torch.zeros_like(one.loss), torch.zeros_like(one.grad), torch.zeros(())
        for index in torch.tensor_split(order, (1, 1 + len(order) // 3)):  # three uneven parts, each only as wide as it must be
            width = int(whole.length[index].max())
            part = probes.update_policy(algorithm, probes.rows(whole, index, width), keep[index], state)
            loss[index, :width], grad[index, :width], z = part.loss, part.grad, z + part.z
        _same(one, replace(one, loss=loss, grad=grad, z=z), batch.mask, f"{name}: cutting the batch into microbatches changes")


def constant(algorithm: Algorithm, seed: int) -> None:
    """Inputs stay as they are; nothing is drawn at random; token_loss leaves the state alone."""
    for name, batch in _ordinary(algorithm, seed):
        state, random = probes.fresh_state(algorithm), torch.get_rng_state()
        before = {k: x.clone() for k, x in probes.tensors(batch).items()}
        names = set(batch.components)
        A, _ = probes.advantages(algorithm, batch, state)
        policy = probes.policy_batch(batch, A, 0.3)
        seen, known = {k: x.detach().clone() for k, x in probes.tensors(policy).items()}, copy.deepcopy(state)
        probes.token_loss(algorithm, policy, state)
        if not torch.equal(random, torch.get_rng_state()):
            raise Broken(f"{name}: random numbers were drawn")
        changed = [k for k, x in probes.tensors(batch).items() if not torch.equal(x, before[k])] + sorted(names ^ set(batch.components))
        changed += [k for k, x in probes.tensors(policy).items() if not torch.equal(x.detach(), seen[k])]
        if changed:
            raise Broken(f"{name}: inputs were changed in place: {', '.join(sorted(set(changed)))}")
        if state != known:
            raise Broken(f"{name}: token_loss changed the state; only `advantages` may (it runs once a step, on every rank alike)")


def deterministic(algorithm: Algorithm, seed: int) -> None:
    for name, batch in _ordinary(algorithm, seed):
        one, two = (probes.update(algorithm, copy.deepcopy(batch)) for _ in range(2))
        if not (torch.equal(one.advantage, two.advantage) and torch.equal(one.loss, two.loss) and torch.equal(one.grad, two.grad)):
            raise Broken(f"{name}: two equal calls gave different values; something outlives the call (memory belongs into `state`)")


def state(algorithm: Algorithm, seed: int) -> None:
    kept, written = probes.fresh_state(algorithm), probes.fresh_state(algorithm)
    batches = [batch for _, batch in probes.variety(algorithm, seed)]
    for step in range(24):
        batch = replace(batches[step % len(batches)], step=step, progress=step / 24)
        A, _ = probes.advantages(algorithm, batch, kept)
        written = json.loads(_json(written, "the state"))
        B, _ = probes.advantages(algorithm, batch, written)
        if not torch.equal(A, B):
            raise Broken(f"step {step}: a state that went through JSON gives other advantages; a checkpoint would change the run "
                         "(keys become strings, tuples become lists)")
    if (size := len(_json(kept, "the state"))) > STATE_BYTES:
        raise Broken(f"the state has {size} bytes after 24 steps; at most {STATE_BYTES} are kept in a checkpoint")


def direction(algorithm: Algorithm, seed: int) -> None:
    """Half of each group is right: a gradient step must raise the right ones' log-probability against the wrong ones'."""
    correct = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]] * 2).float()
    for step in (0, probes.STEPS // 2):
        batch = probes.rollouts(algorithm, correct, tokens=4, seed=seed, valid=torch.ones_like(correct, dtype=torch.bool), step=step)
        long = torch.full_like(batch.length, 3)
        batch = replace(batch, length=long, mask=torch.arange(4) < long.unsqueeze(-1),
                        **({} if batch.logp_ref is None else {"logp_ref": batch.logp_old}))
        rise = -probes.update(algorithm, batch, drift=0.0).grad.sum(-1)  # of a completion's log-probability, per unit of step
        right = correct.flatten() > 0
        gain, scale = float(rise[right].mean() - rise[~right].mean()), float(rise.abs().mean())
        if gain <= 1e-6 * scale:
            raise Broken(f"at progress {batch.progress:g} a gradient step moves the log-probability of right completions by "
                         f"{gain:.3g} against wrong ones; it must rise" + (": nothing is learnt" if scale == 0 else ": check the sign"))


def equal_rewards(algorithm: Algorithm, seed: int) -> None:
    if not algorithm.zero_advantage_zero_loss:
        return
    for right in (0.0, 1.0):
        batch = probes.rollouts(algorithm, torch.full((2, 7), right), seed=seed, valid=torch.ones(2, 7, dtype=torch.bool))
        batch = replace(probes.rows(batch, torch.zeros(14, dtype=torch.int64)), group=batch.group)  # 14 times the same completion
        A, _ = probes.advantages(algorithm, batch, probes.fresh_state(algorithm))
        if A.abs().max() > 1e-5:
            raise Broken(f"14 equal completions of reward {float(batch.reward[0]):.1f} have advantages up to {float(A.abs().max()):.3g}; "
                         "use ops.group_mean (a mean's rounding error over a std of 1e-6 is noise), or, if it is meant (no "
                         "baseline), do not promise zero_advantage_zero_loss")


def zero_promise(algorithm: Algorithm, seed: int) -> None:
    if not algorithm.zero_advantage_zero_loss:
        return
    for name, batch in _ordinary(algorithm, seed):
        for drift in probes.DRIFTS:
            state = probes.fresh_state(algorithm)
            A, keep = probes.advantages(algorithm, batch, state)
            silent = torch.arange(len(keep)) % 2 == 0
            policy = probes.policy_batch(batch, torch.where(silent.unsqueeze(-1), 0.0, A), drift)
            out = probes.update_policy(algorithm, policy, keep, state)
            worst = torch.maximum(out.loss.abs() * batch.mask, out.grad.abs())[silent].max()
            if worst != 0:
                raise Broken(f"{name}, log-ratios of {drift:g}: zero_advantage_zero_loss is promised, but a completion with A = 0 has a "
                             f"loss or gradient of {float(worst):.3g} (a KL or entropy term? then promise False)")


def mechanisms(algorithm: Algorithm, seed: int) -> None:
    for m in algorithm.mechanisms:
        if m.off:
            without = _in(f"without {m.name!r}", algorithm.without, m.name)
            for check in (declared, finite, bounded):
                _in(f"without {m.name!r}", check, without, seed)


CHECKS: tuple[Check, ...] = (
    Check("declared", "a frozen dataclass; needs, reduction, mechanisms and hyperparameters are well-formed", declared),
    Check("finite", "shapes are right, and advantages, loss and gradient finite, in every corner", finite),
    Check("bounded", f"advantages stay below {LARGEST:g} for rewards of ordinary size", bounded),
    Check("selection", "select returns None or one bool a group and leaves the state alone", selection),
    Check("padding", "what stands at padded tokens, and how many there are, changes nothing", padding),
    Check("permutation", "the order of completions and the numbering of groups change nothing", permutation),
    Check("microbatches", "losses and gradients of microbatches add up to those of the batch", microbatches),
    Check("constant", "inputs are not changed, nothing is random, token_loss leaves the state alone", constant),
    Check("deterministic", "equal calls give equal values", deterministic),
    Check("state", "the state survives JSON and stays small", state),
    Check("direction", "a gradient step prefers right completions to wrong ones", direction),
    Check("equal-rewards", "equal completions teach nothing (where zero_advantage_zero_loss is promised)", equal_rewards),
    Check("zero-promise", "A = 0 gives a loss and gradient of exactly 0 (where promised)", zero_promise),
    Check("mechanisms", "each mechanism can be switched off", mechanisms),
)


# -- helpers -----------------------------------------------------------------------------------------------------------

def _ordinary(algorithm: Algorithm, seed: int) -> list[tuple[str, Any]]:
    """The mixed batch and the one with rare successes."""
    return list(probes.variety(algorithm, seed))[:2]


def _in(where: str, call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except Broken as error:
        raise Broken(f"{where}: {error}") from None


def _same(one: Update, other: Update, mask: Tensor, complaint: str) -> None:
    for what in ("advantage", "loss", "grad"):
        a, b = (torch.where(mask, getattr(u, what), 0.0) for u in (one, other))
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise Broken(f"{complaint} the {what} by up to {float((a - b).abs().max()):.3g}")
    if not torch.equal(one.keep, other.keep):
        raise Broken(f"{complaint} which completions are kept")
    if not torch.allclose(one.z, other.z):
        raise Broken(f"{complaint} Z from {float(one.z):g} to {float(other.z):g}")


def _with_garbage(batch: Any, scale: float) -> Any:
    """The same batch with other values at padded tokens: of both signs, growing along the row, and others in each tensor, so that neither
    their sum over a row nor the difference of two tensors is what it was."""
    column = torch.arange(1, batch.mask.shape[1] + 1)
    growing = torch.where(column % 2 == 0, -scale, scale) * column
    wide = [(k, x) for k, x in probes.tensors(batch).items() if x.ndim == 2 and k != "mask"]
    return replace(batch, **{k: torch.where(batch.mask, x.detach(), (-1) ** i * (1 + i / 2) * growing).requires_grad_(x.requires_grad)
                             for i, (k, x) in enumerate(wide)})


def _widened(batch: Any, columns: int) -> Any:
    """The same batch, padded further."""
    def widen(name: str, x: Tensor) -> Tensor:
        more = torch.full((len(x), columns), False if name == "mask" else -2.0).to(x.dtype)
        return torch.cat([x.detach(), more], -1).requires_grad_(x.requires_grad)

    return replace(batch, **{k: widen(k, x) for k, x in probes.tensors(batch).items() if x.ndim == 2})


def _json(state: Any, what: str) -> str:
    try:
        return json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Broken(f"{what} is not JSON-able ({error}); numbers, strings, lists and dicts with string keys are wanted") from None
