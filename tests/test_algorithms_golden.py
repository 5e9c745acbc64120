"""Losses, gradients and advantages agree with the peers' own code (stored by scripts/make_golden.py) to 1e-6."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_algorithms import loss_and_grad, rolled

from poise_hpc.algorithms import ops
from poise_hpc.algorithms.base import PolicyBatch
from poise_hpc.algorithms.seeds import seed

PEERS = {name: json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text()) for name in ("verl", "trl")}
OURS = {  # case -> our seed at the peer's settings; the others as they stand
    "dapo": replace(seed("dapo"), clip_high=0.28), "grpo_kl": replace(seed("grpo"), kl_beta=0.04),
    "gspo": replace(seed("gspo"), clip_low=0.03, clip_high=0.04), "cispo": replace(seed("cispo"), weight_high=1.0)}
CASES = [(peer, case) for peer, data in PEERS.items() for case in data["losses"]]


def stored(peer):
    x = {k: torch.tensor(v) for k, v in PEERS[peer]["inputs"].items()}
    mask = torch.arange(x["logp"].shape[1]) < x["length"].unsqueeze(-1)
    return x, mask, PolicyBatch(
        logp=x["logp"].requires_grad_(), logp_old=x["logp_old"], advantage=x["advantage"].unsqueeze(-1).expand_as(mask), mask=mask,
        length=x["length"], reward=x["reward"], progress=0.0, max_length=PEERS[peer]["max_length"], logp_ref=x["logp_ref"])


@pytest.mark.parametrize(("peer", "case"), CASES)
def test_loss_and_gradient(peer, case):
    want = PEERS[peer]["losses"][case]
    _, mask, batch = stored(peer)
    loss, grad = loss_and_grad(OURS.get(case) or seed(case), batch)
    torch.testing.assert_close(loss, torch.tensor(want["loss"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, torch.tensor(want["grad"]), rtol=0, atol=1e-6)
    assert grad[~mask].abs().max() == 0 and (grad.abs() > 1e-3).sum() > 10  # the comparison is not of zeros


ADVANTAGES = {"grpo": seed("grpo"), "dr_grpo": seed("dr_grpo"), "rloo": seed("rloo"), "reinforce_pp_baseline": seed("reinforce_pp"),
              "reinforce_pp": replace(seed("reinforce_pp"), group_baseline=False)}


@pytest.mark.parametrize("case", sorted(ADVANTAGES))
def test_advantages(case):
    x, mask, _ = stored("verl")
    batch = rolled(x["reward"].reshape(PEERS["verl"]["groups"], -1).tolist(), length=x["length"].tolist())
    A = ADVANTAGES[case].advantages(batch, {}).value.unsqueeze(-1) * mask
    torch.testing.assert_close(A, torch.tensor(PEERS["verl"]["advantages"][case]), rtol=0, atol=1e-6)


def test_gpg_advantages_but_for_alpha():
    # verl's alpha counts non-zero rewards, 10 of 12; the paper's (and ours) groups whose rewards differ, 2 of 3.
    x, mask, _ = stored("verl")
    batch = rolled(x["reward"].reshape(3, -1).tolist(), length=x["length"].tolist())
    A = seed("gpg").advantages(batch, {}).value.unsqueeze(-1) * mask
    torch.testing.assert_close(A / 1.5, torch.tensor(PEERS["verl"]["advantages"]["gpg"]) / 1.2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", ["k1", "k2", "k3"])
def test_kl_estimators(k):
    _, mask, batch = stored("verl")
    ours = getattr(ops, k)(batch).detach()
    torch.testing.assert_close(ours, torch.tensor(PEERS["verl"]["kl"][k]) * mask, rtol=0, atol=1e-6)
