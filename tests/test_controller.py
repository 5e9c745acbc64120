"""The reconciler against jobs that end at once: whatever is killed, late, failing or out of order, the archive is the same."""
from __future__ import annotations

import json
import os
import random
import re
import shutil

import pytest
from helpers_campaign import campaign, noop_work
from helpers_drive import Killed, Mortal, ShuffledCluster, archive_of, controller, drive, failing, finish, no_power_cut, write_package

from poise_hpc import archive, files, orders, packages, worker
from poise_hpc.algorithms import load
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.cluster.slurm import SchedulerAway
from poise_hpc.types import Outcome, PoiseError, Stage

SMALL = {"search": {"candidates": 4, "train_seeds": [0, 1]}}
TINY = {"search": {"candidates": 1, "train_seeds": [0]}, "evaluate": {"at": [1.0], "benchmarks": {
    "easy": {"split": "easy", "problems": 4, "samples": 2, "metrics": {"acc@1": 1.0}}}}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = campaign(tmp_path_factory.mktemp("undisturbed") / "c", **SMALL).root
    drive(root)
    return archive_of(root)


def test_a_campaign_ends_with_everything_archived(undisturbed):
    assert list(undisturbed) == ["c0000", "c0001", "c0002", "c0003", "c0004"]
    assert all(e["outcome"] == Outcome.SUCCEEDED and e["seeds"] == (0, 1) for e in undisturbed.values())
    assert undisturbed["c0000"]["parents"] == () and all(e["parents"] for id, e in undisturbed.items() if id != "c0000")


@pytest.mark.parametrize(("evaluate_by", "seed"), [*(("train", seed) for seed in range(4)), ("seed", 0), ("element", 0), ("element", 1),
                                                     ("chunk", 0), ("chunk", 3)])
def test_the_order_in_which_jobs_end_changes_nothing(undisturbed, tmp_path, seed, evaluate_by):
    """Chunks of 6 completions are of several problems, those of 3 are a part of one problem's 4 samples."""
    root = campaign(tmp_path / "c", **SMALL, jobs={"evaluate_by": evaluate_by}, evaluate={"chunk_completions": 6 if seed == 0 else 3}).root
    drive(root, ShuffledCluster(seed, slots=2 + seed))
    def numbers(found):
        return {id: {k: v for k, v in entry.items() if k != "config"} for id, entry in found.items()}  # it names evaluate_by and chunk_completions

    assert numbers(archive_of(root)) == numbers(undisturbed)


def test_a_record_says_how_its_completions_are_read(undisturbed):
    assert all(e["vocabulary"] == {"symbols": ["a"]} for e in undisturbed.values())  # what the prepare job said


def test_a_scheduler_that_takes_no_jobs_for_long_leaves_nothing_behind(undisturbed, tmp_path):
    """sbatch says "not now" 100 times while squeue answers that there is no such job: one batch is announced at a time, and forgotten."""
    class Closed(InlineCluster):
        refused, most = 0, 0

        def submit(self, attempts, name, stage, ranks):
            if stage == Stage.CHECK and self.refused < 100:
                self.refused += 1
                self.most = max(self.most, len(list(root.glob("candidates/*/attempts/*"))))
                return None
            return super().submit(attempts, name, stage, ranks)

    root = campaign(tmp_path / "c", **SMALL).root
    cluster = Closed(noop_work)
    drive(root, cluster)
    assert cluster.refused == 100 and cluster.most == 1
    assert archive_of(root) == undisturbed


def test_the_window_rule(tmp_path):
    """In order: candidate k waits for 1 .. k - window, sees exactly these, and counts the rest as pending."""
    root = campaign(tmp_path / "c", search={"candidates": 6, "window": 2, "train_seeds": [0]}).root
    drive(root, ShuffledCluster(0, slots=8))
    picks = {n: files.read_json(root / "candidates" / f"c{n:04d}" / "pick.json") for n in range(1, 7)}
    assert [picks[n]["visible"] for n in range(1, 7)] == [1, 1, 2, 3, 4, 5]
    assert [picks[n]["pending"] for n in range(1, 7)] == [[], ["c0001"], ["c0002"], ["c0003"], ["c0004"], ["c0005"]]


# --- kills

def test_killed_at_every_write_nothing_is_lost_or_doubled(tmp_path, monkeypatch):
    """A campaign with a proposed and an added candidate. The controller (and the job it runs inline) dies before its n-th
    change of the file system, for every n; opened again, it ends with the archive of the undisturbed campaign."""
    no_power_cut(monkeypatch)
    package = write_package(tmp_path / "own")

    def fresh(name):
        created = campaign(tmp_path / name / "c", **TINY)
        orders.package(created, package, None)
        return created.root

    drive(root := fresh("undisturbed"))
    wanted = without_inbox_times(archive_of(root))
    assert list(wanted) == ["c0000", "c0001", "c0002"] and wanted["c0001"]["name"] == "mine"
    n, kills = 0, 0
    while True:
        root = fresh(f"n{n}")
        with Mortal(n) as mortal:
            drive(root)
        again = drive(root)
        assert without_inbox_times(archive_of(root)) == wanted, f"killed before change {n}"
        assert not again.held and not any((root / "inbox").iterdir())
        assert sorted(p.name for p in (root / "candidates").glob("c*")) == list(wanted)
        kills += mortal.calls > n
        if mortal.calls <= n:
            break
        n += 1
    assert kills == n > 100  # the last round was not killed: every write has been hit


def without_inbox_times(found):
    text = re.sub(r'"inbox": "\d+-', '"inbox": "', json.dumps(found, default=repr))
    return json.loads(text)


@pytest.mark.parametrize("seed", range(8))
def test_killed_again_and_again(undisturbed, tmp_path, seed):
    """Every life of the controller ends after a random number of changes, until one gets through."""
    draw = random.Random(seed)
    root = campaign(tmp_path / "c", **SMALL).root
    lives = 0
    while True:
        lives += 1
        with Mortal(draw.randrange(1, 200)):
            drive(root)
            break
    assert lives > 1
    found = archive_of(root)
    assert found == undisturbed


def test_a_job_that_outlives_its_controller_is_adopted(undisturbed, tmp_path):
    """The controller dies after the cluster took the job and before it wrote the id down."""
    root = campaign(tmp_path / "c", **SMALL).root
    cluster = ShuffledCluster(0)
    cluster.find = lambda job: {"job_id": "found"} if job.attempt in cluster.queue else None
    real = cluster.submit

    def submit_and_die(*arguments):
        real(*arguments)
        raise Killed

    cluster.submit = submit_and_die
    with pytest.raises(Killed):
        drive(root, cluster)
    cluster.submit = real
    drive(root, cluster)
    assert archive_of(root) == undisturbed
    assert "prepare adopted" in (root / "events.log").read_text()
    assert [p.name for p in (root / "prepare" / "attempts").iterdir()] == ["prepare-1"]


# --- failures

@pytest.mark.parametrize("kind", ["check", "train", "evaluate"])
def test_a_candidate_error_is_archived_with_its_cause(tmp_path, kind):
    root = campaign(tmp_path / "c", **SMALL, jobs={"evaluate_by": "seed"}).root
    driven = drive(root, InlineCluster(failing(kind, "c0002", Outcome.CANDIDATE_ERROR, "nonfinite-loss")))
    assert not driven.held
    found = archive_of(root)["c0002"]
    assert (found["outcome"], found["cause"], found["message"]) == (Outcome.CANDIDATE_ERROR, "nonfinite-loss", f"nonfinite-loss in {kind}")
    assert found["score"] is None and found["reflection"]["verdict"] == "failed"
    assert len(archive_of(root)) == 5  # the search went on


def test_the_lowest_failed_seed_is_the_cause_whatever_ends_first(tmp_path):
    def work(attempt, job):
        if job["kind"] == "train" and job["candidate"] == "c0001":
            return {"outcome": Outcome.CANDIDATE_ERROR, "cause": f"of-seed-{job['seed']}", "message": "", "payload": {}}
        return noop_work(attempt, job)

    causes = set()
    for seed in range(4):
        root = campaign(tmp_path / str(seed), **SMALL).root
        drive(root, ShuffledCluster(seed, work=work))
        causes.add(archive_of(root)["c0001"]["cause"])
    assert causes == {"of-seed-0"}


@pytest.mark.parametrize("times", [1, 3])
def test_infrastructure_errors_are_repeated(undisturbed, tmp_path, times):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, InlineCluster(failing("train", "c0001", Outcome.INFRA_ERROR, times=times, seed=1)))
    assert archive_of(root) == undisturbed
    assert len(list((root / "candidates/c0001/attempts").glob("train-s1-*"))) == times + 1


