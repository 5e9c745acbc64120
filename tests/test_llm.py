"""The LLM client over real sockets. Time moves by an injected sleep."""
from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest

from llm_server import Answer, Disconnect, Hang, LLMServer, Raw, Status
from poise_hpc.access import read_key
from poise_hpc.agent_config import Agent, Price
from poise_hpc.llm import Client, prompt_bound, served_models
from poise_hpc.pace import Pace
from poise_hpc.replay import EmptyReply, NoList, Refused, Rejected, Replay, TooLong, Unavailable, UnknownRequest
from poise_hpc.transcript import Amount, BudgetExceeded, Limit, Request, Transcript
from poise_hpc.types import UsageError

SECRET = "sk-very-secret-0123456789"
SILENT_S = 2.0  # of a server that hangs, before it is given up; no other test waits for so short a time: this machine may be busy


def ask(text: str = "hi", *, turn: int = 0, schema: dict | None = None, candidate: str = "c0007") -> Request:
    return Request("propose", candidate, turn, ({"role": "user", "content": text},), schema)


class Bench:
    """A client on a scripted server; `sleeps` are the waits it asked for, in seconds."""

    def __init__(self, server: LLMServer, folder: Path, **settings):
        self.path, self.sleeps = folder / "llm.jsonl", []
        options = {"models": {"default": ("m",)}, "timeout_s": 30.0, "max_tokens": 50, "max_attempts": 4} | settings
        self.settings = Agent(base_url=server.url, api_key_env="THE_KEY", **options)
        self.client = self.again()

    def transcript(self) -> Transcript:
        return Transcript(self.path, lambda: 1000.0)

    def again(self) -> Client:
        """The same client in a new process."""
        return Client(self.settings, self.transcript(), environ={"THE_KEY": SECRET}, sleep=self.sleeps.append,
                      clock=lambda: 0.0)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def test_reply_is_noted_with_request_usage_and_cost(tmp_path):
    with LLMServer([Answer("hello", usage=(1000, 500))]) as server:
        bench = Bench(server, tmp_path, prices={"m": Price(prompt=2.0, completion=10.0)})
        assert bench.client.complete(ask()).text == "hello"
    sent, reply = bench.lines()
    assert (sent["event"], sent["candidate"], sent["operator"], sent["model"]) == ("sent", "c0007", "propose", "m")
    assert sent["messages"] == [{"role": "user", "content": "hi"}] and sent["sha256"] == ask().sha256
    # 1000 tokens at 2 per million + 500 at 10 per million = 0.002 + 0.005
    assert reply["spent"] == {"tokens": 1500, "cost": "0.007"}
    assert json.loads(reply["body"])["choices"][0]["message"]["content"] == "hello"
    assert server.requests[0]["max_tokens"] == 50 and server.keys == [f"Bearer {SECRET}"]


def test_what_was_sent_is_noted_whole(tmp_path):
    """From its line in the transcript the request can be written again, word for word."""
    with LLMServer([Answer("a"), Answer("b")]) as server:
        Bench(server, tmp_path, temperature=0.3).client.complete(ask(schema={"type": "object"}))
        bench = Bench(server, tmp_path, temperature=None, max_tokens_key="max_completion_tokens")
        bench.client.complete(ask("again"))
    for line, body in zip([line for line in bench.lines() if line["event"] == "sent"], server.requests, strict=True):
        schema = body.pop("response_format", {"json_schema": {"schema": None}})["json_schema"]["schema"]
        assert line["options"] | {"model": line["model"], "messages": line["messages"]} == body and line["schema"] == schema
        assert line["url"] == server.url


def test_an_answered_request_is_never_sent_again(tmp_path):
    with LLMServer([Answer("once")]) as server:
        bench = Bench(server, tmp_path)
        assert [bench.client.complete(ask()).text, bench.again().complete(ask()).text] == ["once", "once"]
        assert len(server.requests) == 1


