"""What the scheduler's words lead to. squeue, sacct and scancel are functions here, the clock moves by hand."""
from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import submitit
from helpers_campaign import campaign

from poise_hpc import jobs, jobspec, scheduler, site, standalone
from poise_hpc.cluster import submission
from poise_hpc.cluster.slurm import SlurmCluster
from poise_hpc.scheduler import FINAL, Gone, SchedulerSilent, Submitted, elements
from poise_hpc.types import Outcome, PoiseError

PREFIX = "poise-my_campaign-18f-"


class FakeSlurm:
    """`queue` is what squeue prints, `accounts` what sacct prints; an exception is raised instead."""

    def __init__(self) -> None:
        self.now, self.queue, self.accounts, self.cancelled, self.calls = 1000.0, "", "", [], []

    def __call__(self, arguments: list[str]) -> str:
        self.calls.append((self.now, arguments[0]))
        if arguments[0] == "scancel":
            self.cancelled.append(arguments[1:])
            return ""
        answer = self.queue if arguments[0] == "squeue" else self.accounts
        if isinstance(answer, Exception):
            raise answer
        return answer

    def count(self, command: str) -> int:
        return sum(name == command for _, name in self.calls)


@pytest.fixture
def slurm() -> FakeSlurm:
    return FakeSlurm()


def cluster(slurm: FakeSlurm, **change) -> SlurmCluster:
    settings = site.parse({"poll_s": 30, "result_lag_s": 60} | change)
    told = slurm.told = []
    return SlurmCluster(settings, PREFIX, slurm, lambda: slurm.now, lambda job, reason: told.append(reason))


def job(folder: Path, name: str = "c0001-train-s0-1", index: int | None = None, id: str | None = "7") -> Submitted:
    attempt = folder / f"{name}-{index}"
    attempt.mkdir(exist_ok=True)
    return Submitted(attempt, PREFIX + name, index, id)


def unnoted(folder: Path, index: int | None = None) -> Submitted:
    """Of a controller that was killed after sbatch: submitit's folder has no pickle for it yet."""
    first, one = job(folder, index=index and 0, id=None), job(folder, index=index, id=None)
    (first.attempt / "submitit").mkdir(exist_ok=True)
    scheduler.files.write_json(first.attempt / "intent.json", {"name": first.name, "index": first.index})
    return one


def line(id: str, state: str, name: str = "c0001-train-s0-1", reason: str = "None") -> str:
    return f"{id}|{state}|{reason}|{PREFIX}{name}\n"


def news(fake: SlurmCluster, one: Submitted):
    return fake.alive([one])[one.attempt]


def after(slurm: FakeSlurm, seconds: float, fake: SlurmCluster, one: Submitted):
    slurm.now += seconds
    return news(fake, one)


# --- what is alive


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING",
                                   "SPECIAL_EXIT", "STAGE_OUT", "A_STATE_OF_TOMORROW"])
def test_whatever_is_not_final_is_alive(slurm, tmp_path, state):
    slurm.queue = line("7", state)
    assert news(cluster(slurm), job(tmp_path)) is True


@pytest.mark.parametrize("state", sorted(FINAL))
def test_a_final_state_counts_after_the_lag(slurm, tmp_path, state):
    fake, one = cluster(slurm), job(tmp_path)
    slurm.queue = line("7", state)
    assert news(fake, one) is None             # its result may still be on the way
    assert after(slurm, 59, fake, one) is None
    gone = after(slurm, 1, fake, one)
    assert isinstance(gone, Gone) and (gone.outcome, gone.cause) == FINAL[state] and state in gone.message


def test_a_job_that_slurm_requeues_was_never_gone(slurm, tmp_path):
    fake, one = cluster(slurm), job(tmp_path)
    for seconds, state, expected in [(0, "RUNNING", True), (30, "NODE_FAIL", None), (30, "PENDING", True), (30, "NODE_FAIL", None),
                                     (30, "RUNNING", True), (600, "RUNNING", True)]:
        slurm.queue = line("7", state)
        assert after(slurm, seconds, fake, one) is expected
        assert (one.attempt / "missing.json").exists() == (expected is None)  # the clock starts anew each time


