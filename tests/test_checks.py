"""Algorithms broken on purpose: each is caught, and by the check that is meant to."""
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from poise_hpc.algorithms import checks
from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, Reduction
from poise_hpc.algorithms.checks import CHECKS, response_report, run_checks
from poise_hpc.algorithms.grpo import GRPO
from poise_hpc.algorithms.load import write_seed_package
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, k3, ratio
from poise_hpc.algorithms.seeds import seed
from poise_hpc.files import CorruptFile
from poise_hpc.types import CandidateError

ELSEWHERE: dict[str, Any] = {"calls": 0}


def grpo(advantages=None, token_loss=None, select=None, **declared):
    """GRPO with some of its parts replaced."""
    methods = {"advantages": advantages, "token_loss": token_loss, "select": select}
    body = {k: v for k, v in methods.items() if v} | {"needs": frozenset(), "zero_advantage_zero_loss": True} | declared
    return dataclass(frozen=True)(type("Broken", (GRPO,), body))()


def advantages(change):
    """GRPO's advantages, changed by change(self, A, rollouts, state)."""
    def of(self, rollouts, state):
        return Advantages(change(self, GRPO().advantages(rollouts, state).value, rollouts, state))
    return of


def loss(change):
    """GRPO's token loss, changed by change(self, l, batch, state)."""
    return lambda self, batch, state: change(self, GRPO().token_loss(batch, state), batch, state)


def doubled_in_place(self, A, rollouts, state):
    rollouts.reward.mul_(2)
    return A


def counted_elsewhere(self, A, rollouts, state):
    ELSEWHERE["calls"] += 1
    return A * ELSEWHERE["calls"]


def remembered(self, A, rollouts, state):
    state.setdefault("seen", []).extend(rollouts.reward.tolist() * 50)
    return A


def keyed_by_number(self, A, rollouts, state):
    seen = state.setdefault("by_group", {})
    seen[0] = seen.get(0, 0) + 1
    return A * seen[0]


def counted_in_state(self, l, batch, state):
    state["calls"] = state.get("calls", 0) + 1
    return l


def validity_without_fallback(self, rollouts, state):
    R, g, v = rollouts.reward, rollouts.group, rollouts.valid
    return Advantages((R - group_mean(R, g, v)) / (group_std(R, g, v) + 1e-6))


def naive_mean(self, rollouts, state):
    A = [(r - r.mean()) / (r.std() + 1e-6) for r in (rollouts.reward[rollouts.group == k] for k in range(rollouts.groups))]
    return Advantages(torch.cat(A))


def unmasked_sum(self, batch, state):
    return clipped((batch.logp - batch.logp_old).sum(-1, keepdim=True).clamp(-20, 20).exp(), batch.advantage, 0.2, 0.2)


def first_of_group(self, A, rollouts, state):
    return A * torch.linspace(1, 2, len(A))


def longest_of_batch(self, l, batch, state):
    return l / batch.length.max()


