"""The offline proposer: recipes that are new, sound, readable, and meet the contract of an algorithm."""
from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import torch

from helpers_offline import GRPO, FakeArchive, grow, load
from poise_hpc.agent import catalogue
from poise_hpc.agent.novelty import fingerprint
from poise_hpc.agent.offline import OfflineProposer, part_weights
from poise_hpc.agent.recipe import SEEDS, declared, make, of_proposal, sound
from poise_hpc.agent.reflect import SYMPTOMS
from poise_hpc.agent.render import render
from poise_hpc.agent.tally import Tally
from poise_hpc.algorithms import seeds
from poise_hpc.algorithms.base import PolicyBatch, RolloutBatch
from poise_hpc.algorithms.checks import run_checks
from poise_hpc.algorithms.gate import check_files
from poise_hpc.algorithms.load import off_text
from poise_hpc.selection.references import Reference
from poise_hpc.types import Reflection

OPTIONS = [part for slot in catalogue.SLOTS for part in catalogue.choices(slot)]


def recipe_with(part: catalogue.Part):
    """The smallest sound recipe that has the part."""
    company = ["overlong-penalty"] if part.wants_shaping else ["no-std"] if "group-std" in part.conflicts else []
    return make([part.name, *company])


def passes(text: str) -> list[str]:
    return [f"{r.name}: {r.message}" for r in run_checks(load(text)) if not r.passed]


# -- the catalogue -----------------------------------------------------------------------------------------------------

def test_catalogue_is_well_formed():
    assert len(OPTIONS) >= 25
    names = catalogue.parts().keys()
    for part in catalogue.parts().values():
        assert part.slot in catalogue.SLOTS and part.source and part.formula and part.code, part.name
        assert set(part.helps) <= set(SYMPTOMS), part.name
        assert part.conflicts <= names and set(part.implies.values()) <= names, part.name
        assert set(part.off) <= {k.name for k in part.knobs}, part.name
    tags = [part.tag for part in OPTIONS]
    assert all(tags) and len(set(tags)) == len(tags)


@pytest.mark.parametrize("part", OPTIONS, ids=lambda p: p.name)
def test_every_part_renders_and_passes_gate_and_checks(part):
    recipe = recipe_with(part)
    assert sound(recipe)
    text = render(recipe, "T-GRPO")
    assert check_files({"algorithm.py": text}) == []
    assert passes(text) == []


@pytest.mark.parametrize("part", OPTIONS, ids=lambda p: p.name)
def test_a_part_switched_off_leaves_grpo_of_its_other_parts(part):
    recipe = recipe_with(part)
    if part not in declared(recipe):
        recipe = make([part.name])
    algorithm, grpo = load(render(recipe, "T-GRPO")), load(render(make([]), "GRPO"))
    for mechanism in declared(recipe):
        algorithm = algorithm.without(mechanism.name)
    rollouts = varied_rollouts()
    expected = grpo.advantages(rollouts, grpo.initial_state()).value
    found = algorithm.advantages(rollouts, algorithm.initial_state())
    value = found.value if found.value.dim() == 1 else found.value[:, 0]
    torch.testing.assert_close(value, expected)
    assert found.keep is None and algorithm.reduction == grpo.reduction, part.name
    if (kept := algorithm.select(rollouts, algorithm.initial_state())) is not None:
        assert kept.all()
    torch.testing.assert_close(algorithm.token_loss(policy_batch(), algorithm.initial_state()), grpo.token_loss(policy_batch(), {}))


def policy_batch() -> PolicyBatch:
    """Two completions, three tokens, ratios on both sides of the clip, advantages of both signs."""
    logp_old = torch.full((2, 3), -1.0)
    logp = logp_old + torch.tensor([[0.5, -0.5, 0.1], [-0.5, 0.5, 0.0]])
    return PolicyBatch(logp=logp, logp_old=logp_old, advantage=torch.tensor([[1.0], [-2.0]]).expand(2, 3), mask=torch.ones(2, 3, dtype=torch.bool),
                       length=torch.tensor([3, 3]), reward=torch.tensor([1.0, 0.0]), progress=0.5, max_length=4,
                       logp_ref=logp_old - 0.3, entropy=torch.ones(2, 3))


def varied_rollouts() -> RolloutBatch:
    """Three groups of four, four tokens wide: mixed, sparse, all right."""
    correct = torch.tensor([1., 0, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1])
    length = torch.tensor([1, 2, 3, 4, 4, 3, 2, 1, 2, 2, 3, 3])
    mask = torch.arange(4) < length.unsqueeze(-1)
    logp = -torch.arange(48.).reshape(12, 4) / 48
    return RolloutBatch(reward=correct, components={"correct": correct, "format": torch.ones(12)}, valid=correct > 0, truncated=length == 4,
                        group=torch.arange(12) // 4, mask=mask, length=length, logp_old=logp, logp_rollout=logp, step=0, progress=0.0,
                        max_length=4, logp_ref=logp, entropy=-logp)


