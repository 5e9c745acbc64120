"""Servers differ: what today's hosted models reject, and where they put what they answer. Over real sockets."""
from __future__ import annotations

import json
from decimal import Decimal

import pytest
from test_llm import SILENT_S, Bench, ask

from llm_server import Answer, Hang, LLMServer, Raw, Status
from poise_hpc.agent_config import Price
from poise_hpc.replay import EmptyReply, Refused, Rejected, Replay, Unavailable

SCHEMA = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
PICKY = {  # what the request holds -> what the model answers to that
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "max_completion_tokens": "Unrecognized request argument supplied: max_completion_tokens",
    "temperature": "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is supported.",
    "json_schema": "This response_format type is unavailable now", "json_object": "response_format is not supported"}


def picky(*dislikes: str, status: int = 400):
    """A server that answers 400 as long as the request holds one of these, and echoes what it got otherwise."""
    def script(request):
        held = {*request, request.get("response_format", {}).get("type")}
        return next((Status(status, PICKY[d]) for d in dislikes if d in held), Answer("ok"))
    return script


@pytest.mark.parametrize(("dislikes", "taken"), [
    ((), {"max_tokens": 50, "temperature": 0.7, "response_format": "json_schema"}),
    (("max_tokens",), {"max_completion_tokens": 50, "temperature": 0.7, "response_format": "json_schema"}),
    (("max_tokens", "temperature"), {"max_completion_tokens": 50, "response_format": "json_schema"}),
    (("json_schema",), {"max_tokens": 50, "temperature": 0.7, "response_format": "json_object"}),
    (("json_schema", "json_object"), {"max_tokens": 50, "temperature": 0.7}),
    (("json_object", "json_schema", "temperature", "max_tokens"), {"max_completion_tokens": 50})], ids=str)
@pytest.mark.parametrize("status", [400, 422])
def test_what_a_model_does_not_take_is_left_out_and_that_is_remembered(tmp_path, dislikes, taken, status):
    with LLMServer(picky(*dislikes, status=status)) as server:
        bench = Bench(server, tmp_path, temperature=0.7)
        for turn in (0, 1):
            assert bench.client.complete(ask(turn=turn, schema=SCHEMA)).text == "ok"
    assert len(server.requests) == len(dislikes) + 2  # each dislike is met once; the second request knows them all
    *_, last = server.requests
    assert {k: v["type"] if k == "response_format" else v for k, v in last.items() if k not in ("model", "messages")} == taken
    sent = [line for line in bench.lines() if line["event"] == "sent"][-1]
    assert set(sent["options"]) | ({"response_format"} if sent["schema"] else set()) == set(taken)
    assert bench.transcript().spent()["propose"].tokens == 2 * 150  # what was rejected cost nothing


def test_the_older_name_is_tried_where_the_newer_is_unknown(tmp_path):
    with LLMServer(picky("max_completion_tokens")) as server:
        bench = Bench(server, tmp_path, max_tokens_key="max_completion_tokens")
        assert bench.client.complete(ask()).text == "ok" and "max_tokens" in server.requests[-1]


def test_each_model_is_asked_in_its_own_way(tmp_path):
    def script(request):
        return picky("max_tokens")(request) if request["model"] == "a" else picky("max_completion_tokens")(request)

    with LLMServer(script) as server:
        bench = Bench(server, tmp_path, models={"propose": ("a",), "default": ("b",)})
        assert bench.client.complete(ask()).model == "a"
        assert bench.client.complete(type(ask())("reflect", "c0007", 0, ask().messages)).model == "b"
    assert ["max_tokens" in r for r in server.requests] == [True, False, True]


@pytest.mark.parametrize("said", ["max_tokens is too large: 50. This model supports at most 20 completion tokens",
                                  "temperature must be at most 1", "the model `m` is unknown"])
