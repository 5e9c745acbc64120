"""Whole campaigns designed by a language model behind a real socket, checks included; only the training is left out."""
from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from helpers_campaign import campaign, noop_work
from helpers_drive import Mortal, ShuffledCluster, archive_of, write_package
from llm_server import Hang, LLMServer, Status
from scripted_agent import STORIES, USAGE, VALID, Agent, Story, seed

from poise_hpc import files, orders, replaying, views
from poise_hpc.agent.llm_proposer import LLMProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.controller import Controller
from poise_hpc.llm import Client
from poise_hpc.replay import Replay
from poise_hpc.transcript import Transcript
from poise_hpc.types import Outcome, Stage

_processes = multiprocessing.get_context("forkserver")


class CheckedCluster(InlineCluster):
    """noop jobs, but real checks: in a process of their own, once per package."""

    def __init__(self, pool: ProcessPoolExecutor):
        super().__init__(self.job)
        self.pool, self.known = pool, dict[str, tuple[dict[str, Any], Any]]()

    def job(self, attempt: Path, job: dict[str, Any]) -> dict[str, Any]:
        if job["kind"] != "check":
            return noop_work(attempt, job)
        package = (Path(job["package"]) / "manifest.json").read_text()
        if package not in self.known:
            self.known[package] = self.pool.submit(check, job, str(attempt)).result(120), files.read_json(attempt / "checks.json")
        result, checks = self.known[package]
        files.write_json(attempt / "checks.json", checks)
        return result


def check(job: dict[str, Any], attempt: str) -> dict[str, Any]:
    from poise_hpc import worker

    return worker.run(job, Path(attempt)) | {"walls": {}}


@pytest.fixture(scope="module")
def checked():
    with ProcessPoolExecutor(1, mp_context=_processes) as pool:
        yield CheckedCluster(pool)


def llm_campaign(root: Path, url: str, candidates: int, agent: dict[str, Any] | None = None, **search: Any) -> Campaign:
    settings = {"base_url": url, "models": {"default": ["m"]}, "timeout_s": 30.0, "max_attempts": 3, "backoff_s": 0.01, "backoff_max_s": 0.05,
                "repair_rounds": 1, "duplicate_rounds": 1, "prices": {"m": {"prompt": 2.0, "completion": 12.0}}, **(agent or {})}
    return campaign(root, search={"proposer": "llm", "candidates": candidates, "window": 3, "per_parent": 1, "train_seeds": [0], **search},
                    agent=settings)


def client(opened: Campaign) -> Client:
    return Client(opened.config.agent, Transcript(opened.root / "llm.jsonl", lambda: 0.0), environ={})


def controller(opened: Campaign, cluster: Any = None, llm: Any = None, threads: bool = True) -> Controller:
    return Controller(opened, cluster or InlineCluster(noop_work), LLMProposer(llm or client(opened), opened.config, opened.root), threads=threads)


def finish(driven: Controller) -> Controller:
    """Step until it is finished; while only the agent works, wait for it."""
    for _ in range(100_000):
        if not driven.step():
            if driven.finished:
                return driven
            threading_pause()
    raise AssertionError(f"not finished: {[(c.id, c.stage) for c in driven.active.values()]}")


def threading_pause() -> None:
    signal.sigtimedwait([], 0.002)


def spent(root: Path) -> dict[str, Any]:
    return views.llm_spending(Campaign.open(root))


# --- one campaign with every kind of reply


@pytest.fixture(scope="module")
def told(tmp_path_factory, checked):
    """The campaign of all stories, its endpoint's script, and the controller that drove it."""
    agent = Agent(STORIES)
    with LLMServer(agent) as server:
        # One call finds the server silent; all others are to be answered in time on a busy machine, too.
        opened = llm_campaign(tmp_path_factory.mktemp("told") / "c", server.url, len(STORIES) - 1, {"timeout_s": 4.0})
        return opened.root, agent, finish(controller(opened, checked))


def test_the_right_candidates_are_archived_and_the_others_rejected_with_the_reason(told):
    root, _, driven = told
    ends = {e.id: e.cause or str(e.outcome) for e in driven.archive.entries}
    assert ends == {
        "c0000": "succeeded", "c0001": "succeeded", "c0002": "succeeded", "c0003": "succeeded", "c0004": "inconsistent",
        "c0005": "duplicate", "c0006": "succeeded", "c0007": "malformed-reply", "c0008": "succeeded", "c0009": "refused",
        "c0010": "empty-reply", "c0011": "gate", "c0012": "check-failed", "c0013": "succeeded", "c0014": "succeeded"}
    said = {e.id: driven.campaign.load(e.id).message for e in driven.archive.entries}
    assert "line 40 clips the loss" in said["c0004"] and "c0001" in said["c0005"] and "I cannot help" in said["c0009"]
    assert "os" in said["c0011"] and "direction" in said["c0012"]
    assert driven.stop_proposing.startswith("all 14 candidates are proposed") and not driven.held


