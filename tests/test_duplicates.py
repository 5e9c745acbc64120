"""A candidate that computes what a visible one did is not trained."""
from __future__ import annotations

import re
from dataclasses import replace

import pytest
from helpers_campaign import campaign, noop_work
from helpers_drive import Clock, Mortal, ShuffledCluster, archive_of, controller, drive, finish, no_power_cut, write_package

from poise_hpc import derived, files, orders
from poise_hpc.agent.base import DraftRejected
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.agent.tally import Tally
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.controller import Controller
from poise_hpc.types import Outcome

SMALL = {"search": {"candidates": 4, "train_seeds": [0], "window": 1}}


def digests(**known):
    """noop jobs whose checks find these digests; what is not named has its own."""
    def work(attempt, job):
        result = noop_work(attempt, job)
        if job["kind"] == "check":
            result["payload"]["digest"] = known.get(job["candidate"], job["candidate"])
        return result

    return work


def stages(root, id):
    return sorted({re.sub(r"(-s\d+)?-\d+$", "", p.name) for p in (root / "candidates" / id / "attempts").iterdir()})


def test_a_repetition_ends_before_training_and_names_what_it_repeats(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, InlineCluster(digests(c0002="x", c0004="x")))
    found = archive_of(root)
    assert {id: e["outcome"] for id, e in found.items() if e["outcome"] != Outcome.SUCCEEDED} == {"c0004": Outcome.CANDIDATE_ERROR}
    assert found["c0004"]["cause"] == "duplicate" and f"computes the same as c0002 ({found['c0002']['name']})" in found["c0004"]["message"]
    assert stages(root, "c0004") == ["check"] and "train" in stages(root, "c0002")
    assert found["c0004"]["hashes"]["digest"] == "x" and "c0002" in found["c0004"]["reflection"]["text"]


def test_only_what_it_was_allowed_to_see_counts(tmp_path):
    """Window 4: c0004 has seen the baseline alone. c0002 is pending, whether its job is done or not."""
    records = []
    for seed in range(3):
        root = campaign(tmp_path / str(seed), search=SMALL["search"] | {"window": 4}).root
        drive(root, ShuffledCluster(seed, work=digests(c0002="x", c0003="c0000", c0004="x")))
        records.append(archive_of(root))
        assert {id for id, e in records[-1].items() if e["cause"] == "duplicate"} == {"c0003"}  # repeats the baseline
    assert records[0] == records[1] == records[2]


def test_what_never_trained_is_no_original(tmp_path):
    """c0001 fails before its first step: nothing is known of x, and c0002 is trained. It is what c0003 repeats."""
    def work(attempt, job):
        if (job["kind"], job["candidate"]) == ("train", "c0001"):
            return {"outcome": Outcome.CANDIDATE_ERROR, "cause": "raised", "message": "", "payload": {}}
        return digests(c0001="x", c0002="x", c0003="x")(attempt, job)

    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, InlineCluster(work))
    found = archive_of(root)
    assert [found[id]["cause"] for id in ("c0001", "c0002", "c0003", "c0004")] == ["raised", "", "duplicate", ""]
    assert "same as c0002" in found["c0003"]["message"]


def test_unknown_digests_are_not_equal(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, InlineCluster(digests(c0000="", c0001="", c0002="")))
    assert not any(e["cause"] for e in archive_of(root).values())


def test_persons_packages_and_derived_campaigns_are_never_refused(tmp_path):
    created = campaign(tmp_path / "c", **SMALL)
    orders.package(created, write_package(tmp_path / "own", seed="grpo"), None)
    same = InlineCluster(digests(**{f"c{n:04d}": "x" for n in range(6)}))
    drive(created.root, same)
    found = archive_of(created.root)
    assert [id for id, e in found.items() if e["outcome"] == Outcome.SUCCEEDED] == ["c0000", "c0001"] and found["c0001"]["name"] == "mine"
    ablation = derived.create("ablate", Campaign.open(created.root), "c0001", None, None)
    drive(ablation.root, same)
    assert all(e["outcome"] == Outcome.SUCCEEDED for e in archive_of(ablation.root).values())