@pytest.mark.parametrize("trouble", [Status(429), Status(500), Status(503), Status(408), Hang(), Disconnect(),
                                     Raw(b"<html>proxy</html>"), Raw(b"{}", "application/json")], ids=str)
def test_passing_trouble_is_tried_again(tmp_path, trouble):
    with LLMServer([trouble, Answer("ok")]) as server:
        bench = Bench(server, tmp_path, timeout_s=SILENT_S if isinstance(trouble, Hang) else 30.0)
        assert bench.client.complete(ask()).text == "ok"
    assert len(server.requests) == 2 and len(bench.sleeps) == 1


def test_backoff_doubles_with_seeded_jitter(tmp_path):
    with LLMServer([Status(500)] * 8) as server:
        waits = []
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            bench = Bench(server, tmp_path / folder, backoff_s=2.0)
            with pytest.raises(Unavailable, match="attempt 4 failed.*nothing paid is lost"):
                bench.client.complete(ask())
            waits.append(bench.sleeps)
    assert waits[0] == waits[1] and len(set(waits[0])) == 3
    assert all(0.75 * 2 ** (n + 1) <= wait <= 2 ** (n + 1) for n, wait in enumerate(waits[0]))


@pytest.mark.parametrize(("headers", "wait"), [
    ({"Retry-After": "7"}, 7.0),
    ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, None),  # the server's Date is years earlier: beyond backoff_max_s
])
def test_retry_after_is_honoured(tmp_path, headers, wait):
    with LLMServer([Status(429, headers=headers), Answer("ok")]) as server:
        bench = Bench(server, tmp_path)
        if wait is None:
            with pytest.raises(Unavailable):
                bench.client.complete(ask())
        else:
            assert bench.client.complete(ask()).text == "ok"
    assert bench.sleeps == ([wait] if wait else [])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_wrong_request_is_not_repeated(tmp_path, status):
    with LLMServer([Status(status, "no such thing"), Answer("never")]) as server:
        bench = Bench(server, tmp_path)
        with pytest.raises(Rejected, match=f"{status}: .*no such thing"):
            bench.client.complete(ask())
    assert len(server.requests) == 1 and bench.sleeps == []


LONG = "a word " * 6000  # 42,000 bytes, about 14,000 tokens


@pytest.mark.parametrize("answer", [
    Status(400, "This model's maximum context length is 16384 tokens. However, you requested 30384 tokens"),
    Status(400, "Input tokens exceed the configured limit", error="context_length_exceeded"),
    Status(400, "prompt is too long: 213462 tokens > 200000 maximum"), Status(413, "payload"),
    Status(400, "The input token count (40000) exceeds the maximum number of tokens allowed (32768).")], ids=str)
def test_a_prompt_beyond_the_context_is_typed_and_replays(tmp_path, answer):
    with LLMServer([answer, Answer("never")]) as server:
        bench = Bench(server, tmp_path)
        with pytest.raises(TooLong, match="about 14032 tokens, is too long"):
            bench.client.complete(ask(LONG, schema={}))
        assert len(server.requests) == 1
    assert bench.transcript().spent()["propose"].tokens == 0
    with pytest.raises(TooLong):
        Replay(bench.settings, bench.transcript()).complete(ask(LONG, schema={}))


def test_a_longer_context_takes_over(tmp_path):
    full = Status(400, "maximum context length is 16384 tokens")
    with LLMServer(lambda request: Answer("fits") if request["model"] == "b" else full) as server:
        bench = Bench(server, tmp_path, models={"default": ("a", "b")})
        assert bench.client.complete(ask(LONG)).model == "b"
        assert Replay(bench.settings, bench.transcript()).complete(ask(LONG)).text == "fits"


def test_a_context_too_small_for_any_prompt_needs_a_person(tmp_path):
    with LLMServer([Status(400, "maximum context length is 2048 tokens")] * 2) as server:
        bench = Bench(server, tmp_path)
        with pytest.raises(Rejected, match="no room for a prompt of about 32 tokens beside a reply of 50.*Lower agent.max_tokens"):
            bench.client.complete(ask())
        with pytest.raises(UnknownRequest):  # not settled: it is asked again after the cure
            Replay(bench.settings, bench.transcript()).complete(ask())


