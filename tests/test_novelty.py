"""The novelty gate: what counts as a repetition, and what does not; the literature cards."""
from __future__ import annotations

from dataclasses import replace

import pytest

from helpers_offline import GRPO, FakeArchive
from poise_hpc.agent.base import Draft
from poise_hpc.agent.catalogue import SLOTS
from poise_hpc.agent.novelty import check_novelty, fingerprint
from poise_hpc.agent.priors import OURS, choose_cards, load_cards, read_card
from poise_hpc.types import Reflection, UsageError

CODE = '''"""A doc."""
class Mine(Algorithm):
    clip: float = 0.2

    def token_loss(self, batch, state):
        """A doc."""
        w = ratio(batch)  # a comment
        return -w * batch.advantage
'''
RENAMED = '''class Other(Algorithm):
    clip: float = 0.2
    def token_loss(self, microbatch, memory) -> "Tensor":
        weight = ratio(microbatch)
        return -weight * microbatch.advantage
'''


def draft(code=CODE, **proposal):
    defaults = dict(name="MINE", parents=("c0000",), mechanisms=("my-clip",), hypothesis="Clipping by length helps long answers.",
                    description="The clip range grows with the root of the completion's length, up to 0.4.", proposer="llm:x")
    return Draft(replace(GRPO, **defaults | proposal), {"algorithm.py": code} if code else {})


@pytest.fixture
def archive():
    out = FakeArchive()
    out.add("c0001", draft(), 31.0)
    return out


def verdict(archive, other):
    return check_novelty(other, archive.context("c0002"))


TEXT = dict(hypothesis="Another idea altogether.", description="Advantages are divided by a running scale, kept in state.")


def test_same_mechanisms_and_hyperparameters(archive):
    reason = verdict(archive, draft(CODE.replace("-w *", "-2 * w *"), **TEXT))
    assert "mechanisms and the hyperparameters of c0001 (MINE)" in reason


def test_another_hyperparameter_is_new(archive):
    assert verdict(archive, draft(CODE.replace("0.2", "0.3"), **TEXT)) is None


@pytest.mark.parametrize(("value", "same"), [(0.2, True), ("2e-1", True), (0.25, False)])
def test_stated_numbers_are_compared_with_written_ones(archive, value, same):
    stated = draft(CODE.replace("-w *", "-2 * w *"), details={"hyperparameters": {"clip": value}}, **TEXT)
    assert (verdict(archive, stated) is not None) == same


def test_same_code_under_other_names(archive):
    assert fingerprint({"a.py": CODE}) == fingerprint({"a.py": RENAMED})
    reason = verdict(archive, draft(RENAMED, mechanisms=("my-clip", "new-name"), **TEXT))
    assert "its code is that of c0001" in reason


@pytest.mark.parametrize("change", [("-w *", "w *"), ("batch.advantage", "batch.reward"), ("clip: float", "clamp: float"), ("ratio(", "log_ratio(")])
def test_another_formula_is_another_code(change):
    assert fingerprint({"a.py": CODE}) != fingerprint({"a.py": CODE.replace(*change)})


def test_nearly_the_same_text(archive):
    reason = verdict(archive, draft(CODE.replace("0.2", "0.3"), hypothesis="Clipping by length helps long answers!", parents=("c0001",)))
    assert "reads like that of c0001" in reason


def test_a_changed_number_in_the_text_is_a_change(archive):
    text = "The clip range grows with the root of the completion's length, up to 0.8."
    assert verdict(archive, draft(CODE.replace("0.2", "0.3"), description=text)) is None


def test_proposal_alone_is_compared(archive):
    assert "c0001" in verdict(archive, draft(code=None))
    assert verdict(archive, draft(code=None, mechanisms=("my-clip", "other"), **TEXT)) is None


def test_pending_counts(archive):
    archive.code["c0002"] = {"algorithm.py": CODE.replace("0.2", "0.5")}
    pending = (("c0002", draft(**TEXT).proposal),)
    again = draft(CODE.replace("0.2", "0.5"), hypothesis="A third one.", description="Nothing like the others at all.")
    assert "c0002" in check_novelty(again, archive.context("c0003", pending=pending))
    assert check_novelty(again, archive.context("c0003")) is None


def test_broken_code_is_compared_as_text(archive):
    assert verdict(archive, draft("def broken(:", **TEXT)) is None


def test_unrelated_entries_are_not_opened(archive):
    class Closed(dict):
        def __getitem__(self, key):
            raise AssertionError(f"{key} was opened")

    archive.proposals = Closed(archive.proposals)
    context = replace(FakeArchive().context("c0002"), entries=tuple(e for e in archive.entries if e.mechanisms), proposals=archive.proposals)
    assert check_novelty(draft(mechanisms=("quite", "different"), **TEXT), context) is None


# -- literature cards --------------------------------------------------------------------------------------------------

SEED_CARDS = {"GRPO", "Dr.GRPO", "RLOO", "REINFORCE++", "DAPO", "GSPO", "GMPO", "SAPO", "CISPO", "ASPO", "TOPR", "GPG", "MaxRL",
              "Analytic variance", "Validity masking", "Conditional normalization", "Correctness-first length shaping"}


def test_our_cards():
    cards = load_cards()
    assert SEED_CARDS <= {card.name for card in cards} and len(cards) == len(list(OURS.glob("*.md")))
    for card in cards:
        assert card.slots and set(card.slots) <= set(SLOTS), card.name
        assert card.tags and 2016 <= card.year <= 2026, card.name
        assert all(word in card.text for word in ("Helps", "Hurts", "Source")), card.name
        assert 6 <= len(card.text.splitlines()) <= 30, card.name


def test_users_cards_are_added_and_replace_ours(tmp_path):
    head = "---\nname: {}\nslots: clipping\narxiv:\nyear: 2026\ntags: kl-spike\n---\nMine.\n"
    (tmp_path / "a.md").write_text(head.format("GRPO"))
    (tmp_path / "b.md").write_text(head.format("A new one"))
    cards = {card.name: card for card in load_cards(tmp_path)}
    assert cards["GRPO"].text == "Mine." and cards["A new one"].arxiv == "" and len(cards) == len(load_cards()) + 1


@pytest.mark.parametrize("text, message", [("no front matter", "front matter"), ("---\nname: X\n---\nText", "lacks slots, arxiv, year, tags"),
                                           ("---\nname: X\nslots: kl\narxiv:\nyear: soon\ntags: a\n---\nT", "'soon'")])
def test_bad_cards_are_named(tmp_path, text, message):
    (tmp_path / "bad.md").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_card(tmp_path / "bad.md")


def test_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="not a folder"):
        load_cards(tmp_path / "none")


def test_cards_for_the_symptoms_come_first():
    archive = FakeArchive()
    archive.reflections["c0000"] = Reflection("undecided", "", ("length-explosion",))
    chosen = choose_cards(load_cards(), archive.context("c0001"), count=3)
    tagged = [c.name for c in load_cards() if "length-explosion" in c.tags]
    assert chosen.count("### ") == 3 and all(line[4:].split(" (")[0] in tagged for line in chosen.splitlines() if line.startswith("### "))


def test_cards_rotate():
    archive = FakeArchive()
    assert choose_cards(load_cards(), archive.context("c0001")) != choose_cards(load_cards(), archive.context("c0002"))
    assert choose_cards(load_cards(), archive.context("c0001")) == choose_cards(load_cards(), archive.context("c0001"))