BROKEN = {
    # declared
    "no dataclass": ("declared", type("Plain", (GRPO,), {"extra": 1})()),
    "list of mechanisms": ("declared", grpo(mechanisms=[Mechanism("x", "kl")])),
    "unknown kind": ("declared", grpo(mechanisms=(Mechanism("x", "magic"),))),
    "off names no field": ("declared", grpo(mechanisms=(Mechanism("x", "kl", off={"bta": 0.0}),))),
    "two of a name": ("declared", grpo(mechanisms=(Mechanism("x", "kl"), Mechanism("x", "ratio")))),
    "needs of its own": ("declared", grpo(needs=frozenset({"values"}))),
    "reduction as text": ("declared", grpo(reduction="mean")),
    "infinite hyperparameter": ("declared", replace(GRPO(), clip=float("inf"))),
    "state of tensors": ("declared", grpo(initial_state=lambda self: {"mean": torch.zeros(2)})),
    # finite
    "wrong shape of A": ("finite", grpo(advantages(lambda s, A, r, st: A[:-1]))),
    "integer A": ("finite", grpo(advantages(lambda s, A, r, st: A.long()))),
    "tensor for Advantages": ("finite", grpo(lambda self, r, st: r.reward)),
    "NaN for equal rewards": ("finite", grpo(advantages(lambda s, A, r, st: (r.reward - group_mean(r.reward, r.group)) /
                                                        group_std(r.reward, r.group)))),
    "keep of numbers": ("finite", grpo(lambda self, r, st: Advantages(r.reward, keep=r.reward))),
    "reduced loss": ("finite", grpo(token_loss=loss(lambda s, l, b, st: l.mean()))),
    "loss without gradient": ("finite", grpo(token_loss=loss(lambda s, l, b, st: l.detach()))),
    "overflow": ("finite", grpo(token_loss=loss(lambda s, l, b, st: l * (5 * (b.logp - b.logp_old)).exp()))),
    "infinite gradient": ("finite", grpo(token_loss=loss(lambda s, l, b, st: l + (b.logp - b.logp_old).abs().sqrt()))),
    "undeclared need": ("finite", grpo(token_loss=lambda self, b, st: k3(b))),
    # the others
    "division by almost nothing": ("bounded", grpo(validity_without_fallback)),
    "selection of completions": ("selection", grpo(select=lambda self, r, st: r.valid)),
    "selection with memory": ("selection", grpo(select=lambda self, r, st: st.update(n=1))),
    "padding leaks": ("padding", grpo(token_loss=loss(lambda s, l, b, st: l - l.detach().sum(-1, keepdim=True)))),
    "sum over a row, unmasked": ("padding", grpo(token_loss=unmasked_sum)),
    "exp, unmasked": ("padding", grpo(token_loss=loss(lambda s, l, b, st: l + 0 * (b.logp - b.logp_old).exp()))),
    "exp, masked too late": ("padding", grpo(token_loss=loss(lambda s, l, b, st: l + 0.1 * (b.logp - b.logp_old).exp() * b.mask))),
    "exp, masked by where": ("padding", grpo(token_loss=loss(lambda s, l, b, st: l + 0.0 * torch.where(b.mask, (b.logp_old - b.logp).exp(), 0.0)))),
    "entropy, unmasked": ("padding", grpo(token_loss=loss(lambda s, l, b, st: l * (1 + b.entropy.detach().sum(-1, keepdim=True))),
                                          needs=frozenset({"entropy"}))),
    "mean over the padded width": ("padding", grpo(advantages(lambda s, A, r, st: A * r.mask.float().mean()))),
    "position in the batch": ("permutation", grpo(advantages(first_of_group))),
    "number of the group": ("permutation", grpo(advantages(lambda s, A, r, st: A * (1 + r.group)))),
    "mean over the microbatch": ("microbatches", grpo(token_loss=loss(lambda s, l, b, st: l - l[b.mask].detach().mean()))),
    "normalized in the microbatch": ("microbatches", grpo(token_loss=loss(longest_of_batch))),
    "input changed": ("constant", grpo(advantages(doubled_in_place))),
    "noise": ("constant", grpo(advantages(lambda s, A, r, st: A + 0.0 * torch.randn(len(A))))),
    "state changed by the loss": ("constant", grpo(token_loss=loss(counted_in_state))),
    "memory outside the state": ("deterministic", grpo(advantages(counted_elsewhere))),
    "state that grows": ("state", grpo(advantages(remembered))),
    "state that JSON changes": ("state", grpo(advantages(keyed_by_number))),
    "sign flip": ("direction", grpo(token_loss=loss(lambda s, l, b, st: -l))),
    "inert": ("direction", grpo(advantages(lambda s, A, r, st: 0.0 * A))),
    "rounding error over a small std": ("equal-rewards", grpo(naive_mean)),
    "no baseline": ("equal-rewards", grpo(lambda self, r, st: Advantages(r.reward))),
    "KL term and a false promise": ("zero-promise", grpo(token_loss=lambda self, b, st: clipped(ratio(b), b.advantage, 0.2, 0.2) + k3(b),
                                                         needs=frozenset({"ref_logp"}))),
    "off raises": ("mechanisms", grpo(mechanisms=(Mechanism("clip", "clipping", off={"clip": "none"}),))),
    "off divides by 0": ("mechanisms", grpo(advantages(lambda s, A, r, st: A / s.clip),
                                         mechanisms=(Mechanism("clip", "clipping", off={"clip": 0.0}),))),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_algorithm_is_caught_by_the_check_that_is_meant_to(case):
    name, algorithm = BROKEN[case]
    results = {r.name: r for r in run_checks(algorithm)}
    assert not results[name].passed, "passed: " + ", ".join(results)
    assert results[name].message


def test_the_unbroken_one_passes_with_all_results():
    results = run_checks(grpo(advantages(lambda s, A, r, st: A), loss(lambda s, l, b, st: l)))
    assert [r.name for r in results] == [c.name for c in CHECKS]
    assert [r for r in results if not r.passed] == []


def test_a_leak_from_padded_tokens_is_called_one():
    """Not only the microbatches, narrower than the batch, tell of it."""
    message = next(r.message for r in run_checks(BROKEN["sum over a row, unmasked"][1]) if r.name == "padding")
    assert message.startswith("mixed rewards: values at padded tokens change the loss")
    message = next(r.message for r in run_checks(BROKEN["exp, unmasked"][1]) if r.name == "padding")
    assert message == ("mixed rewards, log-probs of about 200 at padded tokens: token_loss is not finite at padded tokens; "
                       "mask the *input* of exp and log")


def test_a_malformed_declaration_ends_the_run():
    assert [r.name for r in run_checks(BROKEN["reduction as text"][1])] == ["declared"]


def test_reinforce_without_baseline_is_allowed_if_it_promises_nothing():
    plain = grpo(lambda self, r, st: Advantages(r.reward), zero_advantage_zero_loss=False)
    assert [r for r in run_checks(plain) if not r.passed] == []


def test_a_state_that_is_kept_well_passes():
    def advantages(self, rollouts, state):
        state["baseline"] = 0.9 * state["baseline"] + 0.1 * float(rollouts.reward.mean())
        return Advantages(rollouts.reward - state["baseline"])

    moving = grpo(advantages, initial_state=lambda self: {"baseline": 0.0}, zero_advantage_zero_loss=False)
    assert [r for r in run_checks(moving) if not r.passed] == []


def test_the_random_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    run_checks(BROKEN["noise"][1])
    assert torch.equal(before, torch.get_rng_state())


# -- the job -----------------------------------------------------------------------------------------------------------

def test_the_job_reports_every_check(tmp_path):
    write_seed_package("validity_masking", tmp_path / "c0001")
    payload = checks.run({"package": str(tmp_path / "c0001")}, tmp_path)
    assert payload == json.loads((tmp_path / "checks.json").read_text())
    assert all(c["passed"] and c["name"] and c["seconds"] >= 0 for c in payload["checks"]) and len(payload["checks"]) == len(CHECKS)
    assert payload["response"]["valid"] > 0 and payload["response"]["entropy"] == 0


def test_the_job_names_all_failures_with_the_candidates_lines(tmp_path):
    write_seed_package("grpo", tmp_path / "c0002")
    file = tmp_path / "c0002" / "algorithm.py"
    file.write_text(file.read_text().replace("R, g = rollouts.reward, rollouts.group", "R, g = rollouts.rewards, rollouts.group"))
    with pytest.raises(CandidateError) as error:
        checks.run({"package": str(tmp_path / "c0002")}, tmp_path)
    assert error.value.cause == "check-failed"
    assert "finite: raised AttributeError" in error.value.message and "direction: " in error.value.message
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "rollouts.rewards" in text)
    assert f"algorithm.py:{line} in advantages: R, g = rollouts.rewards" in error.value.message
    assert not json.loads((tmp_path / "checks.json").read_text())["checks"][1]["passed"]