def test_a_context_that_is_known_is_not_tried(tmp_path):
    # 14,032 tokens of prompt and 50 of reply
    with LLMServer([Answer("fits")]) as server:
        with pytest.raises(TooLong, match=r"do not fit into 14081 \(agent.context_tokens\)"):
            Bench(server, tmp_path, context_tokens=14_081).client.complete(ask(LONG))
        assert server.requests == []
        small = Bench(server, tmp_path)
        with pytest.raises(TooLong):
            Replay(small.settings, small.transcript()).complete(ask(LONG))
        assert Bench(server, tmp_path, context_tokens=14_082).client.complete(ask(LONG)).text == "fits"
    with pytest.raises(ValueError, match="leaves nothing for a prompt"):
        Agent(context_tokens=50, max_tokens=50)


def test_an_empty_purse_at_the_provider_is_not_waited_for(tmp_path):
    with LLMServer([Status(429, error="insufficient_quota"), Answer("never")]) as server:
        with pytest.raises(Rejected):
            Bench(server, tmp_path).client.complete(ask())


@pytest.mark.parametrize("trouble", [Status(404), Status(503), Answer(None, refusal="I will not"), Answer(""),
                                     Answer(None, finish="content_filter")], ids=str)
def test_next_model_takes_over(tmp_path, trouble):
    with LLMServer(lambda request: Answer("from b") if request["model"] == "b" else trouble) as server:
        bench = Bench(server, tmp_path, models={"default": ("z",), "propose": ("a", "b")}, max_attempts=1)
        assert (reply := bench.client.complete(ask())).text == "from b" and reply.model == "b"
        assert bench.again().complete(ask()) == reply
        assert [r["model"] for r in server.requests] == ["a", "b"]


@pytest.mark.parametrize(("answer", "error"), [
    (Answer(None, refusal="I will not"), Refused), (Answer(None, finish="content_filter"), Refused),
    (Answer("  \n"), EmptyReply), (Answer(None, finish="length"), EmptyReply)], ids=str)
def test_refused_and_empty_replies_are_typed_and_paid_once(tmp_path, answer, error):
    with LLMServer([answer]) as server:
        bench = Bench(server, tmp_path)
        for client in (lambda: bench.client, bench.again, lambda: Replay(bench.settings, bench.transcript())):
            with pytest.raises(error):
                client().complete(ask())
        assert len(server.requests) == 1


def test_budget_stops_before_the_call_that_could_break_it(tmp_path):
    # Worst case of a call: (2 bytes + 32) prompt tokens at 10 per million + 50 at 100 per million = 0.00034 + 0.005.
    # Each answer really costs 20 x 10 + 40 x 100 per million = 0.0042. Budget 0.0174:
    # before call n, 0.0042 (n-1) + 0.00534 <= 0.0174 holds for n = 1, 2, 3 and fails for n = 4 (0.01794).
    price = {"m": Price(prompt=10.0, completion=100.0)}
    assert prompt_bound(ask("ab")) == 34
    with LLMServer(lambda request: Answer("x", usage=(20, 40))) as server:
        bench = Bench(server, tmp_path, prices=price, budget_cost=0.0174)
        for turn in range(3):
            bench.client.complete(ask("ab", turn=turn))
        for client in (bench.client, bench.again()):
            with pytest.raises(BudgetExceeded, match="0.0126 of a budget of 0.0174 is spent, and the call could cost 0.00534"):
                client.complete(ask("ab", turn=3))
        assert len(server.requests) == 3
        with pytest.raises(BudgetExceeded):  # a replay stops where the campaign did
            Replay(bench.settings, bench.transcript()).complete(ask("ab", turn=3))
    assert bench.transcript().spent()["propose"].cost == Decimal("0.0126")


