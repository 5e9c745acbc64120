"""Slots do not wait for the slowest of a round, on a clock that is moved by hand; and what an asynchronous search sees, can be had again."""
from __future__ import annotations

import heapq
import random
import shutil
from pathlib import Path

import pytest
from helpers_campaign import campaign, noop_work
from helpers_drive import Mortal, ShuffledCluster, archive_of, drive

from poise_hpc import files
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.config import Search
from poise_hpc.controller import Controller

ASYNCHRONOUS = {"candidates": 6, "train_seeds": [0], "asynchronous": True, "window": 3}


class SimulatedCluster(InlineCluster):
    """A training job takes lognormal time (median 1, sigma 0.5), a check 0.02. Each look at the cluster moves time to the next end."""

    poll_s = 1.0

    def __init__(self, slots: int, seed: int):
        super().__init__(noop_work, slots)
        self.random, self.running, self.now = random.Random(seed), list[tuple[float, Path]](), 0.0
        self.counting, self.busy, self.passed = False, 0.0, 0.0

    def submit(self, attempts, name, stage, ranks):
        seconds = self.random.lognormvariate(0, 0.5) if stage == "train" else 0.02
        heapq.heappush(self.running, (self.now + seconds, attempts[0]))
        return [{"job_id": attempts[0].name}]

    def alive(self, submitted):
        end, attempt = heapq.heappop(self.running)
        if self.counting:
            self.busy += (len(self.running) + 1) * (end - self.now)
            self.passed += end - self.now
        self.now = end
        super().submit([attempt], "", "", 1)
        return {job.attempt: True for job in submitted}


def slot_use(root: Path, slots: int, seed: int = 0) -> float:
    """Share of slots at work between the first proposal and the last."""
    cluster, clock = SimulatedCluster(slots, seed), [1e9]
    driven = Controller(Campaign.open(root), cluster, OfflineProposer(), clock=lambda: clock[0])
    while not driven.finished:
        clock[0] += 10.0
        driven.step()           # one job ends
        while driven.step():    # what follows from it takes no time
            cluster.counting = driven.count > 1 and not driven.stop_proposing
    return cluster.busy / (slots * cluster.passed)


@pytest.mark.parametrize(("slots", "seeds"), [(4, 1), (8, 2), (2, 2)])
def test_an_asynchronous_search_keeps_its_slots_busy(tmp_path, slots, seeds):
    search = {"candidates": 30, "train_seeds": list(range(seeds)), "asynchronous": True}
    assert slot_use(campaign(tmp_path / "c", search=search).root, slots) > 0.95


def test_in_order_the_default_is_wide_enough_for_the_slots_that_it_is_made_for(tmp_path):
    """The lab's two slots and two seeds. Four slots and one seed wait for the slowest: `doctor` says so."""
    assert slot_use(campaign(tmp_path / "lab", search={"candidates": 30}).root, 2) > 0.95
    assert slot_use(campaign(tmp_path / "wide", search={"candidates": 30, "train_seeds": [0]}).root, 4) < 0.9


def test_the_width_by_hand():
    assert [Search().width(slots) for slots in (2, 100)] == [4, 4]  # the same search on any machine
    two_seeds = Search(asynchronous=True)
    assert [two_seeds.width(slots) for slots in (2, 8, 100)] == [4, 6, 75]  # 1.5 x slots / 2
    assert Search(asynchronous=True, window=10).width(100) == 10


# --- an asynchronous search can be had again

def picks(root):
    return {p.parent.name: files.read_json(p) for p in sorted(root.glob("candidates/c*/pick.json"))}


def test_the_same_order_of_completions_gives_the_same_search(tmp_path):
    runs = {name: campaign(tmp_path / name, search=ASYNCHRONOUS).root for name in ("one", "two", "other")}
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        drive(runs[name], ShuffledCluster(seed))
    assert archive_of(runs["one"]) == archive_of(runs["two"])
    assert picks(runs["one"]) != picks(runs["other"])


def test_each_proposal_sees_all_that_is_archived_and_no_more_are_in_flight_than_the_window(tmp_path):
    root = campaign(tmp_path / "c", search=ASYNCHRONOUS).root
    drive(root, ShuffledCluster(1))
    found = picks(root)
    assert found["c0001"]["pending"] == [] and all(len(p["pending"]) < 3 for p in found.values())
    assert all(p["visible"] == int(id[1:]) - len(p["pending"]) for id, p in found.items())
    # ... and some saw a younger one while an older one still ran, which in order they would have waited for.
    assert any(p["pending"] and int(p["pending"][0][1:]) < int(id[1:]) - len(p["pending"]) for id, p in found.items())


@pytest.mark.parametrize("seed", range(3))
def test_made_again_from_its_picks_whatever_ends_first(tmp_path, seed):
    """As a replay does: what each candidate saw is read back, and it waits for that."""
    origin = campaign(tmp_path / "origin", search=ASYNCHRONOUS).root
    drive(origin, ShuffledCluster(7))
    again = campaign(tmp_path / "again", search=ASYNCHRONOUS).root
    for id in picks(origin):
        (again / "planned" / id).mkdir(parents=True)
        shutil.copyfile(origin / "candidates" / id / "pick.json", again / "planned" / id / "pick.json")
    drive(again, ShuffledCluster(seed, slots=1 + seed))
    assert archive_of(again) == archive_of(origin)


@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_what_was_seen_stays(tmp_path, seed):
    draw, root, known = random.Random(seed), campaign(tmp_path / "c", search=ASYNCHRONOUS).root, {}
    while True:
        with Mortal(draw.randrange(1, 150)):
            drive(root)
            break
        assert known == {id: picks(root)[id] for id in known}
        known = picks(root)
    assert len(archive_of(root)) == 7 and known == {id: picks(root)[id] for id in known}


def test_a_proposal_that_was_begun_before_a_kill_sees_the_same(tmp_path):
    """The proposer was asked for c0003 when c0001 was still running; killed, it is asked again when c0001 is done."""
    opened = campaign(tmp_path / "c", search=ASYNCHRONOUS | {"candidates": 2})
    drive(opened.root)
    files.write_json(opened.root / "proposing.json", {"id": "c0003", "pending": ["c0001"]})
    driven = Controller(Campaign.open(opened.root), InlineCluster(noop_work), OfflineProposer())
    hidden = driven.proposing.hidden(3, {})
    context, pick = driven.proposing.context("c0003", hidden)
    assert [e.id for e in context.entries] == ["c0000", "c0002"] and [id for id, _ in context.pending] == ["c0001"]
    assert (pick["visible"], pick["pending"]) == (2, ["c0001"])