def test_no_answer_is_no_news(slurm, tmp_path):
    fake, one = cluster(slurm), job(tmp_path)
    slurm.queue = SchedulerSilent("Unable to contact slurm controller (connect failure)")
    for _ in range(100):
        assert after(slurm, 3600, fake, one) is None
    slurm.queue = line("7", "RUNNING")
    assert after(slurm, 30, fake, one) is True
    slurm.queue = SchedulerSilent("Socket timed out on send/recv operation")
    assert after(slurm, 3600, fake, one) is True  # what was last known


def test_garbled_lines_and_strangers_are_left_out(slurm, tmp_path):
    slurm.queue = ("slurm_load_jobs: warning\n9|RUNNING|None|somebody|else\n8|RUNNING|None|poise-my_campaign-900-c0001-train-s0-1\n"
                   + line("7", "RUNNING") + line("6", "PENDING", name="c0002-evaluate-s0@1@a|b-1"))
    fake = cluster(slurm)
    assert news(fake, job(tmp_path, "c0002-evaluate-s0@1@a|b-1", id="6")) is True  # a name may hold the separator: it stands last
    assert set(fake.queue._jobs) == {"7", "6"}


# --- arrays


def test_elements_of_an_array_are_told_apart(slurm, tmp_path):
    slurm.queue = line("7_0", "RUNNING") + line("7_2", "PENDING") + line("7_1", "FAILED")
    fake, jobs = cluster(slurm), [job(tmp_path, index=i, id=f"7_{i}") for i in range(3)]
    assert list(fake.alive(jobs).values()) == [True, None, True]
    slurm.now += 60
    assert [n.cause if isinstance(n, Gone) else n for n in fake.alive(jobs).values()] == [True, "failed", True]
    assert fake.find(unnoted(tmp_path, 2))["job_id"] == "7_2"
    assert fake.find(unnoted(tmp_path, 3)) is None


@pytest.mark.parametrize(("ids", "expected"), [
    ("7", ["7"]), ("7_3", ["7_3"]), ("7_[0-2]", ["7_0", "7_1", "7_2"]), ("7_[1-2,5%4]", ["7_1", "7_2", "7_5"]), ("7_[4]", ["7_4"])])
def test_array_ids_of_accounting(ids, expected):
    assert elements(ids) == expected


def test_arrays_are_one_per_candidate_and_stage_and_no_longer_than_the_site_allows(slurm):
    class C:
        def __init__(self, id, stage):
            self.id, self.stage = id, stage

    a, b = C("c0001", "evaluate"), C("c0002", "train")
    wanted = [(a, "x"), (b, "s0"), (a, "y"), (a, "z"), (b, "s1")]
    fake = cluster(slurm, max_array=2)
    assert fake.batches(wanted) == [[(a, "x"), (a, "y")], [(a, "z")], [(b, "s0"), (b, "s1")]]
    assert fake.slots == 200


# --- what has left the queue


def test_accounting_explains_what_left_the_queue(slurm, tmp_path):
    fake, one = cluster(slurm), job(tmp_path)
    slurm.accounts = f"7|CANCELLED by 1000|{PREFIX}c0001-train-s0-1\n"
    assert news(fake, one) is None
    assert after(slurm, 30, fake, one) is None and slurm.count("sacct") == 0  # not before the lag is over
    gone = after(slurm, 30, fake, one)
    assert gone == Gone(Outcome.INFRA_ERROR, "cancelled", "Slurm: job 7 ended as CANCELLED and left no result")
    assert after(slurm, 600, fake, one) == gone and slurm.count("sacct") == 1  # asked once


def test_preemption_is_no_failure(slurm, tmp_path):
    fake, one = cluster(slurm), job(tmp_path)
    slurm.accounts = f"7|PREEMPTED|{PREFIX}c0001-train-s0-1\n"
    news(fake, one)
    assert after(slurm, 60, fake, one).outcome is Outcome.PREEMPTED


@pytest.mark.parametrize("accounts", [
    SchedulerSilent("Slurm accounting storage is disabled"), SchedulerSilent("[Errno 2] No such file or directory: 'sacct'"),
    "", "7|COMPLETED|somebody-elses-job\n", f"7|RUNNING|{PREFIX}c0001-train-s0-1\n"])
def test_without_an_explanation_a_job_is_gone_all_the_same(slurm, tmp_path, accounts):
    fake, one = cluster(slurm), job(tmp_path)
    slurm.accounts = accounts  # none, purged, of an earlier life of the id, or never closed: squeue knows better
    news(fake, one)
    assert after(slurm, 60, fake, one) is False