def test_held_after_the_limit_and_retried_by_a_person(undisturbed, tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    driven = drive(root, InlineCluster(failing("train", "c0001", Outcome.INFRA_ERROR, "worker-died", seed=1)))
    assert [(c.id, c.held_from, c.cause) for c in driven.held] == [("c0001", Stage.TRAIN, "worker-died")]
    assert len(list((root / "candidates/c0001/attempts").glob("train-s1-*"))) == 4  # once, and infra_retries times more
    assert "poise-hpc retry" in (root / "events.log").read_text()
    orders.give(driven.campaign, "retry", "c0001")
    driven = drive(root)
    assert not driven.held
    # A held candidate does not stop the search: later proposals were made without it, so only it and the baseline compare.
    assert {id: archive_of(root)[id] for id in ("c0000", "c0001")} == {id: undisturbed[id] for id in ("c0000", "c0001")}
    assert len(archive_of(root)) == 5


def test_repeats_wait_longer_each_time_and_avoid_the_nodes_of_the_failures(tmp_path):
    """The first repeat is at once, the second after 60 s, the third after 120."""
    at, nodes = {}, iter([["n1"], ["n3", "n2"], ["n2"]])

    def work(attempt, job):
        if (job["kind"], job["candidate"]) != ("train", "c0001"):
            return noop_work(attempt, job)
        at[job["attempt"]] = driven.clock.now, job["avoid"]
        if job["attempt"] <= 3:
            return {"outcome": Outcome.INFRA_ERROR, "cause": "node-fail", "message": "", "payload": {}, "suspects": next(nodes)}
        return noop_work(attempt, job)

    root = campaign(tmp_path / "c", search={"candidates": 1, "train_seeds": [0]}).root
    driven = controller(root, InlineCluster(work))
    finish(driven)
    waits = [at[n + 1][0] - at[n][0] for n in (1, 2, 3)]
    assert waits[0] < 10 and 60 <= waits[1] < 90 and 120 <= waits[2] < 150
    assert [avoid for _, avoid in at.values()] == [[], ["n1"], ["n1", "n2", "n3"], ["n1", "n2", "n3"]]


def test_a_failure_after_progress_does_not_count(tmp_path):
    """Twelve deaths, each one step further than the last: not stuck, so not held."""
    def work(attempt, job):
        if (job["kind"], job["candidate"], job["seed"]) == ("train", "c0001", 0) and job["attempt"] <= 12:
            (attempt / "checkpoints" / f"step-{job['attempt']:06d}").mkdir(parents=True)
            return {"outcome": Outcome.INFRA_ERROR, "cause": "node-fail", "message": "", "payload": {}}
        return noop_work(attempt, job)

    root = campaign(tmp_path / "c", search={"candidates": 1, "train_seeds": [0]}).root
    assert not drive(root, InlineCluster(work)).held
    assert archive_of(root)["c0001"]["outcome"] == Outcome.SUCCEEDED


def test_preempted_a_hundred_times_is_not_a_failure(undisturbed, tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, InlineCluster(failing("train", "c0002", Outcome.PREEMPTED, "stopped", times=100, seed=0)))
    assert archive_of(root) == undisturbed
    job = files.read_json(root / "candidates/c0002/attempts/train-s0-101/job.json")
    assert len(job["resume"]) == 100 and job["resume"][0].endswith("train-s0-1")


def test_a_vanished_job_is_repeated(undisturbed, tmp_path):
    class Lossy(InlineCluster):
        def submit(self, attempts, name, stage, ranks):
            lost = attempts[0].name in ("train-s0-1", "check-1", "prepare-1")
            return [{"job_id": "17"}] if lost else super().submit(attempts, name, stage, ranks)

    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, Lossy(noop_work))
    assert archive_of(root) == undisturbed
    result = files.read_json(root / "candidates/c0001/attempts/check-1/result.json")
    assert (result["cause"], result["message"]) == ("vanished", "job 17 is gone and left no result")