def test_a_repaired_package_keeps_what_it_replaced(told):
    root, _, driven = told
    for id, right, wrong in [("c0003", seed("sapo"), STORIES["c0003"].code), ("c0013", VALID, STORIES["c0013"].code)]:
        folder = root / "candidates" / id
        assert (folder / "algorithm.py").read_text() == right and (folder / "versions/1/algorithm.py").read_text() == wrong
        attempts = driven.campaign.load(id).attempts
        assert [(a.name, a.version) for a in attempts if a.stage == Stage.CHECK] == [("check-1", 1), ("check-2", 2)]
        assert driven.campaign.proposal(id).details["repairs"] == 1
    assert attempts[0].outcome is Outcome.SUCCEEDED  # c0013's first package passed; only its response spoke against it


def test_reflections_are_the_models_where_something_ran(told):
    _, agent, driven = told
    authors = {e.id: files.read_json(driven.campaign.candidates / e.id / "reflection.json")["author"] for e in driven.archive.entries}
    assert {id for id, author in authors.items() if author == "rules"} == {f"c{n:04d}" for n in (4, 5, 7, 9, 10, 11)}
    assert ("propose", "SEQ-GRPO") not in agent.asked  # it came with its sibling


def test_the_ledger_is_what_the_endpoint_charged(told):
    """429, 500: nothing. A connection lost after sending, a silent server: the worst case."""
    root, agent, driven = told
    free = {"implement": 2}  # 429 of c0002, 500 of c0014
    lost = [line for line in files.read_lines(root / "llm.jsonl") if line["event"] == "error" and line["spent"]["tokens"]]
    assert sorted(line["key"].split("/")[1] for line in lost) == ["implement", "review"]
    for name, ledger in spent(root)["operators"].items():
        calls = [story for operator, story in agent.asked if operator == name]
        prompt, completion = USAGE[name]
        charged = len(calls) - free.get(name, 0) - sum(line["key"].split("/")[1] == name for line in lost)
        worst = sum(line["spent"]["tokens"] for line in lost if line["key"].split("/")[1] == name)
        unusual = {"propose": 695 + 700}.get(name, 0)  # c0009's and c0010's short replies
        assert ledger["calls"] == len(calls) and ledger["tokens"] == charged * (prompt + completion) + worst - unusual


def test_a_replay_gives_the_same_archive_without_an_endpoint(told, checked, tmp_path):
    root, _, _ = told
    origin = Campaign.open(root)
    target = replaying.create(origin, tmp_path / "again")
    finish(controller(target, checked, Replay(target.config.agent, Transcript(target.root / "llm.jsonl", lambda: 0.0))))
    assert replaying.compare(origin, target) == {"origin": str(root), "replay": str(target.root), "candidates": 15, "different": {}}
    assert (target.root / "llm.jsonl").read_bytes() == (root / "llm.jsonl").read_bytes()


def test_a_replay_of_another_archive_stops_and_says_so(told, checked, tmp_path):
    """One reply was changed: what follows from it does not fit the transcript."""
    origin = Campaign.open(told[0])
    target = replaying.create(origin, tmp_path / "again")
    path = target.root / "llm.jsonl"
    path.write_text(path.read_text().replace("learns as fast as its parent", "learns faster than its parent"))
    driven = finish(controller(target, checked, Replay(target.config.agent, Transcript(path, lambda: 0.0))))
    assert "does not answer c0001/propose/0/" in driven.thinking.blocked


def test_a_replay_of_an_asynchronous_campaign_shows_each_candidate_what_it_had_seen(tmp_path):
    with LLMServer(Agent(FEW)) as server:
        opened = llm_campaign(tmp_path / "c", server.url, 4, asynchronous=True)
        finish(controller(opened, ShuffledCluster(5, slots=3)))
    pending = {id: files.read_json(opened.candidates / id / "pick.json")["pending"] for id in ("c0001", "c0002", "c0003", "c0004")}
    assert pending["c0001"] == [] and any(pending.values())
    for seed in (1, 2):
        target = replaying.create(opened, tmp_path / f"again-{seed}")
        finish(controller(target, ShuffledCluster(seed, slots=2), Replay(target.config.agent, Transcript(target.root / "llm.jsonl", lambda: 0.0))))
        assert replaying.compare(opened, target)["different"] == {}
        assert pending == {id: files.read_json(target.candidates / id / "pick.json")["pending"] for id in pending}