def test_budget_exactly_used_up(tmp_path):
    # Worst case = real cost = 34 + 50 = 84 tokens; 252 = 3 x 84 tokens allow exactly three.
    with LLMServer(lambda request: Answer("x", usage=(34, 50))) as server:
        bench = Bench(server, tmp_path, budget_tokens=252)
        for turn in range(3):
            bench.client.complete(ask("ab", turn=turn))
        with pytest.raises(BudgetExceeded):
            bench.client.complete(ask("ab", turn=3))


def test_budget_holds_with_calls_in_parallel(tmp_path):
    gate = threading.Barrier(3)  # three fit; were a fourth let through, the server would see it

    def script(request):
        gate.wait(60)
        return Answer("x", usage=(34, 50))

    with LLMServer(script) as server:
        bench = Bench(server, tmp_path, budget_tokens=3 * 84 + 83, max_parallel=8, timeout_s=60.0)

        def one(turn):
            try:
                return bench.client.complete(ask("ab", turn=turn)).text
            except BudgetExceeded:
                return None

        with ThreadPoolExecutor(8) as pool:
            out = list(pool.map(one, range(8)))
    assert sorted(filter(None, out)) == ["x"] * 3 and len(server.requests) == 3


def test_what_may_have_been_charged_counts_at_its_worst(tmp_path):
    # 429, 500: nothing generated. Silence, half an answer, an answer without usage: 34 + 50 tokens each.
    script = [Status(429), Status(500), Hang(), Answer("a", usage=None), Disconnect(), Answer("b", usage=(1, 2))]
    with LLMServer(script) as server:
        bench = Bench(server, tmp_path, timeout_s=SILENT_S)
        bench.client.complete(ask("ab"))
        bench.client.complete(ask("ab", turn=1))
    assert bench.transcript().spent()["propose"].tokens == 84 + 84 + 84 + 3


def test_no_connection_costs_nothing(tmp_path):
    with LLMServer([]) as server:
        bench = Bench(server, tmp_path)
    with pytest.raises(Unavailable):  # the port is closed now
        bench.client.complete(ask())
    assert bench.transcript().spent()["propose"].tokens == 0


def test_parallel_calls_are_bounded(tmp_path):
    third = threading.Event()

    def script(request):  # a request stays until a third one is in flight; with a limit of two it waits in vain
        if server.parallel > 2:
            third.set()
        third.wait(0.1)
        return Answer(request["messages"][0]["content"])

    with LLMServer(script) as server:
        bench = Bench(server, tmp_path, max_parallel=2, timeout_s=15.0)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda n: bench.client.complete(ask(f"text {n}", turn=n)).text, range(8)))
    assert replies == [f"text {n}" for n in range(8)] and not third.is_set()
    assert bench.again().complete(ask("text 5", turn=5)).text == "text 5"


def test_pace_spreads_requests():
    now, sleeps = [0.0], []

    def sleep(seconds):
        sleeps.append(seconds)
        now[0] += seconds

    pace = Pace(30.0, sleep, lambda: now[0])  # every 2 s
    pace.wait(), pace.wait(), pace.wait()
    now[0] += 5.0
    pace.wait()
    assert sleeps == [2.0, 2.0]


KILLED_BEFORE_USE = """
    import os, signal, sys
    sys.path[:0] = {path!r}
    from pathlib import Path
    from poise_hpc.agent_config import Agent
    from poise_hpc.llm import Client
    from poise_hpc.transcript import Request, Transcript
    class Killed(Transcript):
        def {method}(self, *args):
            out = super().{method}(*args)
            os.kill(os.getpid(), signal.SIGKILL)
    client = Client(Agent(base_url={url!r}, models={{"default": ("m",)}}, max_tokens=50), Killed(Path({log!r}), lambda: 0.0))
    client.complete(Request("propose", "c0007", 0, ({{"role": "user", "content": "hi"}},)))
"""