def test_a_clock_that_is_set_back_keeps_nobody_waiting(tmp_path):
    """The prepare job vanishes twice. A second after the first look the clock loses a day; then the pause before the third start does."""
    class Lossy(InlineCluster):
        poll_s = 1.0

        def submit(self, attempts, name, stage, ranks):
            return [{"job_id": "17"}]

    driven = controller(campaign(tmp_path / "c").root, Lossy(noop_work))
    moment = driven.clock
    for number in (1, 2, 3):
        for _ in range(3):
            driven.step()
        assert [a.number for a in driven.home.attempts] == list(range(1, 1 + min(number + 1, 4))), number
        moment.now -= 86400


def test_a_job_that_dies_of_the_stop_it_was_told_is_nobodys_failure(tmp_path):
    """Ctrl-C while its interpreter starts, again and again: it has no ear and no claim yet, and is never HELD for it."""
    class Deaf(InlineCluster):
        def submit(self, attempts, name, stage, ranks):
            return [{"job_id": "17"}]

    driven = controller(campaign(tmp_path / "c").root, Deaf(noop_work))
    for _ in range(driven.campaign.config.jobs.infra_retries + 3):
        driven.step()
        orders.tell(driven, [attempt for _, attempt in driven.in_flight()])
    results = [files.read_json(a.folder / "result.json") for a in driven.home.attempts[:-1]]
    assert len(results) > driven.campaign.config.jobs.infra_retries + 1 and driven.held == []
    assert {(r["outcome"], r["cause"]) for r in results} == {(Outcome.PREEMPTED, "cancelled")}