def test_by_hand_pass_at_k():
    # G = 4, k = 2, W = 3 wrong: C(3,2)/C(4,2) = 1/2, C(2,1)/C(3,1) = 2/3, s = 1/2. A+ = (1/2) / s = 1, A- = (1/2 - 2/3) / s = -1/3.
    algorithm = replace(load(render(make(["pass-at-k"]), "T")), pass_k=2)
    found = algorithm.advantages(varied_rollouts(), {}).value
    torch.testing.assert_close(found[4:8], torch.tensor([1., -1 / 3, -1 / 3, -1 / 3]))
    torch.testing.assert_close(found[8:], torch.zeros(4))  # solved for certain: nothing to learn


def test_by_hand_opo_and_maxrl():
    # group 0: R = 1 0 1 0, |y| = 1 2 3 4: baseline (1 + 3) / 10 = 0.4
    found = load(render(make(["length-weighted-baseline"]), "T")).advantages(varied_rollouts(), {}).value
    torch.testing.assert_close(found[:4], torch.tensor([0.6, -0.4, 0.6, -0.4]))
    # group 1: mean 1/4, (1 - 1/4) / (1/4) = 3
    found = load(render(make(["maxrl"]), "T")).advantages(varied_rollouts(), {}).value
    torch.testing.assert_close(found[4:8], torch.tensor([3., -1, -1, -1]))


def test_seeds_are_sound_recipes():
    for name, names in SEEDS.items():
        alone = name in ("GRPO", "CONDITIONAL-NORMALIZATION")  # the empty recipe; without effect on plain rewards
        assert sound(make(names)) != alone, name
        assert name.lower().replace("-", "_") in seeds.SEEDS


# -- proposals ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def grown():
    return grow(OfflineProposer().propose, 200)


def test_two_hundred_proposals_are_distinct(grown):
    archive, drafts = grown
    assert len({fingerprint(d.files) for d in drafts}) == 200
    assert len({d.proposal.name for d in drafts}) == 200
    assert len({str(d.proposal.details["recipe"]) for d in drafts}) == 200


def test_proposals_state_what_they_test(grown):
    _, drafts = grown
    for draft in drafts:
        p, recipe = draft.proposal, of_proposal(draft.proposal)
        assert p.proposer == "offline" and p.parents and p.hypothesis.endswith(".") and p.expected_effect and p.sources
        assert sound(recipe) and p.details["recipe"] == recipe.to_json()
        algorithm = load(draft.files["algorithm.py"])
        assert tuple(m.name for m in algorithm.mechanisms) == p.mechanisms
        assert all(m.off for m in algorithm.mechanisms)
        assert ast.get_docstring(ast.parse(draft.files["algorithm.py"]))
        assert max(map(len, draft.files["algorithm.py"].splitlines())) <= 130


def test_a_proposal_names_what_a_part_brings_along():
    """leave-one-out is G / (G - 1) times the mean's advantage: that the std goes, too, is most of the change."""
    from poise_hpc.agent.offline import write

    archive = FakeArchive()
    alone = write(make(["leave-one-out"]), archive.context("c0001"))
    p = alone.proposal
    assert p.mechanisms == ("leave-one-out",)  # off is off together: `ablate` switches both
    for text in (p.hypothesis, p.description, alone.files["algorithm.py"]):
        assert "GRPO (c0000) with leave-one-out (which comes with no-std)" in text.replace("GRPO with", "GRPO (c0000) with"), text
    assert "no-std removes the bias" in p.hypothesis and "Dr.GRPO, Liu et al. 2025, arXiv:2503.20783" in p.sources
    lines = p.description.splitlines()
    assert lines[lines.index("- " + "leave-one-out: " + catalogue.parts()["leave-one-out"].formula) + 1] == "  comes with no-std: A is not divided by std R"
    assert off_text(alone.files, "leave-one-out") == "{'leave_one_out': False, 'divide_by_std': True}"  # what `ablate` says that it did
    archive.add("c0001", draft(["no-std"]), 30.0)
    child = write(make(["leave-one-out", "no-std"]), archive.context("c0002", "c0001")).proposal
    assert "(which comes with" not in child.hypothesis  # its parent has it already
    assert "  comes with no-std: " in child.description


def test_proposals_pass_gate_and_checks(grown):
    _, drafts = grown
    for draft in drafts:
        assert check_files(draft.files) == [], draft.proposal.name
    for draft in drafts[::10]:
        assert passes(draft.files["algorithm.py"]) == [], draft.proposal.name


def test_same_archive_same_draft(grown):
    _, drafts = grown
    _, again = grow(OfflineProposer().propose, 40)
    assert again == drafts[:40]
    _, other = grow(OfflineProposer().propose, 10, seed=1)
    assert [d.proposal.name for d in other] != [d.proposal.name for d in drafts[:10]]


def test_pending_proposals_are_not_repeated():
    archive, proposer = FakeArchive(), OfflineProposer()
    first = proposer.propose(archive.context("c0001"))
    archive.code["c0001"] = dict(first.files)
    # c0001 again, with the very same randomness, while the first is still pending
    second = proposer.propose(archive.context("c0001", pending=(("c0001", first.proposal),)))
    assert fingerprint(second.files) != fingerprint(first.files) and second.proposal.name != first.proposal.name