# --- killed, held up, out of money

FEW = {id: STORIES[id] for id in ("c0000", "c0001", "c0002", "c0003", "c0004")}


def drive_and_die(root: str) -> None:
    finish(controller(Campaign.open(Path(root))))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with LLMServer(Agent(FEW)) as server:
        root = llm_campaign(tmp_path_factory.mktemp("undisturbed") / "c", server.url, 4).root
        finish(controller(Campaign.open(root)))
    return archive_of(root)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal but for the config, which names the endpoint."""
    return [{k: v for k, v in e.items() if k != "config"} for e in found.values()] == [
        {k: v for k, v in e.items() if k != "config"} for e in wanted.values()]


def test_a_controller_killed_in_its_calls_pays_for_no_reply_twice(undisturbed, tmp_path):
    """kill -9 of the whole controller as the endpoint takes its 1st, 3rd, 6th, ... request; then again from the folder."""
    kill_at, running = {1, 3, 6, 9, 13}, list[Any]()

    def struck(number: int) -> None:
        if number in kill_at:
            os.kill(running[-1].pid, signal.SIGKILL)
            while files.process_start(running[-1].pid) is not None:  # not join: the main thread joins, and only one learns the exit code
                time.sleep(0.01)

    with LLMServer(Agent(FEW, struck)) as server:
        root = llm_campaign(tmp_path / "c", server.url, 4).root
        while not running or running[-1].exitcode == -signal.SIGKILL:
            running.append(_processes.Process(target=drive_and_die, args=(str(root),)))
            running[-1].start()
            running[-1].join(120)
    assert len(running) == 1 + len(kill_at) and running[-1].exitcode == 0
    assert same(archive_of(root), undisturbed)
    lines = list(files.read_lines(root / "llm.jsonl"))
    replies = [line["key"] for line in lines if line["event"] == "reply"]
    assert len(replies) == len(set(replies))
    cut = {line["call"]: line["worst"]["tokens"] for line in lines if line["event"] == "sent"}
    for line in lines:
        if line["event"] in ("reply", "error"):
            del cut[line["call"]]
    assert len(kill_at) <= len(cut) <= len(kill_at) * Campaign.open(root).config.agent.max_parallel
    charged = sum(sum(USAGE[key.split("/")[1]]) for key in replies)
    assert spent(root)["tokens"] == charged + sum(cut.values())  # a call that was cut off counts at its worst


def test_step_alone_drives_a_campaign(undisturbed, tmp_path):
    """Every step in a controller of its own, as cron calls it; it waits for the calls that it makes."""
    with LLMServer(Agent(FEW)) as server:
        root = llm_campaign(tmp_path / "c", server.url, 4).root
        for steps in range(1, 200):
            driven = controller(Campaign.open(root))
            driven.step()
            driven.thinking.settle(lambda: None)
            driven.step()
            if driven.finished:
                break
    assert same(archive_of(root), undisturbed) and steps < 40


def test_the_budget_holds_to_the_cent_and_more_money_goes_on(undisturbed, tmp_path):
    with LLMServer(Agent(FEW)) as server:
        root = llm_campaign(tmp_path / "c", server.url, 4, {"budget_cost": 0.25, "max_tokens": 2000}).root
        driven = finish(controller(Campaign.open(root)))
        assert "budget" in driven.stop_proposing and 0 < len(driven.archive.entries) < 5
        ledger = spent(root)
        paid = sum(Decimal(2 * p + 12 * c) / 1_000_000 for p, c in (USAGE[line["key"].split("/")[1]] for line in files.read_lines(
            root / "llm.jsonl") if line["event"] == "reply"))
        assert Decimal(ledger["cost"]) == paid <= Decimal("0.25") and Decimal(ledger["cost_left"]) == Decimal("0.25") - paid
        assert f"cost {ledger['cost']}; {ledger['cost_left']} left" in views.status_text(views.status(Campaign.open(root)))
        opened = Campaign.open(root)
        opened.adopt(opened.config.model_copy(update={"agent": opened.config.agent.model_copy(update={"budget_cost": 9.0})}))
        driven = finish(controller(Campaign.open(root)))
    assert [e.id for e in driven.archive.entries] == list(FEW)
    replies = [line["key"] for line in files.read_lines(root / "llm.jsonl") if line["event"] == "reply"]
    assert len(replies) == len(set(replies))


def test_an_endpoint_that_is_away_is_waited_for(undisturbed, tmp_path):
    away = Story(**{**vars(STORIES["c0001"]), "trouble": {"propose": (Status(503),) * 7}})  # three attempts, three times
    with LLMServer(Agent(FEW | {"c0001": away})) as server:
        driven = finish(controller(llm_campaign(tmp_path / "c", server.url, 4)))
    assert same(archive_of(driven.campaign.root), undisturbed)
    assert (driven.campaign.root / "events.log").read_text().count("propose waits") == 1  # twice the same


def test_a_refused_key_needs_a_person_and_loses_nothing(undisturbed, tmp_path):
    locked = [True]
    agent = Agent(FEW)
    with LLMServer(lambda request: Status(401, "wrong key") if locked else agent(request)) as server:
        root = llm_campaign(tmp_path / "c", server.url, 4).root
        driven = finish(controller(Campaign.open(root)))
        assert "answered 401: " in driven.thinking.blocked and len(server.requests) == 1
        assert driven.active["c0000"].stage == Stage.REFLECT  # waits, for the next run
        locked.clear()
        finish(controller(Campaign.open(root)))
    assert same(archive_of(root), undisturbed)


def test_jobs_go_on_while_the_model_is_silent(tmp_path):
    """The reflection of c0001 hangs; c0002 and c0003 are proposed, trained and archived meanwhile, as the window allows."""
    slow = Story(**{**vars(STORIES["c0001"]), "trouble": {"reflect": (Hang(),) * 50}})
    with LLMServer(Agent(FEW | {"c0001": slow})) as server:
        driven = controller(llm_campaign(tmp_path / "c", server.url, 4, {"timeout_s": 60.0}))
        while len(driven.archive.entries) < 3:
            if not driven.step():
                threading_pause()
        assert driven.active["c0001"].stage == Stage.REFLECT and not driven.finished
        assert {e.id for e in driven.archive.entries} <= {"c0000", "c0002", "c0003"}


# --- what persons say to a running search


def prompts(server: LLMServer, start: str) -> list[str]:
    return [r["messages"][1]["content"] for r in server.requests if start in r["messages"][1]["content"] and len(r["messages"]) == 2]


def test_guidance_holds_from_the_next_proposal_on_and_replays(tmp_path):
    stories = FEW | {"c0003": STORIES["c0006"], "c0004": STORIES["c0014"], "c0005": STORIES["c0008"]}
    stories = {id: Story(**{**vars(s), "trouble": None, "propose": ()}) for id, s in stories.items()}
    with LLMServer(Agent(stories)) as server:
        opened = llm_campaign(tmp_path / "c", server.url, 3, window=1)
        driven = controller(opened, threads=False)
        while driven.count < 2:
            driven.step()
        orders.give(opened, "directive", text="keep accuracy, write shorter outputs")
        orders.give(opened, "idea", text="gate the length term on the pass rate")
        orders.give(opened, "veto", text="sequence-ratio")
        orders.package(opened, write_package(tmp_path / "own"), None)
        finish(driven)
        orders.give(opened, "pin", text="c0002")
        opened.adopt(opened.config.model_copy(update={"search": opened.config.search.model_copy(update={"candidates": 4})}))
        driven = finish(controller(opened, threads=False))
        asked = prompts(server, "# Task\n\nPropose ")
    names = {e.id: e.name for e in driven.archive.entries}
    assert names["c0001"] == "MAXRL-GRPO" and names["c0002"] == "mine"
    assert "gate the length term" not in asked[0] and "gate the length term on the pass rate" in asked[1] and "gate the length" not in asked[2]
    assert "None: raise Overall" in asked[0] and all("write shorter outputs" in text for text in asked[1:])
    assert all("in no proposal: sequence-ratio" in text for text in asked[1:])
    lines = list(files.read_lines(opened.root / "guidance.jsonl"))
    assert [(line["kind"], line["from"]) for line in lines] == [("directive", 2), ("idea", 2), ("veto", 2), ("pin", 5)]
    assert driven.archive.entries[5].parents == ("c0002",)
    target = replaying.create(Campaign.open(opened.root), tmp_path / "again")
    finish(controller(target, None, Replay(target.config.agent, Transcript(target.root / "llm.jsonl", lambda: 0.0))))
    assert replaying.compare(opened, target)["different"] == {}


def test_a_sibling_written_ahead_is_paid_once_and_replays(tmp_path):
    agent = Agent(FEW)
    with LLMServer(agent) as server:
        opened = llm_campaign(tmp_path / "c", server.url, 2, per_parent=2)
        driven = controller(opened)
        while driven.count < 2:
            driven.step()
        assert Transcript(opened.root / "llm.jsonl", lambda: 0.0).turns("c0002", "implement")  # while c0001 was made
        finish(driven)
    assert agent.asked.count(("implement", "SEQ-GRPO")) == 2  # its first answer was a 429
    target = replaying.create(opened, tmp_path / "again")
    finish(controller(target, None, Replay(target.config.agent, Transcript(target.root / "llm.jsonl", lambda: 0.0))))
    assert replaying.compare(opened, target)["different"] == {}


def test_a_directive_reaches_the_sibling_of_a_candidate_that_runs(tmp_path):
    """c0001's reply holds c0002's idea as well; a directive given in between is asked with all the same."""
    with LLMServer(Agent(FEW)) as server:
        opened = llm_campaign(tmp_path / "c", server.url, 2, per_parent=2)
        driven = controller(opened, threads=False)
        while driven.count < 2:
            driven.step()
        assert driven.campaign.proposal("c0001").details["alternatives"][0]["name"] == "SEQ-GRPO"
        orders.give(opened, "directive", text="write shorter outputs")
        finish(driven)
        asked = prompts(server, "# Task\n\nPropose ")
    assert ["write shorter outputs" in text for text in asked] == [False, True]


def test_a_campaign_and_its_replay_keep_the_cards_they_began_with(tmp_path):
    """The user's folder is edited between two starts, then it is gone: the prompts stay, and the replay fits."""
    mine = tmp_path / "mine"
    mine.mkdir()
    card = "---\nname: My method\nslots: clipping\narxiv:\nyear: 2026\ntags: slow-start\n---\n{}\n"
    (mine / "a.md").write_text(card.format("Clip by the moon."))
    with LLMServer(Agent(FEW)) as server:
        opened = llm_campaign(tmp_path / "c", server.url, 3, {"cards": [str(mine)]})
        driven = controller(opened, threads=False)
        while driven.count < 2:
            driven.step()
        (mine / "a.md").write_text(card.format("Clip by the sun."))
        (mine / "b.md").write_text("no card at all")
        finish(controller(Campaign.open(opened.root), threads=False))
        asked = prompts(server, "# Task\n\nPropose ")
    assert ["Clip by the moon." in text for text in asked] == [True, True]
    shutil.rmtree(mine)
    target = replaying.create(Campaign.open(opened.root), tmp_path / "again")
    finish(controller(target, None, Replay(target.config.agent, Transcript(target.root / "llm.jsonl", lambda: 0.0))))
    assert replaying.compare(opened, target)["different"] == {}