def test_no_news_is_no_failure(tmp_path):
    class Silent(InlineCluster):
        def submit(self, attempts, name, stage, ranks):
            return [{"job_id": "17"}]

        def alive(self, submitted):
            return {job.attempt: None for job in submitted}

    driven = controller(campaign(tmp_path / "c").root, Silent(noop_work))
    for _ in range(50):
        driven.step()
    assert [a.name for a in driven.home.attempts] == ["prepare-1"] and driven.home.attempts[0].result is None


def test_a_failed_baseline_ends_the_campaign_with_the_reason(tmp_path):
    root = campaign(tmp_path / "c").root
    with pytest.raises(PoiseError, match=r"the baseline c0000 failed \(check-failed\), so there is nothing to compare with; `poise-hpc show"):
        drive(root, InlineCluster(failing("check", "c0000", Outcome.CANDIDATE_ERROR, "check-failed")))
    assert list(archive_of(root)) == ["c0000"]


def test_a_task_that_cannot_be_prepared_is_held(tmp_path):
    root = campaign(tmp_path / "c").root
    driven = drive(root, InlineCluster(failing("prepare", "prepare", Outcome.INFRA_ERROR, "PoiseError")))
    assert [(c.id, c.cause) for c in driven.held] == [("prepare", "PoiseError")] and driven.count == 0
    orders.give(driven.campaign, "retry")
    assert len(drive(root).archive.entries) == 8


# --- orders

def test_hold_keeps_everything_else_going(undisturbed, tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    driven = controller(root)
    while "c0003" not in driven.active:
        driven.step()
    orders.give(driven.campaign, "hold", "c0003")
    finish(driven)
    assert [c.id for c in driven.held] == ["c0003"] and sorted(archive_of(root)) == ["c0000", "c0001", "c0002", "c0004"]
    orders.give(driven.campaign, "retry", "c0003")
    drive(root)
    assert archive_of(root)["c0003"] == undisturbed["c0003"]


def test_drain_proposes_nothing_new(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 9, "train_seeds": [0]}).root
    driven = controller(root)
    while "c0002" not in driven.active:
        driven.step()
    orders.give(driven.campaign, "drain")
    finish(driven)
    drained = len(archive_of(root))
    assert drained < 10 and "drain --off" in driven.stop_proposing and not driven.active
    orders.give(driven.campaign, "resume")
    drive(root)
    assert len(archive_of(root)) == 10