def test_a_value_that_is_wrong_is_said_and_not_worked_around(tmp_path, said):
    with LLMServer(lambda request: Status(400, said)) as server, pytest.raises(Rejected, match=f"400: .*{said[:20]}.*Check agent.models, agent.max_tokens"):
        Bench(server, tmp_path).client.complete(ask())
    assert len(server.requests) == 1


def test_a_server_that_takes_neither_name_is_no_endless_loop(tmp_path):
    with LLMServer(picky("max_tokens", "max_completion_tokens")) as server, pytest.raises(Rejected, match="max_tokens.*; then .*max_completion_tokens"):
        Bench(server, tmp_path).client.complete(ask())
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "hint"), [(401, "Check the key"), (402, "no credit"), (404, "Check agent.base_url and agent.models")])
def test_a_rejection_says_what_to_look_at(tmp_path, status, hint):
    with LLMServer([Status(status)]) as server, pytest.raises(Rejected, match=hint):
        Bench(server, tmp_path).client.complete(ask())


@pytest.mark.parametrize("code", ["content_filter", "invalid_prompt"])
def test_a_prompt_that_a_filter_stops_ends_this_request_alone(tmp_path, code):
    with LLMServer(lambda r: Answer("from b") if r["model"] == "b" else Status(400, "flagged", error=code)) as server:
        bench = Bench(server, tmp_path)
        with pytest.raises(Refused, match="stopped by the provider's filter.*flagged"):
            bench.client.complete(ask(schema=SCHEMA))
        assert len(server.requests) == 1
        with pytest.raises(Refused, match="flagged"):
            Replay(bench.settings, bench.transcript()).complete(ask(schema=SCHEMA))
        both = Bench(server, tmp_path, models={"default": ("m", "b")})
        assert both.client.complete(ask(schema=SCHEMA)).model == "b"


