"""What the controller must not do once per archived entry: open files. Counted, not timed."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest
from helpers_offline import FakeArchive, entry

from poise_hpc.agent import novelty, offline
from poise_hpc.agent.base import Context
from poise_hpc.agent.recipe import of_proposal
from poise_hpc.agent.tally import Tally
from poise_hpc.types import candidate_id

ENTRIES = 400


class Opened(dict):
    """A mapping that counts what is read from it, as a campaign reads a file for each."""

    count = 0

    def __getitem__(self, key):
        self.count += 1
        return super().__getitem__(key)


@pytest.fixture(scope="module")
def archive() -> FakeArchive:
    """Distinct recipes, each around a random older one, as a long campaign has them."""
    archive, rng, seen = FakeArchive(), random.Random(0), set()
    while len(archive.entries) < ENTRIES:
        id, parent = candidate_id(len(archive.entries)), rng.choice(archive.entries)
        around = Context(id, 0, parent, {}, archive.proposals[parent.id])
        recipe = next(r for r in offline.candidates(around) if r not in seen)
        seen.add(recipe)
        draft = offline.write(recipe, around)
        archive.add(id, draft, rng.gauss(30, 3))
        archive.entries[-1] = replace(entry(id, draft.proposal, 30.0), signature=novelty.signature(draft.proposal, draft.files))
    return archive


def propose(archive: FakeArchive, number: int, signed: bool):
    """(draft, files opened) of one proposal."""
    context = archive.context(candidate_id(ENTRIES + number), f"c{7 * number:04d}")
    entries = context.entries if signed else tuple(replace(e, signature="") for e in context.entries)
    proposals, code = Opened(archive.proposals), Opened(archive.code)
    draft = offline.OfflineProposer().propose(replace(context, entries=entries, proposals=proposals, code=code.__getitem__))
    return draft, proposals.count + code.count


def test_a_proposal_opens_few_of_the_archived_candidates_and_is_the_same(archive):
    with_signatures, without = ([propose(archive, number, signed) for number in range(8)] for signed in (True, False))
    assert [draft for draft, _ in with_signatures] == [draft for draft, _ in without]
    opened, all_neighbours = sum(n for _, n in with_signatures) / 8, sum(n for _, n in without) / 8
    assert opened <= 3, f"{opened} files a proposal"
    assert all_neighbours > 10 * max(opened, 1)


def test_every_repetition_is_found_by_its_signature(archive):
    context = archive.context("c9999", "c0001")
    for e in archive.entries[1::20]:
        draft = offline.write(of_proposal(archive.proposals[e.id]), context)  # another name, another hypothesis
        assert f"of {e.id} " in (novelty.check_novelty(draft, context) or ""), e.id


def test_a_signature_of_another_python_is_not_trusted(archive, monkeypatch):
    context = archive.context("c9999", "c0001")
    draft = offline.write(of_proposal(archive.proposals["c0300"]), context)
    monkeypatch.setattr(novelty, "PYTHON", "9.99")
    monkeypatch.setattr(novelty, "hyperparameters", lambda proposal, files: None)
    assert "its code is that of c0300" in (novelty.check_novelty(draft, context) or "")


def test_a_tally_that_grew_is_that_of_the_whole_archive(archive):
    tally = Tally()
    for size in (1, 50, 51, 200, 120, ENTRIES):  # 120: another, shorter archive
        entries, fresh = tuple(archive.entries[:size]), Tally(archive.entries[:size])
        tally.see(entries)
        assert (tally.track_record, tally.failed_pairs, tally.names) == (fresh.track_record, fresh.failed_pairs, fresh.names)
        assert all(tally.alike(e.signature) == fresh.alike(e.signature) for e in entries[::17])
        assert archive.entries[size - 1] in tally.alike(archive.entries[size - 1].signature)