def test_cancel_stops_all_and_retry_goes_on(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    cluster, cancelled = ShuffledCluster(0), []
    cluster.cancel = lambda jobs: cancelled.extend(j.attempt.name for j in jobs)
    driven = controller(root, cluster)
    while not driven.active or not driven.in_flight():
        driven.step()
    flying = [a.name for _, a in driven.in_flight()]
    orders.give(driven.campaign, "cancel")
    driven.step()
    assert cancelled == flying and all(c.stage == Stage.HELD for c in driven.active.values())
    orders.give(driven.campaign, "resume")
    orders.give(driven.campaign, "retry")
    finish(driven)
    assert len(archive_of(root)) == 5


def test_cancel_while_the_scheduler_is_away(tmp_path):
    """The jobs' folders say it; the controller goes on, waits for what runs, and is done when all have ended."""
    def away(jobs):
        raise SchedulerAway("squeue does not answer")

    root = campaign(tmp_path / "c", **SMALL).root
    cluster = ShuffledCluster(0)
    cluster.cancel = away
    driven = controller(root, cluster)
    while not driven.active or len(driven.in_flight()) < 2:
        driven.step()
    flying = [a for _, a in driven.in_flight()]
    orders.give(driven.campaign, "cancel")
    driven.step()
    assert all((a.folder / "stop.json").exists() for a in flying) and not list((root / "inbox").iterdir())
    assert "squeue does not answer" in (root / "events.log").read_text()
    assert driven.in_flight() and not driven.finished
    finish(driven)
    assert not driven.in_flight() and all(c.stage == Stage.HELD for c in driven.active.values())


def test_what_was_killed_before_it_could_save_does_not_use_up_the_time_limit(tmp_path):
    def work(attempt, job):
        if (job["kind"], job["candidate"]) == ("train", "c0001") and job["attempt"] <= 3:
            return {"outcome": Outcome.PREEMPTED, "cause": "killed-at-stop" if job["attempt"] == 2 else "stopped", "message": "", "payload": {},
                    "run_seconds": 100.0}
        return noop_work(attempt, job)

    root = campaign(tmp_path / "c", search={"candidates": 1, "train_seeds": [0]}, jobs={"train_min": 10.0}).root
    drive(root, InlineCluster(work))
    seconds = [files.read_json(root / f"candidates/c0001/attempts/train-s0-{n}/job.json")["limits"]["seconds"] for n in (1, 2, 3, 4)]
    assert seconds == [600, 500, 500, 400]


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "explode", "id": null}', '{"hello": 1}'])
def test_a_file_that_is_no_order_is_set_aside(undisturbed, tmp_path, text):
    root = campaign(tmp_path / "c", **SMALL).root
    (root / "inbox" / "1-x.json").write_text(text)
    drive(root)
    assert archive_of(root) == undisturbed
    assert [p.name for p in (root / "inbox").iterdir()] == ["1-x.json.refused"]
    assert "order refused" in (root / "events.log").read_text()


def test_an_added_package_goes_the_same_way(tmp_path):
    created = campaign(tmp_path / "c", **SMALL)
    orders.package(created, write_package(tmp_path / "own"), "c0000")
    drive(created.root)
    found = archive_of(created.root)
    mine = [e for e in found.values() if e["name"] == "mine"]
    assert len(mine) == 1 and mine[0]["proposer"] == "person" and mine[0]["parents"] == ("c0000",) and mine[0]["score"]
    assert len(found) == 6  # it does not use up the proposer's number


def test_an_added_candidate_waits_for_what_it_is_compared_with(tmp_path):
    """Whichever job ends first: it is paired with the baseline, and its record is the same."""
    found = []
    for seed in range(4):
        created = campaign(tmp_path / str(seed), search={"candidates": 0, "train_seeds": [0, 1]})
        orders.package(created, write_package(tmp_path / "own"), None)
        drive(created.root, ShuffledCluster(seed))
        found.append(without_inbox_times(archive_of(created.root)))
        assert found[-1]["c0001"]["score"]["delta"] is not None
    assert all(f == found[0] for f in found)


def test_an_added_candidate_whose_baseline_is_held_waits_without_spinning(tmp_path):
    created = campaign(tmp_path / "c", search={"candidates": 0, "train_seeds": [0]})
    orders.package(created, write_package(tmp_path / "own"), None)
    driven = drive(created.root, InlineCluster(failing("train", "c0000", Outcome.INFRA_ERROR)))
    assert [c.id for c in driven.held] == ["c0000"] and driven.active["c0001"].stage == Stage.REFLECT
    orders.give(driven.campaign, "retry")
    drive(created.root)
    assert archive_of(created.root)["c0001"]["score"]["delta"] is not None


# --- damage

@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_a_damaged_record_is_restored_from_its_folder(undisturbed, tmp_path, damage):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root)
    path = root / "records" / "c0002.h5"
    before = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes({"flip": before[:900] + bytes([before[900] ^ 1]) + before[901:], "truncate": before[:700], "empty": b""}[damage])
    assert not drive(root).archive.problems
    assert path.read_bytes() == before and archive_of(root) == undisturbed
    assert len(list((root / "records").glob("*.damaged-*"))) == (damage != "delete")
    assert "record restored" in (root / "events.log").read_text()


@pytest.mark.parametrize("text", ["", "[]", '{"id": "c0001"}', '"archived"', None])
def test_lost_status_files_are_derived_again(undisturbed, tmp_path, text):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root)
    for path in [*root.glob("candidates/*/status.json"), root / "prepare" / "status.json"]:
        path.write_text(text if text is not None else path.read_text().replace("archived", "archivad"))
    (root / "records" / "c0003.h5").unlink()
    drive(root)
    assert archive_of(root) == undisturbed


def test_a_record_restored_from_a_copy_is_the_same_to_the_byte(tmp_path):
    """`cp -r` gives every file a new time."""
    root, copy = campaign(tmp_path / "c", **TINY).root, tmp_path / "copy"
    drive(root)
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    for path in copy.glob("candidates/*/reflection.json"):
        os.utime(path, (0, 0))
    record = copy / "records" / "c0001.h5"
    record.unlink()
    drive(copy)
    assert record.read_bytes() == (root / "records" / "c0001.h5").read_bytes()
    path = copy / "candidates" / "c0001" / "reflection.json"  # as an earlier version wrote it
    files.write_json(path, {k: v for k, v in files.read_json(path).items() if k != "written"})
    os.utime(path, (86400, 86400))
    record.unlink()
    drive(copy)
    assert archive.read(record).created == "1970-01-02T00:00:00Z"