def body(message: dict, usage: dict | None = None, finish: str = "stop", **more) -> Raw:
    out = {"choices": [{"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish}]} | more
    return Raw(json.dumps(out | ({"usage": usage} if usage else {})).encode(), "application/json")


CALL = {"id": "1", "type": "function", "function": {"name": "propose", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(("message", "text"), [
    ({"content": "answer", "reasoning_content": "thoughts"}, "answer"), ({"content": "answer", "reasoning": "thoughts"}, "answer"),
    ({"content": "<think>\nperhaps {\"x\": 22222}\n</think>\nanswer"}, "\nanswer"),
    ({"content": "the template has opened the thoughts\n</think>\nanswer"}, "\nanswer"),
    ({"content": "no thoughts, but <think> in the text </think>"}, "no thoughts, but <think> in the text </think>"),
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "an"}, {"type": "text", "text": "swer"}]}, "answer"),
    ({"content": None, "tool_calls": [CALL]}, '{"x": 1}'), ({"content": "", "tool_calls": [CALL | {"function": {"arguments": {"x": 1}}}]}, '{"x": 1}'), ({"content": "answer", "tool_calls": []}, "answer")], ids=str)
def test_the_answer_is_found_without_the_thoughts(tmp_path, message, text):
    with LLMServer([body(message)]) as server:
        bench = Bench(server, tmp_path)
        assert bench.client.complete(ask()).text == text
        assert Replay(bench.settings, bench.transcript()).complete(ask()).text == text


@pytest.mark.parametrize("message", [{"content": None, "reasoning_content": "thoughts without end"}, {"content": "<think>thoughts without end"}], ids=str)
def test_a_reply_cut_in_its_thoughts_says_so(tmp_path, message):
    with LLMServer([body(message, finish="length")]) as server, pytest.raises(EmptyReply, match="finish reason length.*agent.max_tokens may be too small"):
        Bench(server, tmp_path).client.complete(ask())


@pytest.mark.parametrize("answer", [body({"content": "half"}, finish="error"), body({"content": ""}, error={"message": "upstream is overloaded", "code": 502}),
                                    Raw(b'{"choices": [], "error": "none"}', "application/json"), Raw(b'{"choices": null}', "application/json")], ids=str)
def test_an_error_in_a_completions_place_is_tried_again(tmp_path, answer):
    with LLMServer([answer, Answer("ok")]) as server:
        assert Bench(server, tmp_path).client.complete(ask()).text == "ok"


def test_a_model_whose_replies_are_all_cut_in_their_thoughts_is_not_paid_for_ever(tmp_path):
    """After three in a row a person must look; with more room it goes on, and one answer ends the series."""
    silent = body({"content": None}, {"prompt_tokens": 10, "completion_tokens": 50}, finish="length")
    with LLMServer([silent, silent, Answer("ok"), silent, silent, silent, Answer("with more room")]) as server:
        bench = Bench(server, tmp_path)
        for turn in range(6):
            client = bench.again()  # as `step` does: a new process each time
            if turn == 2:
                assert client.complete(ask(turn=turn)).text == "ok"
                continue
            with pytest.raises(EmptyReply):
                client.complete(ask(turn=turn))
        with pytest.raises(Rejected, match="last 3 replies were cut at 50 tokens before any answer.*Raise agent.max_tokens"):
            bench.again().complete(ask(turn=6))
        assert len(server.requests) == 6
        assert Bench(server, tmp_path, max_tokens=51).client.complete(ask(turn=6)).text == "with more room"


def test_further_fields_are_sent_and_noted(tmp_path):
    with LLMServer([Answer("ok")]) as server:
        bench = Bench(server, tmp_path, extra={"reasoning_effort": "high", "chat_template_kwargs": {"thinking": True}})
        bench.client.complete(ask())
    assert server.requests[0]["reasoning_effort"] == "high" and server.requests[0]["chat_template_kwargs"] == {"thinking": True}
    assert bench.lines()[0]["options"]["reasoning_effort"] == "high"
    with pytest.raises(ValueError, match="extra: n, stream cannot be given"):
        Bench(server, tmp_path, extra={"n": 4, "stream": True})


PRICE = Price(prompt=2.0, completion=10.0, cached=0.5)


@pytest.mark.parametrize(("usage", "price", "tokens", "cost"), [
    # 1000 x 2 + 500 x 10 per million
    ({"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}, PRICE, 1500, "0.007"),
    # 800 of the prompt from the cache: 200 x 2 + 800 x 0.5 + 500 x 10
    ({"prompt_tokens": 1000, "completion_tokens": 500, "prompt_tokens_details": {"cached_tokens": 800}}, PRICE, 1500, "0.0058"),
    ({"prompt_tokens": 1000, "completion_tokens": 500, "prompt_cache_hit_tokens": 800}, PRICE, 1500, "0.0058"),
    ({"prompt_tokens": 1000, "completion_tokens": 500, "prompt_tokens_details": {"cached_tokens": 800}}, Price(prompt=2.0, completion=10.0), 1500, "0.007"),
    ({"prompt_tokens": 1000, "completion_tokens": 500, "prompt_tokens_details": None}, PRICE, 1500, "0.007"),
    # 700 tokens of reasoning stand in the total alone: 1000 x 2 + 1200 x 10
    ({"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 2200}, PRICE, 2200, "0.014")], ids=str)
def test_the_ledger_counts_what_is_charged(tmp_path, usage, price, tokens, cost):
    with LLMServer([body({"content": "x"}, usage)]) as server:
        bench = Bench(server, tmp_path, prices={"m": price})
        bench.client.complete(ask())
    assert bench.transcript().spent()["propose"].tokens == tokens and bench.transcript().spent()["propose"].cost == Decimal(cost)


def test_silence_names_the_setting(tmp_path):
    with LLMServer([Hang()]) as server, pytest.raises(Unavailable, match=r"no answer within 2 s \(agent.timeout_s\)"):
        Bench(server, tmp_path, max_attempts=1, timeout_s=SILENT_S).client.complete(ask())
