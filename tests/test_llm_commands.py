"""`run`, `step` and `status` with a language model behind a real socket that is not what it should be. Only the training is left out."""
from __future__ import annotations

import json

import pytest
from helpers_campaign import noop_work
from scripted_agent import Agent
from test_cli import run
from test_llm_campaign import FEW, llm_campaign

from llm_server import LLMServer, Raw, Status
from poise_hpc import replaying
from poise_hpc.cli.driving import Progress
from poise_hpc.cluster import base
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.transcript import Amount, Limit, Request, Transcript, pending

PAGE = Raw(b"<html><title>Sign in</title></html>")


@pytest.fixture(autouse=True)
def noop_jobs(monkeypatch):
    monkeypatch.setattr(base, "for_campaign", lambda campaign: InlineCluster(noop_work))


@pytest.mark.parametrize("command", ["run", "step"])
@pytest.mark.parametrize(("answer", "words"), [(PAGE, "agent.base_url (does it end in /v1?)"), (Status(401, "who?"), "Check the key")], ids=["page", "401"])
def test_a_wrong_address_or_key_is_known_before_anything_is_submitted(tmp_path, command, answer, words):
    with LLMServer(Agent(FEW), models=answer) as server:
        root = llm_campaign(tmp_path / "c", server.url, 1, {"budget_tokens": 10**6}).root
        result = run(command, root, code=3)
        assert words in result.stderr and "warning" not in result.stderr and server.requests == [] and server.listed == 1
        assert not list(root.glob("*/attempts/*")) and not list(root.glob("candidates/*"))
        status = run("status", root).output
        assert f"{root}: held: the agent: " in status and words in status and "ETA" not in status
        run("watch", root, code=3)
        server.models = None
        run("run", root)
    assert "held" not in run("status", root).output and not (root / "ended.json").exists()


def test_web_pages_for_replies_end_the_run_and_cost_nothing(tmp_path):
    with LLMServer([PAGE] * 9, models=Status(404)) as server:
        root = llm_campaign(tmp_path / "c", server.url, 2, {"budget_tokens": 100_000}).root
        result = run("run", root, code=3)
        assert "answered 404 to the list" in result.stderr and "held: the agent: c0000 reflect" in result.stderr and len(server.requests) == 3
    data = json.loads(run("status", root, "--json").stdout)
    assert data["llm"]["tokens"] == 0 and not data["done"] and "Sign in" in data["agent_blocked"] and data["budget"]["eta_s"] is None


def test_a_spent_budget_is_the_end_for_status_too(tmp_path):
    with LLMServer(Agent(FEW)) as server:
        root = llm_campaign(tmp_path / "c", server.url, 2, {"budget_tokens": 10}).root
        said = "0 of 10 tokens are used, and the call could take"
        assert f"nothing new is proposed: c0001 propose: {said}" in run("run", root).output
        data = json.loads(run("status", root, "--json").stdout)
        assert data["done"] and said in data["proposing_ended"] and not data["budget"]["eta_s"]
        assert "ended early: c0001 propose: 0 of 10 tokens" in run("status", root).output
        (root / "more.yaml").write_text((root / "config.yaml").read_text().replace("budget_tokens: 10\n", "budget_tokens: 1000000\n"))
        run("run", root, "--config", root / "more.yaml")
    assert "done: all 2 candidates are proposed" in run("status", root).output


def test_the_list_of_models_is_asked_for_until_there_is_a_reply_and_by_no_replay(tmp_path):
    with LLMServer(Agent(FEW)) as server:
        opened = llm_campaign(tmp_path / "c", server.url, 1, {"models": {"default": ["m", "other"]}, "prices": {}})
        first = run("run", opened.root)
        assert "does not list other (agent.models); it lists m" in first.stderr and "neither agent.budget_cost nor" in first.stderr
        run("run", opened.root)
        run("replay", opened.root, tmp_path / "again")
        assert server.listed == 1
    assert replaying.compare(opened, opened)["candidates"] == 2


def test_an_endpoint_that_is_away_is_a_warning_and_its_waiting_call_is_seen(tmp_path, capsys):
    with LLMServer([]) as server:
        opened = llm_campaign(tmp_path / "c", server.url, 1, {"max_attempts": 1})
    result = run("step", opened.root)  # the port is closed now
    assert "warning: http://127.0.0.1" in result.stderr and "c0000  reflect  waits: Connection error" in result.output
    assert next(line for line in run("status", opened.root).output.splitlines() if line.startswith("c0000")).endswith("reflect  reflect waits")
    Progress(opened, quiet=False, every_s=0.0)()
    assert "|  c0000  reflect  waits: Connection error" in capsys.readouterr().out


def test_what_is_pending_is_read_from_the_end_of_the_transcript(tmp_path):
    transcript = Transcript(tmp_path / "llm.jsonl", lambda: 0.0)
    begin = lambda id, what: (request := Request(what, id, 0, ({"role": "user", "content": "x" * 1000},)), transcript.begin(  # noqa: E731
        request, "m", False, Amount(1), Limit()))
    request, call = begin("c0001", "review")
    assert pending(transcript.path) == [{"candidate": "c0001", "operator": "review", "model": "m", "error": ""}]
    transcript.fail(call, request, "m", 503, "busy", Amount())
    begin("c0001", "review")
    assert [p["error"] for p in pending(transcript.path)] == ["busy"]  # tried again
    begin("c0001", "reflect")
    assert [(p["operator"], p["error"]) for p in pending(transcript.path)] == [("reflect", "")]
    request, call = begin("c0001", "reflect")
    transcript.end(call, request, "m", '{"choices": [{"message": {"content": "x"}}]}', Amount())
    assert pending(transcript.path) == []
