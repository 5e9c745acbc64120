"""A check's end seen by the package's author, and the versions of a package."""
from __future__ import annotations

import os

import pytest
from helpers_agent import proposal
from helpers_campaign import campaign, noop_work
from helpers_drive import Mortal

from poise_hpc import packages
from poise_hpc.agent.base import Draft, DraftRejected
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.controller import Controller
from poise_hpc.reviewing import Ending, review
from poise_hpc.transcript import BudgetExceeded
from poise_hpc.types import Outcome

DRAFT = Draft(proposal("ONE", ("one",)), {"algorithm.py": "A = 1\n", "more.py": "B = 2\n"})
FIXED = Draft(proposal("ONE", ("one",), repairs=1), {"algorithm.py": "A = 3\n"})
PASSED = {"outcome": Outcome.SUCCEEDED, "cause": "", "message": "", "payload": {"response": {"valid": 0.0}}}
FAILED = {"outcome": Outcome.CANDIDATE_ERROR, "cause": "hang", "message": "no end\nin line 3", "payload": {}}


class Author:
    """Says what it is told to; an exception is raised. `seen`: the messages that it got."""

    def __init__(self, doubts=(), repaired=FIXED):
        self.doubts, self.repaired, self.seen = doubts, repaired, None

    def confirm(self, id, draft, response):
        if isinstance(self.doubts, Exception):
            raise self.doubts
        return list(self.doubts)

    def repair(self, id, draft, messages):
        self.seen = messages
        if isinstance(self.repaired, Exception):
            raise self.repaired
        return self.repaired


NO_MONEY, NO_ROUND = BudgetExceeded("spent"), DraftRejected("check-failed", "still wrong", DRAFT)


@pytest.mark.parametrize(("author", "check", "ending"), [
    (Author(), PASSED, Ending("accepted")),
    (Author(), FAILED, Ending("revised", FIXED)),
    (Author(["`valid` is never used"]), PASSED, Ending("revised", FIXED)),
    (Author(repaired=NO_ROUND), FAILED, Ending("rejected", None, "hang", "still wrong")),  # the check's own cause stays
    (Author(["unused"], NO_ROUND), PASSED, Ending("rejected", None, "inconsistent", "still wrong")),
    (Author(repaired=DraftRejected("gate", "os", FIXED)), FAILED, Ending("rejected", FIXED, "gate", "os")),
    (Author(NO_MONEY), PASSED, Ending("accepted")),  # the checks passed, and nobody can be asked about the rest
    (Author(repaired=NO_MONEY), FAILED, Ending("rejected", None, "hang", "no end\nin line 3\nnot repaired: spent")),
    (Author(["unused"], NO_MONEY), PASSED, Ending("rejected", None, "inconsistent", "unused\nnot repaired: spent")),
])
def test_how_a_review_ends(author, check, ending):
    assert review(author, "c0001", DRAFT, check) == ending


def test_the_author_gets_the_checks_lines():
    author = Author()
    review(author, "c0001", DRAFT, FAILED)
    assert author.seen == ["no end", "in line 3"]


def test_a_revision_keeps_the_old_package_and_leaves_nothing_of_it_behind(tmp_path):
    opened = campaign(tmp_path / "c")
    candidate = packages.create_candidate(opened, "c0001", DRAFT, None)
    packages.revise(candidate, 1, FIXED)
    assert candidate.version == 2 == opened.load("c0001").version
    assert packages.read(candidate.folder, 1) == DRAFT and packages.read(candidate.folder, 2) == FIXED
    assert sorted(p.name for p in candidate.folder.glob("*.py")) == ["algorithm.py"] and opened.code("c0001") == FIXED.files


def test_a_revision_killed_at_any_write_is_completed_by_the_next(tmp_path):
    calls = None
    for at in range(200):
        opened = campaign(tmp_path / str(at))
        candidate = packages.create_candidate(opened, "c0001", DRAFT, None)
        with Mortal(at) as mortal:
            packages.revise(candidate, 1, FIXED)
            calls = mortal.calls
        again = opened.load("c0001")
        assert packages.read(again.folder, 1) == DRAFT
        packages.revise(again, 1, FIXED)
        assert (packages.read(again.folder, 1), packages.read(again.folder, 2), again.version) == (DRAFT, FIXED, 2)
        assert not [n for n in os.listdir(again.folder) if n == "more.py"]
        if calls is not None:
            break
    assert calls is not None and calls == at


def test_later_candidates_see_the_first_version_of_what_is_pending(tmp_path):
    """Whether a repair is fast or slow must not change what the next proposal is made from."""
    opened = campaign(tmp_path / "c", search={"candidates": 0, "train_seeds": [0]})
    driven = Controller(opened, InlineCluster(noop_work), OfflineProposer())
    while not driven.finished:
        driven.step()
    candidate = packages.create_candidate(opened, "c0001", DRAFT, None)
    for _ in range(2):
        context, _ = driven.proposing.context("c0002", ["c0001"])
        assert context.pending == (("c0001", DRAFT.proposal),) and context.code("c0001") == DRAFT.files
        packages.revise(candidate, 1, FIXED)
