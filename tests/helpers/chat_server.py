"""A stand-in for an OpenAI-compatible server: answers and fails by a function, and records what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one attempt."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # the body as it is, in place of a completion
    cut: bool = False  # close the connection in the middle of the body
    delay: float = 0.0  # seconds before the reply
    truncated: bool = False
    usage: tuple[int, int] | None = (50, 20)  # tokens of prompt and answer
    first_token: dict[str, float] | None = None  # log-probabilities of its alternatives


@dataclass
class ChatServer:
    """A running server: its address, the requests that it got and how many were under way at most."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)  # parsed bodies, in order of arrival
    headers: list[dict[str, str]] = field(default_factory=list)
    answered: list[dict[str, Any]] = field(default_factory=list)  # bodies that got a completion
    tokens: int = 0  # of all usages that it has stated
    at_once: int = 0


def question_of(body: dict[str, Any]) -> str:
    """Return the text of a request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@contextmanager
def chat_server(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[ChatServer]:
    """Run a server while the body runs; `reply` gets a request's body and how often the same body came before."""
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running += 1
                server.at_once = max(server.at_once, running)
                before = server.requests.count(body)
                server.requests.append(body)
                server.headers.append(dict(self.headers))
            try:
                assert self.path == "/v1/chat/completions"
                how = reply(body, before)
                time.sleep(how.delay)
            finally:
                with lock:
                    running -= 1  # before the client can have the reply and send its next request
            self.answer(body, how)

        def do_GET(self) -> None:  # as a followed redirect would
            with lock:
                server.requests.append({"GET": self.path})
            self.send_error(404)

        def answer(self, body: dict[str, Any], how: Reply) -> None:
            finish = "length" if how.truncated else "stop"
            row: dict[str, Any] = {"choices": [{"message": {"content": how.text}, "finish_reason": finish}]}
            if how.first_token is not None:
                alternatives = [{"token": token, "logprob": value} for token, value in how.first_token.items()]
                row["choices"][0]["logprobs"] = {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
            if how.usage is not None:
                row["usage"] = {"prompt_tokens": how.usage[0], "completion_tokens": how.usage[1]}
            data = json.dumps(row).encode() if how.raw is None else how.raw
            if how.status == 200 and how.raw is None and not how.cut:
                with lock:
                    server.answered.append(body)
                    server.tokens += sum(how.usage or (0, 0))
            self.send_response(how.status)
            for name, value in how.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if how.cut else data)

        def log_message(self, *_: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    listening.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that didn't wait
    server = ChatServer(f"http://127.0.0.1:{listening.server_port}/v1")
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