def test_silent_accounting_gets_ten_minutes_and_does_not_starve_the_queue(slurm, tmp_path):
    fake, one, other = cluster(slurm), job(tmp_path), job(tmp_path, "c0002-train-s0-1", id="8")
    slurm.accounts, slurm.queue = SchedulerSilent("Unable to contact slurmdbd"), line("8", "RUNNING", "c0002-train-s0-1")
    seen = {}
    for second in range(0, 690, 30):
        slurm.now = 1000.0 + second
        seen[second] = fake.alive([one, other])
    assert [s for s, found in seen.items() if found[one.attempt] is False] == [660]
    assert all(found[other.attempt] is True for found in seen.values())
    assert slurm.count("squeue") >= 10 and slurm.count("sacct") >= 5


def test_a_reused_id_is_not_our_job(slurm, tmp_path):
    """The scheduler was reset: id 7 now belongs to another job, of ours or of somebody else."""
    fake, one = cluster(slurm), job(tmp_path)
    slurm.queue = line("7", "RUNNING", "c0009-train-s1-1")
    news(fake, one)
    assert after(slurm, 60, fake, one) is False
    fake.cancel([one])
    assert slurm.cancelled == []


def test_a_controller_of_one_step_comes_to_the_same_end(slurm, tmp_path):
    """Cron: each time a new process. Patience is kept in the attempt's folder."""
    one = job(tmp_path)
    slurm.accounts = f"7|NODE_FAIL|{PREFIX}c0001-train-s0-1\n"
    seen = []
    for _ in range(2):
        seen.append(news(cluster(slurm), one))
        slurm.now += 300
    assert seen[0] is None and seen[1].cause == "node-fail"


def test_a_controller_of_one_step_forgets_what_came_back(slurm, tmp_path):
    one = job(tmp_path)
    assert news(cluster(slurm), one) is None
    slurm.now, slurm.queue = 1300, line("7", "RUNNING")
    assert news(cluster(slurm), one) is True
    slurm.now, slurm.queue = 1600, ""
    assert news(cluster(slurm), one) is None


# --- submission cut short


def test_a_job_without_an_id_is_found_by_its_name(slurm, tmp_path):
    fake, one = cluster(slurm), unnoted(tmp_path)
    assert fake.find(one) is None
    slurm.queue = line("7", "PENDING")
    assert news(fake, one) is True
    assert fake.find(one) == {"job_id": "7", "executor": "slurm", "time": 1000.0, "adopted": True}


@pytest.mark.parametrize("index", [None, 2])
def test_an_adopted_job_gets_what_its_submitter_could_not_write(slurm, tmp_path, index):
    """submitit writes the job's pickle after sbatch; without it the job waits a minute and fails."""
    fake, one, id = cluster(slurm), unnoted(tmp_path, index), "7" if index is None else "7_2"
    slurm.queue = line(id, "PENDING")
    fake.alive([one])
    fake.find(one)
    (path,) = tmp_path.glob("*/submitit/*")
    delayed = submitit.core.utils.DelayedSubmission.load(path)
    assert path.name == f"{id}_submitted.pkl" and path.parent.parent.name.endswith("None" if index is None else "0")
    assert delayed.function is jobs.run_attempt and delayed.args == (str(one.attempt),)
    path.write_text("submitit's own")
    fake.find(one)
    assert path.read_text() == "submitit's own"


def test_what_never_reached_the_scheduler_is_gone_after_the_lag(slurm, tmp_path):
    fake, one = cluster(slurm), job(tmp_path, id=None)
    assert [after(slurm, s, fake, one) for s in (0, 30, 29, 1)] == [None, None, None, False]
    assert slurm.count("sacct") == 0
    # Its folder is removed then. The next try has one of the same name, and patience begins anew.
    (one.attempt / "missing.json").unlink()
    assert [after(slurm, s, fake, job(tmp_path)) for s in (30, 30)] == [None, None]


def test_a_job_that_found_nothing_to_run_is_nobodys_failure(slurm, tmp_path):
    """Killed between sbatch and the renaming of submitit's pickle: the job fails before it claims its attempt."""
    fake, one = cluster(slurm), job(tmp_path)
    scheduler.files.write_json(one.attempt / "submitted.json", {"job_id": "7", "adopted": True})
    slurm.queue = line("7", "FAILED")
    news(fake, one)
    assert after(slurm, 60, fake, one).cause == "never-started"
    (one.attempt / "claim-0.json").write_text("{}")
    assert news(fake, one).cause == "failed"


# --- queries


def test_queries_of_an_hour_with_500_jobs(slurm, tmp_path):
    """At most two a minute, in any minute, though the controller looks every second and jobs vanish all the time."""
    fake, jobs = cluster(slurm), [job(tmp_path, f"c{i:04d}-train-s0-1", id=str(i)) for i in range(500)]
    for second in range(3600):
        slurm.now = 1000.0 + second
        if second % 300 == 0:
            slurm.queue = "".join(line(str(i), "RUNNING", f"c{i:04d}-train-s0-1") for i in range(second // 10, 500))
            slurm.accounts = SchedulerSilent("slurmdbd is away") if second % 600 else "1|FAILED|x\n"
        fake.alive(jobs)
    times = [t for t, _ in slurm.calls]
    assert max(sum(t <= u < t + 60 for u in times) for t in times) == 2
    assert 110 <= len(times) <= 121 and slurm.count("squeue") >= 60 and slurm.count("sacct") >= 5


def test_a_job_that_will_not_start_is_told_once(slurm, tmp_path):
    fake, one = cluster(slurm), job(tmp_path)
    for state, reason in (("PENDING", "Priority"), ("PENDING", "PartitionTimeLimit"), ("PENDING", "PartitionTimeLimit"), ("PENDING", "JobHeldAdmin"),
                          ("REQUEUE_HOLD", "JobHeldUser")):
        slurm.queue = line("7", state, reason=reason)
        assert after(slurm, 30, fake, one) is True
    assert [text.partition(": ")[2].partition(".")[0] for text in slurm.told] == ["PartitionTimeLimit", "JobHeldAdmin", "JobHeldUser"]


@pytest.mark.parametrize(("state", "reason"), [("PENDING", "launch failed requeued held"), ("PENDING", "launch_failed_requeued_held"),
                                               ("REQUEUE_HOLD", "launch failed requeued held"), ("LAUNCH_FAILED", "None")])  # newer versions
def test_a_job_that_slurm_holds_after_a_failed_launch_is_taken_back(slurm, tmp_path, state, reason):
    """Seen when slurmctld is killed right after it started a job: nobody releases it, so it is cancelled and repeated."""
    fake, one = cluster(slurm), job(tmp_path, index=1, id="7_1")
    slurm.queue = line("7_1", state, reason=reason)
    assert news(fake, one) is None and slurm.cancelled == []
    gone = after(slurm, 60, fake, one)
    assert (gone.outcome, gone.cause) == (Outcome.INFRA_ERROR, "launch-failed") and slurm.cancelled == [["7_1"]]


def test_a_held_job_counts_as_gone_only_when_it_is_cancelled(slurm, tmp_path):
    away = [True]

    def call(arguments):
        if arguments[0] == "scancel" and away:
            raise SchedulerSilent("Unable to contact slurm controller")
        return slurm(arguments)

    fake, one = SlurmCluster(site.parse({"poll_s": 30}), PREFIX, call, lambda: slurm.now), job(tmp_path)
    slurm.queue = line("7", "PENDING", reason="launch failed requeued held")
    news(fake, one)
    assert after(slurm, 60, fake, one) is None
    away.clear()
    assert after(slurm, 1, fake, one).cause == "launch-failed"


# --- jobs of attempts that have ended


def tidying(slurm: FakeSlurm, ended: set[str], **change) -> SlurmCluster:
    return SlurmCluster(site.parse({"poll_s": 30} | change), PREFIX, slurm, lambda: slurm.now, needless=lambda seen: seen.id in ended)


def test_a_waiting_job_of_an_ended_attempt_is_cancelled_with_the_same_look(slurm, tmp_path):
    """A killed slurmctld brings back what has ended: waiting, held, or requeued. In flight, strange and ended jobs stay."""
    fake, one = tidying(slurm, {"7", "8", "9", "10", "11"}), job(tmp_path)
    slurm.queue = (line("7", "PENDING") + line("8", "PENDING", "c0002-check-1", "launch failed requeued held") + line("9", "REQUEUE_HOLD", "c0003-check-1")
                   + line("10", "RUNNING", "c0004-check-1") + line("11", "COMPLETED", "c0005-check-1") + line("12", "PENDING", "c0006-check-1"))
    assert news(fake, one) is True  # 7 is in flight
    assert slurm.cancelled == [["8", "9"]] and slurm.count("squeue") == 1


def test_a_running_job_of_an_ended_attempt_gets_two_minutes(slurm):
    fake = tidying(slurm, {"7"})
    slurm.queue = line("7", "RUNNING")
    for second in range(0, 150, 30):
        slurm.now = 1000.0 + second
        fake.alive([])
        assert slurm.cancelled == ([["7"]] if second == 120 else [])


def test_a_failed_scancel_is_repeated(slurm):
    away = [True]

    def call(arguments):
        if arguments[0] == "scancel" and away:
            raise SchedulerSilent("Unable to contact slurm controller")
        return slurm(arguments)

    fake = SlurmCluster(site.parse({"poll_s": 30}), PREFIX, call, lambda: slurm.now, needless=lambda seen: True)
    slurm.queue = line("7", "PENDING")
    fake.alive([])
    away.clear()
    slurm.now += 30
    fake.alive([])
    assert slurm.cancelled == [["7"]]


def test_a_campaign_is_over_when_the_queue_holds_nothing_of_it(slurm):
    fake = tidying(slurm, {"7", "8"})
    slurm.queue = line("7", "RUNNING") + line("8", "PENDING", "c0002-check-1") + line("9", "PENDING", "c0003-check-1")  # 9: somebody's own
    fake.alive([])
    seen = []
    for second in range(91):
        slurm.now = 1001.0 + second
        if second == 70:
            slurm.queue = line("9", "PENDING", "c0003-check-1")
        seen.append(fake.clear())
    assert slurm.cancelled[0] == ["8"] and seen.index(True) == 89  # 1000 alive, 1001 at once, then every 30 s: 1060 and 1090
    times = [t for t, name in slurm.calls if name == "squeue"]
    assert max(sum(t <= u < t + 60 for u in times) for t in times) <= 2


def test_a_queue_that_does_not_empty_or_answer_is_left_after_ten_minutes(slurm):
    for slurm.queue in (line("7", "COMPLETING"), SchedulerSilent("Unable to contact slurm controller")):
        fake, begun = tidying(slurm, {"7"}), slurm.now
        while not fake.clear():
            slurm.now += 1
        assert 600 <= slurm.now - begun <= 602
    slurm.queue = SchedulerSilent("[Errno 2] No such file or directory: 'squeue'")
    assert tidying(slurm, {"7"}).clear()  # a machine without Slurm: nothing to ask


@pytest.mark.parametrize(("name", "index", "id", "ended"), [
    ("c0001-check-1", None, "5", True), ("c0001-check-1", None, "6", False), ("c0001-train-s0-1", 0, "8_0", True), ("c0001-train-s0-1", 1, "8_1", False),
    ("c0001-train-s0-2", None, "9", True), ("c0001-check-2", None, "5", False), ("c0002-check-1", None, "5", False), ("prepare-prepare-1", None, "4", True)])
def test_whose_attempt_has_ended(tmp_path, name, index, id, ended):
    """By name, index and, where it was written down, the id: somebody's own job of the same name is another one."""
    made = campaign(tmp_path / "my campaign")
    for owner, attempt, first, place, job_id, result in [
            ("candidates/c0001", "check-1", "c0001-check-1", None, "5", True), ("candidates/c0001", "train-s0-1", "c0001-train-s0-1", 0, "8_0", True),
            ("candidates/c0001", "train-s1-1", "c0001-train-s0-1", 1, "8_1", False), ("candidates/c0001", "train-s0-2", "c0001-train-s0-2", None, None, True),
            ("prepare", "prepare-1", "prepare-prepare-1", None, "4", True)]:
        folder = made.root / owner / "attempts" / attempt
        folder.mkdir(parents=True)
        scheduler.files.write_json(folder / "intent.json", {"name": jobspec.job_prefix(made) + first, "index": place})
        if job_id:
            scheduler.files.write_json(folder / "submitted.json", {"job_id": job_id})
        if result:
            scheduler.files.write_json(folder / "result.json", {})
    assert (jobspec.ended_attempt(made, jobspec.job_prefix(made) + name, index, id) is not None) is ended


# --- cancel


def test_what_waits_and_was_stopped_while_the_scheduler_was_away_leaves_the_queue(slurm, tmp_path):
    fake, stopped, other = cluster(slurm), job(tmp_path, id="7"), job(tmp_path, "c0002-check-1", id="8")
    scheduler.files.write_json(stopped.attempt / jobs.STOP, {})
    slurm.queue = line("7", "PENDING") + line("8", "PENDING", "c0002-check-1")
    fake.alive([stopped, other])
    assert slurm.cancelled == [["7"]]
    slurm.now, slurm.queue = slurm.now + 60, line("7", "RUNNING") + line("8", "PENDING", "c0002-check-1")
    fake.alive([stopped, other])  # it has started: it looks into its folder
    assert slurm.cancelled == [["7"]]


def test_cancel_takes_only_our_jobs_by_id(slurm, tmp_path):
    fake = cluster(slurm)
    slurm.queue = (line("7", "RUNNING") + line("8_1", "PENDING", "c0002-evaluate-s0-1") + line("9", "COMPLETED", "c0003-train-s0-1")
                   + line("10", "RUNNING") + "11|RUNNING|None|poise-my_campaign-9f-c0001-train-s0-1\n")
    fake.cancel([job(tmp_path), job(tmp_path, "c0002-evaluate-s0-1", 1, None), job(tmp_path, "c0003-train-s0-1", id="9"),
                 job(tmp_path, "c0004-train-s0-1", id="12")])
    # 10: a user's own copy of the job's name; 11: a campaign of the same folder name; 9 has ended; 12 was never ours
    assert slurm.cancelled == [["--state=PENDING", "7", "8_1"], ["--signal=USR1", "7", "8_1"]]


def test_cancel_sees_what_was_submitted_a_moment_ago(slurm, tmp_path):
    fake, one = cluster(slurm), job(tmp_path)
    slurm.queue = ""
    fake.alive([])
    slurm.queue = line("7", "PENDING")
    fake.cancel([one])
    assert slurm.cancelled[0] == ["--state=PENDING", "7"]


def test_cancel_says_when_nothing_was_cancelled(slurm, tmp_path):
    slurm.queue = SchedulerSilent("down")
    with pytest.raises(PoiseError, match="squeue does not answer"):
        cluster(slurm).cancel([job(tmp_path)])
    cluster(slurm).cancel([])  # nothing to cancel needs no scheduler


@pytest.mark.parametrize(("said", "fails"), [("Invalid job id specified", False), ("Job/step already completing or completed", False),
                                             ("Access/permission denied", True)])
def test_scancel_may_find_that_a_job_has_ended(slurm, tmp_path, said, fails):
    def call(arguments):
        if arguments[0] == "scancel":
            raise SchedulerSilent(f"scancel: error: Kill job error on job id 7: {said}")
        return slurm(arguments)

    slurm.queue = line("7", "RUNNING")
    fake = SlurmCluster(site.parse({}), PREFIX, call, lambda: slurm.now)
    if fails:
        with pytest.raises(PoiseError, match="permission denied"):
            fake.cancel([job(tmp_path)])
    else:
        fake.cancel([job(tmp_path)])


# --- sbatch: a stand-in on PATH, since submitit calls it by itself


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(text: str) -> Path:
        for name, body in {"srun": "", "sbatch": text}.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(stat.S_IRWXU)
        return folder

    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return put


def attempts(folder: Path, count: int) -> list[Path]:
    found = [folder / "with space'\"" / f"evaluate-s0@1@{i}-1" for i in range(count)]
    for path in found:
        path.mkdir(parents=True, exist_ok=True)
    return found


def test_sbatch_that_hangs_is_left_alone(slurm, tmp_path, sbatch, monkeypatch):
    """The scheduler may have taken the job: it is looked up by its name before another is submitted."""
    monkeypatch.setattr("poise_hpc.cluster.submission.SBATCH_S", 0.3)
    sbatch("sleep 60")
    fake = cluster(slurm)
    assert fake.submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1) is None and fake.batches([("c", "")]) == []


def test_one_job_and_an_array(slurm, tmp_path, sbatch):
    sbatch('cp "${@: -1}" "$(dirname "$0")/last.sh"; env >"$(dirname "$0")/env"; echo Submitted batch job 41')
    fake, name = cluster(slurm, max_parallel=5), PREFIX + "c0001-evaluate-s0@1@a b-1"
    assert [a["job_id"] for a in fake.submit(attempts(tmp_path, 1), name, "evaluate", 1)] == ["41"]
    text = (tmp_path / "bin" / "last.sh").read_text()
    assert "--array" not in text and f"#SBATCH --job-name='{name}'" in text and "--kill-on-bad-exit=1" in text
    assert [a["job_id"] for a in fake.submit(attempts(tmp_path, 3), name, "evaluate", 1)] == ["41_0", "41_1", "41_2"]
    assert "#SBATCH --array=0-2%3" in (tmp_path / "bin" / "last.sh").read_text()  # never more at a time than there are


@pytest.mark.parametrize("others", [True, False])
def test_a_repeat_avoids_the_nodes_of_the_failures_if_there_are_others(slurm, tmp_path, sbatch, others):
    refuse = "" if others else """grep -q -e '--exclude=.*n2' "${@: -1}" && echo 'Requested node configuration is not available' >&2 && exit 1"""
    sbatch(f'cp "${{@: -1}}" "$(dirname "$0")/last.sh"; {refuse}\necho Submitted batch job 41')
    (attempt,) = attempts(tmp_path, 1)
    scheduler.files.write_json(attempt / "job.json", {"avoid": ["n2", "n5"]})
    (answer,) = cluster(slurm, exclude="bad[1-2]").submit([attempt], PREFIX + "x", "check", 1)
    text = (tmp_path / "bin" / "last.sh").read_text()
    assert f"#SBATCH --exclude=bad[1-2]{',n2,n5' * others}\n" in text.replace("'", "")
    assert answer["job_id"] == "41" and answer.get("avoided", []) == ["n2", "n5"] * others


def test_a_dry_run_shows_what_sbatch_gets(slurm, tmp_path, sbatch):
    sbatch('cp "${@: -1}" "$(dirname "$0")/last.sh"; echo Submitted batch job 41')
    made = campaign(tmp_path / "it's 100 % mine", search={"train_seeds": [0, 1]})
    made.set_site(Path(__file__).parents[1] / "configs" / "sites" / "gres_modules.yaml")
    shown = standalone.submissions(made.root, made.config, None, made.root)["scripts"]["train"]
    folders = [made.candidates / "cNNNN" / "attempts" / f"train-s{seed}-1" for seed in (0, 1)]
    for folder in folders:
        folder.mkdir(parents=True)
    prefix = jobspec.job_prefix(made)
    SlurmCluster(site.load(made.root / "site.yaml"), prefix, slurm).submit(folders, f"{prefix}cNNNN-train-s0-1", "train", 1)
    assert (tmp_path / "bin" / "last.sh").read_text() == shown and "--array=0-1%2" in shown


def test_a_job_inherits_neither_keys_nor_the_shape_of_the_controllers_own_job(slurm, tmp_path, sbatch, monkeypatch):
    sbatch('env >"$(dirname "$0")/env"; echo Submitted batch job 41')
    for name, value in {"OPENAI_API_KEY": "k", "SLURM_MEM_PER_NODE": "9", "SBATCH_ACCOUNT": "x", "SUBMITIT_EXECUTOR": "y", "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    cluster(slurm).submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1)
    seen = (tmp_path / "bin" / "env").read_text()
    assert "SLURM_CONF=/c" in seen and not any(word in seen for word in ("OPENAI", "MEM_PER_NODE", "SBATCH_ACCOUNT", "SUBMITIT_"))
    assert os.environ["OPENAI_API_KEY"] == "k" and os.environ["SLURM_MEM_PER_NODE"] == "9"


NOT_NOW = ["Batch job submission failed: Unable to contact slurm controller (connect failure)",
           "Batch job submission failed: Socket timed out on send/recv operation", "Slurm temporarily unable to accept job, sleeping and retrying",
           "AssocMaxSubmitJobLimit. Batch job submission failed: Job violates accounting/QOS policy (job submit limit, ...)",
           "QOSMaxSubmitJobPerUserLimit", "Batch job submission failed: Resource temporarily unavailable",
           "Batch job submission failed: Required partition not available (inactive or drain)", "Zero Bytes were transmitted or received",
           "Slurm backup controller in standby mode", "Protocol authentication error", "Communication connection failure",
           "Message send failure", "Requested operation is presently disabled", "I/O error writing script"]


@pytest.mark.parametrize("said", NOT_NOW)
def test_not_now_waits_longer_each_time(slurm, tmp_path, sbatch, said):
    class C:
        id, stage = "c0001", "check"

    sbatch(f"echo 'sbatch: error: {said}' >&2; exit 1")
    fake, wanted = cluster(slurm), [(C, "")]
    for pause in (15, 30, 60, 120, 240, 480, 600, 600):
        assert fake.batches(wanted) == [wanted]
        assert fake.submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1) is None
        slurm.now += pause - 1
        assert fake.batches(wanted) == []
        slurm.now += 1
    assert fake.submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1) is None and fake.batches(wanted) == []
    slurm.now -= 7200  # the clock was set back: that is no two hours more
    sbatch("echo Submitted batch job 41")
    assert fake.submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1) and fake.batches(wanted) == [wanted]


def test_a_clock_that_is_set_back_does_not_silence_the_questions(slurm, tmp_path):
    fake, one, slurm.queue = cluster(slurm, poll_s=30), job(tmp_path), line("7", "RUNNING")
    for slurm.now in (1000.0, 1001.0, 900.0, 901.0):
        fake.alive([one])
    assert slurm.calls == [(1000.0, "squeue"), (900.0, "squeue")]


def test_a_submit_limit_makes_arrays_smaller_until_one_fits(slurm, tmp_path, sbatch):
    """An array counts as all its elements: one larger than the limit would never be taken."""
    class C:
        id, stage = "c0001", "train"

    sbatch("""grep -qE -e '--array=0-([2-9]|[0-9]{2})' "${@: -1}" && echo QOSMaxSubmitJobPerUserLimit >&2 && exit 1\necho Submitted batch job 41""")
    fake, wanted, sizes = cluster(slurm, max_array=8), [(C, f"s{i}") for i in range(7)], []
    while wanted:
        (batch, *_), slurm.now = fake.batches(wanted), slurm.now + 1
        sizes.append(len(batch))
        if fake.submit(attempts(tmp_path, len(batch)), PREFIX + "x", "train", 1):
            wanted = wanted[len(batch):]
        slurm.now += 600
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_after_not_now_the_other_batches_of_the_step_are_not_tried(slurm, tmp_path, sbatch):
    folder = sbatch('echo x >>"$(dirname "$0")/tried"; echo "Unable to contact slurm controller" >&2; exit 1')
    fake = cluster(slurm)
    assert [fake.submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1) for _ in range(3)] == [None] * 3
    assert (folder / "tried").read_text() == "x\n"  # a dead scheduler takes many seconds to say so