@pytest.mark.parametrize(("method", "requests", "tokens"), [
    ("end", 1, 150),           # reply noted, not used: answered from the transcript, paid once
    ("begin", 1, 84 + 150),    # noted, not sent: its worst case stays in the ledger, since nobody can know
])
def test_kill_minus_nine(tmp_path, method, requests, tokens):
    with LLMServer([Answer("paid"), Answer("paid twice")]) as server:
        bench = Bench(server, tmp_path)
        code = textwrap.dedent(KILLED_BEFORE_USE).format(path=sys.path, method=method, url=server.url, log=str(bench.path))
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
        assert bench.again().complete(ask()).text == "paid"
        assert len(server.requests) == requests
    assert bench.transcript().spent()["propose"].tokens == tokens


def test_a_line_torn_by_a_kill_is_no_reply(tmp_path):
    with LLMServer([Answer("first"), Answer("second")]) as server:
        bench = Bench(server, tmp_path)
        bench.client.complete(ask())
        bench.path.write_bytes(bench.path.read_bytes()[:-20])
        assert bench.again().complete(ask()).text == "second"
        assert bench.again().complete(ask()).text == "second"


def test_replay_is_exact_and_refuses_the_unknown(tmp_path):
    texts = ["plain", "unicode: \u03c0 \u2028 \U0001f600", 'quotes " and \\ and \n', "lone \ud800 surrogate"]
    with LLMServer([Answer(text) for text in texts]) as server:
        bench = Bench(server, tmp_path)
        live = [bench.client.complete(ask(turn=n)) for n in range(4)]
    before = bench.path.read_bytes()
    replay = Replay(bench.settings, bench.transcript())
    assert [replay.complete(ask(turn=n)) for n in range(4)] == live
    assert [r.text for r in live] == [*texts[:3], "lone ? surrogate"]
    with pytest.raises(UnknownRequest, match="c0007/propose/0/.*knows c0007/propose/0/"):
        replay.complete(ask("hi!"))
    assert bench.path.read_bytes() == before


@pytest.mark.parametrize("script", [[Answer(f"your key is {SECRET}")], [Status(401, f"bad key {SECRET}")],
                                    [Raw(SECRET.encode())] * 4, [Status(500, SECRET)] * 4], ids=lambda s: type(s[0]).__name__)
def test_the_key_is_in_no_file_and_in_no_error(tmp_path, script):
    with LLMServer(script) as server:
        bench = Bench(server, tmp_path)
        try:
            seen = bench.client.complete(ask()).text
        except (Rejected, Unavailable) as error:
            seen = repr(error)
    assert server.keys[0] == f"Bearer {SECRET}"
    assert SECRET not in seen + repr(vars(bench.client)) + repr(bench.settings)
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_server_that_moves_announces_itself_in_a_file(tmp_path):
    settings = Agent(base_url_file=str(tmp_path / "url"), models={"default": ("m",)}, max_attempts=1, max_tokens=50)
    client = Client(settings, Transcript(tmp_path / "llm.jsonl", lambda: 0.0), environ={}, sleep=[].append)
    with pytest.raises(Unavailable, match="no server has written its address.*url"):
        client.complete(ask())
    for turn in range(2):
        with LLMServer([Answer(f"server {turn}")]) as server:
            (tmp_path / "url").write_text(server.url + "\n")
            assert client.complete(ask(turn=turn)).text == f"server {turn}"
            assert served_models(settings, {}) == ["m"]


