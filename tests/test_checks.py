"""The contract checks: seeds pass them, and each way to break an algorithm is caught by the check that is meant for it."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from poise_hpc.algorithms import checks, seeds
from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism
from poise_hpc.algorithms.grpo import GRPO
from poise_hpc.algorithms.load import write_seed_package
from poise_hpc.algorithms.ops import group_mean, k3
from poise_hpc.types import CandidateError


def failing(algorithm: Algorithm) -> dict[str, str]:
    return {r.name: r.message for r in checks.run_checks(algorithm) if not r.passed}


@pytest.mark.parametrize("name", seeds.SEEDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_keep_the_contract(name, seed):
    results = checks.run_checks(seeds.seed(name), seed=seed)
    assert [r.name for r in results] == [c.name for c in checks.CHECKS]
    assert [f"{r.name}: {r.message}" for r in results if not r.passed] == []


@pytest.mark.parametrize("name", seeds.SEEDS)
def test_seeds_keep_it_without_any_of_their_mechanisms(name):
    for mechanism in seeds.seed(name).mechanisms:
        if mechanism.off:
            assert failing(seeds.seed(name).without(mechanism.name)) == {}


# -- algorithms broken on purpose: each is GRPO but for one thing ------------------------------------------------------

def broken(check: str, **members: Any):
    """A frozen dataclass of GRPO with other members, and the check that must catch it."""
    kind = dataclass(frozen=True)(type("Broken", (GRPO,), members))
    return pytest.param(kind, check, id=f"{check}-{next(iter(members))}-{len(BROKEN)}")


def loss(f):
    return {"token_loss": lambda self, batch, state: f(self, batch, GRPO().token_loss(batch, state))}


def advantage(f):
    return {"advantages": lambda self, r, state: f(r, GRPO().advantages(r, state).value)}


def writes_reward(r, A):
    r.reward.zero_()
    return Advantages(A)


def remembers(r, A, seen=[]):  # noqa: B006: the fault
    seen.append(1)
    return Advantages(A * len(seen))


def counts_microbatches(self, batch, state):
    state["calls"] = state.get("calls", 0) + 1
    return GRPO().token_loss(batch, state)


def int_keys(self, r, state):
    state[r.step % 3] = 1.0
    return Advantages(GRPO().advantages(r, state).value * state.get(1, 2.0))


def grows(self, r, state):
    state.setdefault("all", []).extend(r.reward.tolist() * 200)
    return GRPO().advantages(r, state)


def keeps_tensor(self, r, state):
    state["baseline"] = r.reward.mean()
    return GRPO().advantages(r, state)


def from_groups(value):
    return {"select": lambda self, r, state: value(r)}


BROKEN: list[Any] = []
BROKEN += [broken("declared", needs=frozenset({"critic"}))]
BROKEN += [broken("declared", needs={"entropy"})]
BROKEN += [broken("declared", reduction="mean")]
BROKEN += [broken("declared", mechanisms=(Mechanism("x", "clipping", off={"no_field": 1}),))]
BROKEN += [broken("declared", mechanisms=(Mechanism("x", "clipping"), Mechanism("x", "ratio")))]
BROKEN += [broken("declared", __annotations__={"extra": float}, extra=float("nan"))]
BROKEN += [broken("finite", **loss(lambda self, b, x: x.mean()))]                                        # a scalar
BROKEN += [broken("finite", **loss(lambda self, b, x: x.detach()))]                                      # no gradient
BROKEN += [broken("finite", **loss(lambda self, b, x: x * ((b.logp - b.logp_old) * 20).exp()))]          # inf far away
BROKEN += [broken("finite", **loss(lambda self, b, x: x + (b.logp - b.logp_old).abs().sqrt()))]          # infinite slope at 0
BROKEN += [broken("finite", **advantage(lambda r, A: Advantages(A / A.abs().max())))]                    # 0 / 0 for equal rewards
BROKEN += [broken("finite", **advantage(lambda r, A: Advantages(A.view(-1, 1))))]                        # (N, 1)
BROKEN += [broken("finite", **advantage(lambda r, A: A))]                                                # no Advantages
BROKEN += [broken("finite", **advantage(lambda r, A: Advantages(A, r.valid.float())))]                   # keep is no bool
BROKEN += [broken("bounded", **advantage(lambda r, A: Advantages(A * 1e6)))]
BROKEN += [broken("selection", **from_groups(lambda r: r.valid))]                                        # (N,) where (G,) is wanted
BROKEN += [broken("selection", **from_groups(lambda r: torch.ones(r.groups)))]
BROKEN += [broken("padding", **loss(lambda self, b, x: x * b.logp_old.mean(-1, keepdim=True)))]
BROKEN += [broken("padding", **advantage(lambda r, A: Advantages(A * r.logp_old.sum(-1))))]
BROKEN += [broken("padding", **loss(lambda self, b, x: x / b.mask.shape[1]))]                            # the batch's width
BROKEN += [broken("permutation", **advantage(lambda r, A: Advantages(A * torch.arange(len(A)))))]
BROKEN += [broken("permutation", **advantage(lambda r, A: Advantages(A * (r.group == 0))))]
BROKEN += [broken("microbatches", **loss(lambda self, b, x: x / b.mask.sum()))]                          # the microbatch's token count
BROKEN += [broken("microbatches", **loss(lambda self, b, x: x - torch.where(b.mask, b.logp, 0.0).mean()))]
BROKEN += [broken("microbatches", **loss(lambda self, b, x: x * b.advantage.abs().max()))]
BROKEN += [broken("constant", **advantage(writes_reward))]
BROKEN += [broken("constant", token_loss=counts_microbatches)]
BROKEN += [broken("constant", **advantage(lambda r, A: Advantages(A + 0.01 * torch.rand(len(A)))))]
BROKEN += [broken("deterministic", **advantage(remembers))]
BROKEN += [broken("state", advantages=int_keys)]
BROKEN += [broken("state", advantages=grows)]
BROKEN += [broken("state", advantages=keeps_tensor)]
BROKEN += [broken("direction", **loss(lambda self, b, x: -x))]
BROKEN += [broken("direction", **advantage(lambda r, A: Advantages(-A)))]
BROKEN += [broken("direction", **advantage(lambda r, A: Advantages(0 * A)))]
BROKEN += [broken("direction", **advantage(lambda r, A: Advantages(A * r.progress)))]                    # inert at first
BROKEN += [broken("equal-rewards", **advantage(lambda r, A: Advantages(r.reward)))]                      # no baseline
BROKEN += [broken("zero-promise", **loss(lambda self, b, x: x + 0.01 * b.logp.square()))]
BROKEN += [broken("zero-promise", needs=frozenset({"ref_logp"}), **loss(lambda self, b, x: x + 0.1 * k3(b)))]
BROKEN += [broken("mechanisms", mechanisms=(Mechanism("floor", "normalization", off={"std_floor": float("inf")}),))]


@pytest.mark.parametrize(("kind", "check"), BROKEN)
def test_broken_algorithms_are_caught_by_the_check_for_it(kind, check):
    assert check in failing(kind())


def test_every_check_has_caught_something():
    assert {p.values[1] for p in BROKEN} == {c.name for c in checks.CHECKS}


def test_what_is_not_promised_is_not_demanded():
    kind = dataclass(frozen=True)(type("KL", (GRPO,), {
        "needs": frozenset({"ref_logp"}), "zero_advantage_zero_loss": False, **loss(lambda self, b, x: x + 0.1 * k3(b))}))
    assert failing(kind()) == {}


def test_a_class_that_is_no_dataclass_is_told_so():
    assert "@dataclass(frozen=True)" in failing(type("Plain", (GRPO,), {})())["declared"]


def test_wrong_declarations_end_the_run():
    assert list(failing(BROKEN[0].values[0]())) == ["declared"]


def test_undeclared_needs_are_named_by_their_exception():
    kind = dataclass(frozen=True)(type("NoNeeds", (GRPO,), loss(lambda self, b, x: x + 0.1 * k3(b))))
    assert "declare needs" in failing(kind())["finite"]


def test_rounding_noise_is_caught():
    # The float32 mean of 14 times 0.1 is not 0.1: over a std of 0 + 1e-9 the difference is an advantage above 1.
    def advantages(self, r, state):
        mean = torch.stack([r.reward[r.group == g].mean() for g in r.group])
        return Advantages((r.reward - mean) / 1e-9)

    kind = dataclass(frozen=True)(type("Naive", (GRPO,), {"advantages": advantages}))
    assert "equal-rewards" in failing(kind())
    exact = dataclass(frozen=True)(type("Exact", (GRPO,), {
        "advantages": lambda self, r, state: Advantages((r.reward - group_mean(r.reward, r.group)) / 1e-9)}))
    assert "equal-rewards" not in failing(exact())


# -- the job -----------------------------------------------------------------------------------------------------------

def run(tmp_path: Path, text: str | None) -> tuple[CandidateError | dict[str, Any], dict[str, Any]]:
    package, attempt = tmp_path / "package", tmp_path / "attempt"
    attempt.mkdir()
    write_seed_package("grpo", package)
    if text is not None:
        (package / "algorithm.py").write_text(text)
    try:
        result: Any = checks.run({"package": str(package)}, attempt)
    except CandidateError as error:
        result = error
    return result, json.loads((attempt / "checks.json").read_text())


def test_the_job_of_a_good_package(tmp_path):
    payload, written = run(tmp_path, None)
    assert payload == written and all(c["passed"] for c in payload["checks"])
    assert set(payload["checks"][0]) == {"name", "passed", "message", "seconds"}
    assert set(payload["response"]) >= {"reward", "components", "valid"} and payload["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("text", "cause", "says"), [
    ("import os\nALGORITHM = 1\n", "gate", "algorithm.py:1 import"),
    ("from .x import y\nALGORITHM = y\n", "gate", "no module of the package"),
    ("import math\nX = math.sqrt(-1)\nALGORITHM = X\n", "import-failed", "algorithm.py:2"),
    ("ALGORITHM = 1\n", "no-algorithm", "ALGORITHM")])
def test_a_package_that_cannot_be_checked_leaves_its_reason(text, cause, says, tmp_path):
    error, written = run(tmp_path, text)
    assert error.cause == cause and says in error.message
    assert [(c["name"], c["passed"]) for c in written["checks"]] == [(cause, False)]


def test_all_failing_checks_are_told_at_once(tmp_path):
    # The sign is wrong, and the loss is not 0 where A is.
    text = seeds.source("grpo").replace("loss = clipped(", "loss = 0.1 * batch.logp.square() - clipped(")
    error, written = run(tmp_path, text)
    names = [c["name"] for c in written["checks"] if not c["passed"]]
    assert error.cause == "check-failed" and names == ["direction", "zero-promise"] and all(f"{name}: " in error.message for name in names)


def test_an_exception_shows_the_candidates_line(tmp_path):
    text = seeds.source("grpo").replace("R, g = rollouts.reward, rollouts.group", "R, g = rollouts.reward, rollouts.group\n        1 / 0")
    error, _ = run(tmp_path, text)
    line = 1 + text[:text.index("1 / 0")].count("\n")
    assert f"algorithm.py:{line} in advantages: 1 / 0" in error.message
    assert "checks.py" not in error.message


# -- the response report -----------------------------------------------------------------------------------------------

PLAIN = frozenset({"components", "valid", "truncated", "length", "logp_rollout", "progress", "step"})


def responds(algorithm: Algorithm) -> set[str]:
    return {name for name, value in checks.response_report(algorithm).items() if value}


@pytest.mark.parametrize(("name", "plain"), [
    ("grpo", set()), ("gpg", set()), ("gspo", set()), ("dapo", {"components", "length"}), ("reinforce_pp", {"length"}), ("validity_masking", {"valid"}),
    ("conditional_normalization", {"components"}), ("length_shaping", {"components", "length"})])
def test_response_of_seeds(name, plain):
    found = responds(seeds.seed(name))
    assert found & PLAIN == plain and found >= {"reward", "group"}
    assert ("logp_old" in found) == (name != "gpg")  # GPG has no importance ratio


@pytest.mark.parametrize(("field", "factor"), [
    ("progress", lambda r: 1 + r.progress), ("step", lambda r: 1.0 + r.step), ("truncated", lambda r: 1.0 - 0.5 * r.truncated.float()),
    ("logp_rollout", lambda r: torch.where(r.mask, r.logp_rollout, 0.0).sum(-1).exp())])
def test_response_to_one_input(field, factor):
    kind = dataclass(frozen=True)(type("One", (GRPO,), advantage(lambda r, A: Advantages(A * factor(r)))))
    assert responds(kind()) - responds(GRPO()) == {field}


@pytest.mark.parametrize(("needs", "term"), [("entropy", lambda b: b.entropy), ("ref_logp", k3)])
def test_response_of_the_loss_alone(needs, term):
    kind = dataclass(frozen=True)(type("Term", (GRPO,), {
        "needs": frozenset({needs}), "zero_advantage_zero_loss": False, **loss(lambda self, b, x: x - 0.1 * term(b))}))
    assert responds(kind()) - responds(GRPO()) == {{"ref_logp": "logp_ref"}.get(needs, needs)}