# --- killed at any write


def strict(attempt: Path, job: dict[str, Any]) -> dict[str, Any]:
    """noop jobs; the check fails where the loss has the wrong sign."""
    if job["kind"] == "check" and "return A * 4 / tau" in (Path(job["package"]) / "algorithm.py").read_text():
        return {"outcome": Outcome.CANDIDATE_ERROR, "cause": "check-failed", "message": "direction: the loss rises", "payload": {}, "walls": {}}
    return noop_work(attempt, job)


def test_killed_at_any_write_the_campaign_ends_the_same(tmp_path):
    """A campaign with a sibling, a repair and a rejection; the controller dies before its n-th change of the file system."""
    agent = Agent({id: Story(**{**vars(s), "trouble": None}) for id, s in FEW.items()})
    with LLMServer(agent) as server:
        whole = llm_campaign(tmp_path / "whole", server.url, 4)
        with Mortal(10**9) as counted:
            finish(controller(whole, InlineCluster(strict), threads=False))
        wanted, asked = archive_of(whole.root), len(agent.asked)
        assert (whole.root / "candidates/c0003/versions/1").is_dir() and wanted["c0003"]["outcome"] == Outcome.SUCCEEDED
        for at in random.Random(0).sample(range(counted.calls), 7):
            opened, before = llm_campaign(tmp_path / f"at-{at}", server.url, 4), len(agent.asked)
            with Mortal(at):
                finish(controller(opened, InlineCluster(strict), threads=False))
            finish(controller(Campaign.open(opened.root), InlineCluster(strict), threads=False))
            assert same(archive_of(opened.root), wanted), at
            assert len(agent.asked) - before == asked, at  # every reply was asked for once