def share(archive: FakeArchive, symptom: str, **context) -> float:
    drafts = [OfflineProposer().propose(archive.context(f"c{k:04d}", **context)) for k in range(1, 60)]
    return sum(any(symptom in catalogue.parts()[m].helps for m in d.proposal.mechanisms) for d in drafts) / len(drafts)


def test_symptoms_and_directive_steer():
    plain, ill = FakeArchive(), FakeArchive()
    ill.reflections["c0000"] = Reflection("undecided", "", ("length-explosion",))
    assert share(ill, "length-explosion") > share(plain, "length-explosion") + 0.15
    assert share(plain, "length-explosion", directive="keep accuracy, shorten outputs") > share(plain, "length-explosion") + 0.15


def test_track_record_is_shrunk_and_failures_count():
    archive = FakeArchive()
    for k, (names, overall) in enumerate([(["clip-higher"], 36.0), (["clip-higher"], 34.0), (["sequence-ratio"], None)], 1):
        archive.add(f"c{k:04d}", draft(names), overall)
    # clip-higher: (6 + 4) / (2 + 2); sequence-ratio: -5 / (1 + 2)
    assert Tally(archive.entries).track_record == pytest.approx({"clip-higher": 2.5, "sequence-ratio": -5 / 3})
    weights = part_weights(archive.context("c0009"))
    assert weights["clip-higher"] > weights["dual-clip"] > 0
    assert weights["sequence-ratio"] < 1


def test_pairs_that_only_failed_are_avoided():
    archive = FakeArchive()
    archive.add("c0001", draft(["clip-higher", "token-mean"]), None)
    archive.add("c0002", draft(["clip-higher", "kl-k3"]), None)
    archive.add("c0003", draft(["clip-higher", "kl-k3"]), 30.0)
    assert Tally(archive.entries).failed_pairs == {("clip-higher", "token-mean")}


def test_a_pair_that_ran_and_was_screened_out_is_no_failure_and_counts_with_what_it_showed():
    from helpers_archive import screened

    entries = [*FakeArchive().entries, replace(screened("c0001", -6.0), mechanisms=("clip-higher", "token-mean"))]
    assert Tally(entries).failed_pairs == set()
    assert Tally(entries).track_record == pytest.approx({"clip-higher": -2.0, "token-mean": -2.0})  # -6 / (1 + 2)


def draft(names):
    from poise_hpc.agent.base import Draft

    recipe = make(names)
    proposal = replace(GRPO, name="+".join(names), mechanisms=tuple(p.name for p in declared(recipe)), details={"recipe": recipe.to_json()})
    return Draft(proposal, {"algorithm.py": render(recipe, "T")})


def test_crossover_names_the_second_parent():
    archive = FakeArchive()
    archive.add("c0001", draft(["clip-higher"]), 31.0)
    archive.add("c0002", draft(["sequence-sum", "drop-truncated", "kl-old"]), 31.0)
    reference = (Reference("c0002", "complementary", ""),)
    parents = [OfflineProposer().propose(archive.context(f"c{k:04d}", "c0001", references=reference)).proposal.parents for k in range(3, 40)]
    assert ("c0001", "c0002") in parents and ("c0001",) in parents


def test_foreign_parent_is_read_as_its_seed_or_its_mechanisms():
    assert of_proposal(replace(GRPO, name="DAPO")) == make(SEEDS["DAPO"])
    assert of_proposal(replace(GRPO, name="MINE", mechanisms=("clip-higher", "my-own-idea"))) == make(["clip-higher"])


def test_a_part_brings_what_it_implies_and_takes_it_along():
    recipe = make(["maxrl", "clip-higher"])
    assert recipe.by_slot["normalization"].name == "no-std"
    assert [p.name for p in declared(recipe)] == ["maxrl", "clip-higher"]
    algorithm = load(render(recipe, "T"))
    assert algorithm.without("maxrl").divide_by_std and not algorithm.without("clip-higher").divide_by_std
    with pytest.raises(KeyError, match="it declares: maxrl, clip-higher"):
        algorithm.without("no-std")


def test_sequence_ratio_narrows_the_clip():
    assert make(["sequence-ratio"]).values["clip"] < 0.1 < make([]).values["clip"]
    algorithm = load(render(make(["sequence-ratio"]), "T"))
    assert algorithm.without("sequence-ratio").clip == 0.2


def test_a_seed_that_was_added_is_a_parent_with_its_own_parts(tmp_path):
    """Not GRPO under another name: its children keep what it has."""
    from poise_hpc.algorithms.load import write_seed_package
    from poise_hpc.algorithms.seeds import SEEDS
    from poise_hpc.packages import baseline, read_package

    for name in SEEDS:
        write_seed_package(name, tmp_path / name)
        added = of_proposal(read_package(tmp_path / name).proposal)
        assert added == of_proposal(baseline(name).proposal), name
        assert bool(added.chosen) == (name != "grpo"), name