def test_the_job_checks_the_package_that_was_proposed(tmp_path):
    """Edited since, into something that the gate would call the candidate's fault."""
    (tmp_path / "algorithm.py").write_text("open('x', 'w')\nALGORITHM = None\n")
    with pytest.raises(CorruptFile, match="algorithm.py is not what its manifest says"):
        checks.run({"package": str(tmp_path), "manifest": {"algorithm.py": "0" * 64}}, tmp_path)


def test_the_job_runs_nothing_that_the_gate_refuses(tmp_path):
    (tmp_path / "algorithm.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nALGORITHM = None\n")
    with pytest.raises(CandidateError, match="algorithm.py:1 name: `open`") as error:
        checks.run({"package": str(tmp_path)}, tmp_path)
    assert error.value.cause == "gate" and not (tmp_path / "ran").exists()


# -- evidence ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("algorithm", "responds"), [
    (seed("grpo"), {"reward", "group", "logp_old"}),
    (seed("gpg"), {"reward", "group"}),
    (seed("dapo"), {"reward", "group", "logp_old", "components", "length"}),
    (seed("analytic_variance"), {"reward", "group", "logp_old", "components"}),
    (seed("validity_masking"), {"reward", "group", "logp_old", "valid"}),
    (seed("length_shaping"), {"reward", "group", "logp_old", "components", "length"}),
    (seed("reinforce_pp"), {"reward", "group", "logp_old", "length"}),
    (replace(GRPO(), kl_beta=0.1), {"reward", "group", "logp_old", "logp_ref"}),
    (grpo(token_loss=loss(lambda s, l, b, st: l - 0.1 * b.entropy * (1 - b.progress)), needs=frozenset({"entropy"}),
          zero_advantage_zero_loss=False), {"reward", "group", "logp_old", "entropy", "progress"}),
    (grpo(lambda self, r, st: Advantages(r.reward - group_mean(r.reward, r.group), keep=~r.truncated)),
     {"reward", "group", "logp_old", "truncated"}),
    (grpo(advantages(lambda s, A, r, st: A / (1 + r.step))), {"reward", "group", "logp_old", "step"})], ids=repr)
def test_response_report(algorithm, responds):
    assert {k for k, v in response_report(algorithm).items() if v} == responds


def test_reductions_of_a_property_and_of_a_class():
    assert isinstance(Algorithm.reduction, Reduction) and isinstance(seed("dapo").reduction, Reduction)