def test_a_record_damaged_together_with_its_status(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    drive(root, InlineCluster(failing("train", "c0002", Outcome.CANDIDATE_ERROR, "hang")))
    wanted = archive_of(root)
    for id in ("c0001", "c0002"):
        (root / "records" / f"{id}.h5").write_bytes(b"rotten")
        (root / "candidates" / id / "status.json").write_bytes(b"rotten")
    drive(root)
    assert archive_of(root) == wanted


@pytest.mark.parametrize("name", ["curves.jsonl", "elements/1-easy.json", "elements/1-easy.npz"])
@pytest.mark.parametrize("spoil", [lambda raw: raw[:50] + bytes([raw[50] ^ 1]) + raw[51:], lambda raw: raw[:-20], None], ids=["flip", "truncate", "delete"])
def test_no_number_is_made_of_a_damaged_file(undisturbed, tmp_path, name, spoil):
    def work(attempt, job):
        result = noop_work(attempt, job)
        result["payload"]["sha256"] = worker.hashes(attempt, ["curves.jsonl", *result["payload"].get("elements", ())])
        if job["kind"] == "train" and job["candidate"] == "c0001" and attempt.name == "train-s1-1":
            path = attempt / name
            path.write_bytes(spoil(path.read_bytes())) if spoil else path.unlink()
        return result

    root = campaign(tmp_path / "c", **SMALL).root
    attempt = root / "candidates" / "c0001" / "attempts" / "train-s1-1"
    with pytest.raises(files.CorruptFile, match="is missing or damaged. Delete .*result.json and .*status.json: that job is then repeated"):
        drive(root, InlineCluster(work))
    assert "c0001" not in archive_of(root)
    (attempt / "result.json").unlink()
    (root / "candidates" / "c0001" / "status.json").unlink()
    drive(root, InlineCluster(work))
    assert archive_of(root) == undisturbed


@pytest.mark.parametrize("spoil", [lambda path: path.write_text(path.read_text() + "# better\n"), lambda path: path.unlink()], ids=["edit", "delete"])
def test_no_code_is_archived_that_did_not_run(undisturbed, tmp_path, spoil):
    """Edited between its training and its archiving; restored, the archive is the undisturbed one."""
    root, before = campaign(tmp_path / "c", **SMALL).root, []

    def work(attempt, job):
        result, path = noop_work(attempt, job), root / "candidates" / "c0001" / "algorithm.py"
        if attempt.name == "train-s1-1" and job["candidate"] == "c0001":
            assert job["manifest"] == files.read_json(path.with_name("manifest.json")) == load.manifest(path.parent)
            before.append(path.read_bytes())
            spoil(path)
        return result

    with pytest.raises(files.CorruptFile, match=r"c0001/algorithm.py is (missing|not what its manifest says).* Restore it .*`poise-hpc add` takes"):
        drive(root, InlineCluster(work))
    assert "c0001" not in archive_of(root)
    (root / "candidates" / "c0001" / "algorithm.py").write_bytes(before[0])
    drive(root)
    assert archive_of(root) == undisturbed


def test_a_package_with_odd_line_ends_is_archived_as_it_ran(tmp_path):
    created, package = campaign(tmp_path / "c", **TINY), write_package(tmp_path / "own")
    (package / "algorithm.py").write_bytes((package / "algorithm.py").read_bytes().replace(b"\n", b"\r\n"))
    orders.package(created, package, None)
    drive(created.root)
    assert archive_of(created.root)["c0001"]["code"]["algorithm.py"].count("\r\n") > 10
    assert archive.verify_campaign(created.root) == {}


def test_corrupt_job_files_are_named_with_the_cure(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    driven = controller(root, ShuffledCluster(0))
    while "c0001" not in driven.active or not driven.active["c0001"].attempts:
        driven.step()
    attempt = driven.active["c0001"].attempts[0].folder
    for text in ('{"outcome": "succ', "[]", '{"outcome": "succeeded"}', '{"outcome": "succeedad", "cause": "", "message": "", "payload": {}}'):
        (attempt / "result.json").write_text(text)
        with pytest.raises(files.CorruptFile, match="result.json .*Delete it: the job then counts as lost and is repeated"):
            Campaign.open(root).load("c0001")
        with pytest.raises(files.CorruptFile, match="result.json .*Delete it: the job then counts as lost and is repeated"):
            driven.collect()
    (attempt / "result.json").unlink()
    submitted = (attempt / "submitted.json").read_text()
    for text in ("{", "[]", "{}"):
        (attempt / "submitted.json").write_text(text)
        with pytest.raises(files.CorruptFile, match="submitted.json .*Delete it: the job is found again by its name"):
            Campaign.open(root).load("c0001")
    (attempt / "submitted.json").write_text(submitted)
    for name, cure in (("proposal", "proposal.md beside it says the same"), ("manifest", "Restore it")):
        path = attempt.parents[1] / f"{name}.json"
        before = path.read_text()
        path.write_text("[]")
        with pytest.raises(files.CorruptFile, match=f"{name}.json is JSON, but not what was written there.* {cure}"):
            packages.read(attempt.parents[1], 1)
        path.write_text(before)
    (attempt / "intent.json").unlink()
    with pytest.raises(PoiseError, match="has no intent.json. Delete the folder"):
        Campaign.open(root).load("c0001")