def test_a_person_is_told_of_a_repetition(tmp_path):
    created = campaign(tmp_path / "c", search=SMALL["search"] | {"candidates": 1})
    drive(created.root, work := InlineCluster(digests(c0002="c0001")))
    orders.package(created, write_package(tmp_path / "own"), None)
    drive(created.root, work)
    told = [line for line in (created.root / "events.log").read_text().splitlines() if "check repeats" in line]
    assert len(told) == 1 and "c0002 " in told[0] and "it computes the same as c0001 (" in told[0] and "trained all the same" in told[0]
    assert "train" in stages(created.root, "c0002")


def test_killed_at_every_write_it_is_refused_all_the_same(tmp_path, monkeypatch):
    no_power_cut(monkeypatch)
    change = {"search": {"candidates": 1, "train_seeds": [0]}, "evaluate": {"at": [1.0], "benchmarks": {
        "easy": {"split": "easy", "problems": 4, "samples": 2, "metrics": {"acc@1": 1.0}}}}}
    twin = InlineCluster(digests(c0001="c0000"))
    drive(root := campaign(tmp_path / "undisturbed", **change).root, twin)
    wanted = archive_of(root)
    assert wanted["c0001"]["cause"] == "duplicate"
    for n in range(1000):
        root = campaign(tmp_path / f"n{n}", **change).root
        with Mortal(n) as mortal:
            drive(root, twin)
        drive(root, twin)
        assert archive_of(root) == wanted and stages(root, "c0001") == ["check"], f"killed before change {n}"
        if mortal.calls <= n:
            break
    assert n > 40


def test_a_lost_status_changes_nothing(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, InlineCluster(digests(c0002="x", c0004="x")))
    wanted = archive_of(root)
    (root / "records" / "c0004.h5").unlink()
    (root / "candidates" / "c0004" / "status.json").unlink()
    controller(root)
    drive(root, InlineCluster(digests(c0002="x", c0004="x")))
    assert archive_of(root) == wanted


def test_the_offline_proposer_does_not_blame_the_parts_of_a_duplicate(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    entries = drive(root, InlineCluster(digests(c0002="x", c0004="x"))).archive.entries
    assert entries[4].cause == "duplicate" and entries[4].digest == "x"
    without = Tally([e for e in entries if e.id != "c0004"])
    assert Tally(entries).track_record == without.track_record and Tally(entries).failed_pairs == without.failed_pairs
    assert files.read_json(root / "candidates" / "c0004" / "pick.json")["visible"] == 4


class Writer(OfflineProposer):
    """Offline proposals under a model's name, with an author that can be asked. `told`: what it got to hear."""

    def __init__(self, gives_up):
        super().__init__()
        self.gives_up, self.told = gives_up, []

    def propose(self, context):
        draft = super().propose(context)
        return replace(draft, proposal=replace(draft.proposal, proposer="llm:x"))

    def confirm(self, id, draft, response):
        return []

    def repair(self, id, draft, messages):
        self.told.append((id, *messages))
        if self.gives_up:
            raise DraftRejected("check-failed", "no round is left", draft)
        return replace(draft, files=draft.files | {"algorithm.py": draft.files["algorithm.py"] + "# revised\n"})


@pytest.mark.parametrize("gives_up", [False, True])
def test_an_author_is_told_and_may_revise(tmp_path, gives_up):
    root, writer = campaign(tmp_path / "c", **SMALL).root, Writer(gives_up)
    work = digests(c0002="x", c0004="x")
    driven = Controller(Campaign.open(root), InlineCluster(lambda attempt, job: work(attempt, job) if job["attempt"] == 1 else noop_work(attempt, job)),
                        writer, clock=Clock())
    found = (finish(driven), archive_of(root))[1]
    assert [told[0] for told in writer.told] == ["c0004"] and "it computes the same as c0002" in writer.told[0][1]
    if gives_up:
        assert (found["c0004"]["outcome"], found["c0004"]["cause"]) == (Outcome.CANDIDATE_ERROR, "duplicate")
    else:
        assert found["c0004"]["outcome"] == Outcome.SUCCEEDED and found["c0004"]["code"]["algorithm.py"].endswith("# revised\n")