def test_key_file(tmp_path):
    path = tmp_path / "key"
    settings = Agent(api_key_file=str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        read_key(settings, {})
    path.write_text(SECRET + "\n")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_key(settings, {})
    path.chmod(0o600)
    assert read_key(settings, {}) == SECRET
    path.write_text("two words")
    with pytest.raises(UsageError, match="alone"):
        read_key(settings, {})
    with pytest.raises(UsageError, match="NO_SUCH_KEY"):
        read_key(Agent(api_key_env="NO_SUCH_KEY"), {})
    with pytest.raises(UsageError, match="jobs would inherit it"):
        read_key(Agent(api_key_env="MY_THING"), {"MY_THING": SECRET})
    assert read_key(Agent(), {"OPENAI_API_KEY": SECRET}) == "none"  # only the variable that the config names


def test_a_reply_that_was_noted_in_part_is_not_handed_out(tmp_path):
    transcript, most = Transcript(tmp_path / "llm.jsonl", lambda: 0.0), resource.getrlimit(resource.RLIMIT_FSIZE)
    call = transcript.begin(ask(), "m", False, Amount(84), Limit())
    resource.setrlimit(resource.RLIMIT_FSIZE, (transcript.path.stat().st_size + 40, most[1]))  # like a quota: 40 bytes left
    try:
        with pytest.raises(OSError, match="only 40 of"):
            transcript.end(call, ask(), "m", Answer("x").body("m").decode(), Amount(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert transcript.replies(ask().key) == {} == Transcript(transcript.path, lambda: 0.0).replies(ask().key)
    assert transcript.spent()["propose"].tokens == 84


def test_a_full_disk_stops_before_sending(tmp_path):
    with LLMServer([Answer("never")]) as server:
        bench = Bench(server, tmp_path)
        bench.path.symlink_to("/dev/full")
        with pytest.raises(OSError):
            bench.client.complete(ask())
        assert server.requests == []


def test_served_models_for_doctor(tmp_path):
    with LLMServer([]) as server:
        settings = Agent(base_url=server.url, models={"default": ("m",)}, api_key_env="THE_KEY", timeout_s=5.0)
        assert served_models(settings, {"THE_KEY": SECRET}) == ["m"]
    with pytest.raises(Unavailable, match="127.0.0.1"):
        served_models(settings, {"THE_KEY": SECRET})


PAGE = Raw(b"<!DOCTYPE html>\n<html><title>Sign in</title></html>")


@pytest.mark.parametrize(("answer", "error", "words"), [
    (PAGE, Rejected, "Sign in.*Check agent.base_url .does it end in /v1.*"),
    (Raw(b"<html>mislabelled</html>", "application/json"), Rejected, "mislabelled.*Check agent.base_url"),
    (Status(401, "no such key"), Rejected, "401.*no such key.*Check the key"), (Status(403), Rejected, "403.*Check the key"),
    (Status(403, "Missing scopes: api.model.read"), NoList, "Missing scopes"), (Status(404), NoList, "404"),
    (Raw(b'["m"]', "application/json"), NoList, "something else"), (Status(503), Unavailable, "503")], ids=str)
def test_what_comes_instead_of_the_list_of_models(answer, error, words):
    with LLMServer([], models=answer) as server, pytest.raises(error, match=words):
        served_models(Agent(base_url=server.url, models={"default": ("m",)}, timeout_s=30.0), {})


def test_web_pages_cost_nothing_and_need_a_person(tmp_path):
    """The wrong address: each attempt is free, and after the last one nobody waits for better days."""
    with LLMServer([PAGE] * 9) as server:
        bench = Bench(server, tmp_path, budget_tokens=100)
        with pytest.raises(Rejected, match="web page.*Sign in.*Check agent.base_url .does it end in /v1"):
            bench.client.complete(ask("ab"))
    assert len(server.requests) == 4 and bench.transcript().spent()["propose"] == Amount()


def test_a_spent_budget_names_what_has_a_limit(tmp_path):
    for limit, words in [(Limit(tokens=10), "3 of 10 tokens are used, and the call could take 8. Raise agent.budget_tokens to go on"),
                         (Limit(cost=Decimal("0.5")), "0.2 of a budget of 0.5 is spent, and the call could cost 0.4. Raise agent.budget_cost to go on"),
                         (Limit(10, Decimal("0.5")), "could take 8; 0.2 of a budget")]:
        assert words in limit.over(Amount(3, Decimal("0.2")), Amount(8, Decimal("0.4")))