@pytest.mark.parametrize("said", ["Batch job submission failed: Invalid partition name specified", "invalid account or account/partition combination",
                                  "Batch job submission failed: Requested node configuration is not available",
                                  "Invalid qos specification", "Batch job submission failed: Memory specification can not be satisfied"])
def test_a_wrong_request_is_said_at_once(slurm, tmp_path, sbatch, said):
    sbatch(f"echo 'sbatch: error: {said}' >&2; exit 1")
    with pytest.raises(PoiseError, match="Correct the site file"):
        cluster(slurm).submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1)


def test_no_slurm_here(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PoiseError, match="not on PATH"):
        cluster(slurm).submit(attempts(tmp_path, 1), PREFIX + "x", "check", 1)


# --- the commands themselves


def test_a_persons_defaults_for_the_commands_hide_no_job(monkeypatch):
    for name in ("SQUEUE_PARTITION", "SQUEUE_FORMAT2", "SACCT_LOCAL", "SCANCEL_STATE", "SLURM_CLUSTERS", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    seen = {line.partition("=")[0] for line in scheduler.run(["env"]).splitlines()}
    assert not {name for name in seen if name.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))} and {"SLURM_CLUSTERS", "SLURM_CONF", "PATH"} <= seen


def test_sbatch_goes_to_the_cluster_that_squeue_is_asked_about(monkeypatch):
    for name in ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_MEM_PER_NODE", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "x")
    with submission.clean_environment():
        assert {name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CLUSTERS", "SLURM_CONF"}
    assert os.environ["SLURM_MEM_PER_NODE"] == "x"


def test_a_command_that_fails_hangs_or_is_not_there_is_silence(tmp_path):
    with pytest.raises(SchedulerSilent, match="boom"):
        scheduler.run(["bash", "-c", "echo boom >&2; exit 3"])
    with pytest.raises(SchedulerSilent, match="did not answer within 0.2 s"):
        scheduler.run(["sleep", "5"], timeout_s=0.2)
    with pytest.raises(SchedulerSilent, match="No such file"):
        scheduler.run([str(tmp_path / "squeue")])
    assert scheduler.run(["printf", "a\\n"]) == "a\n"
