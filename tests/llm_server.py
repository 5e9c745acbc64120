"""A scripted OpenAI-compatible server on a real socket: /v1/chat/completions and /v1/models. Port 0, private to a test.

    with LLMServer([Answer("hello"), Status(429, headers={"Retry-After": "7"}), Hang()]) as server: ...

The script is a list (one behaviour a request, in order) or a function of the request's JSON. `server.requests` holds
every JSON body that arrived, `server.keys` every Authorization header.
"""
from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    content: str | None
    finish: str = "stop"             # "length": cut at max_tokens
    refusal: str | None = None
    usage: tuple[int, int] | None = (100, 50)  # prompt, completion tokens; None: not told

    def body(self, model: str) -> bytes:
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        out: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": model,
                               "choices": [{"index": 0, "message": message, "finish_reason": self.finish}]}
        if self.usage:
            out["usage"] = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*self.usage, sum(self.usage))))
        return json.dumps(out).encode()


@dataclass(frozen=True)
class Status:
    code: int
    message: str = "scripted"
    headers: dict[str, str] = field(default_factory=dict)
    error: str | None = None         # the API's own code, e.g. "insufficient_quota"


@dataclass(frozen=True)
class Raw:
    """A 200 with any body, e.g. a proxy's page."""

    data: bytes
    content_type: str = "text/html"


class Hang:
    """Accepts the request and says nothing until the server is closed."""


class Disconnect:
    """Sends half of an answer, then drops the connection."""


Behaviour = Answer | Status | Raw | Hang | Disconnect


class LLMServer:
    def __init__(self, script: Sequence[Behaviour] | Callable[[dict[str, Any]], Behaviour], models: Behaviour | None = None):
        self.models = models  # what its list of models is; None: one, "m"
        self.listed = 0       # how often it was asked for it
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.parallel = 0  # requests in flight
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._script = script
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> LLMServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def choose(self, request: dict[str, Any], key: str | None) -> Behaviour:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.keys.append(key)
        if callable(self._script):
            return self._script(request)
        return self._script[number] if number < len(self._script) else Status(418, "the script is over")

    def busy(self, change: int) -> None:
        with self._lock:
            self.parallel += change

    def wait_closed(self) -> None:
        self._closing.wait(60)


def _handler(server: LLMServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            server.listed += 1
            if server.models:
                self._behave(server.models, "")
            else:
                self._send(200, json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.busy(+1)
            try:
                self._behave(server.choose(request, self.headers.get("Authorization")), request["model"])
            finally:
                server.busy(-1)

        def _behave(self, behaviour: Behaviour, model: str) -> None:
            match behaviour:
                case Answer():
                    self._send(200, behaviour.body(model))
                case Status(code, message, headers, error):
                    body = {"error": {"message": message, "type": "scripted", "code": error}}
                    self._send(code, json.dumps(body).encode(), headers)
                case Raw(data, content_type):
                    self._send(200, data, {"Content-Type": content_type})
                case Hang():
                    server.wait_closed()
                    self.close_connection = True
                case Disconnect():
                    body = Answer("half of an answer").body(model)
                    self._send(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
                    self.close_connection = True

        def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler
