"""One request to an endpoint: what is tried again, what is not, and that the key stays where it belongs."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate
from typing import Any

import pytest
from helpers.chat_server import ChatServer, Reply, chat_server

from srcfast.endpoint import client
from srcfast.endpoint.client import KEY, Answer, Endpoint, EndpointError, Refused, Unanswered, ask
from srcfast.errors import ConfigError

SECRET = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)


def asked(replies: list[Reply], attempts: int = 4, timeout: float = 20.0) -> tuple[Answer | Exception, ChatServer]:
    """Ask one request of a server that gives these replies in turn, the last one again and again."""
    with chat_server(lambda body, before: replies[min(before, len(replies) - 1)]) as server:
        endpoint = Endpoint(server.url, "large", timeout, attempts, SECRET)
        body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 7}
        try:
            outcome: Answer | Exception = ask(endpoint, body, threading.Event())
        except Exception as error:
            outcome = error
    return outcome, server


def test_an_answer_and_what_was_sent_for_it() -> None:
    answer, server = asked([Reply("Because.", usage=(11, 3), truncated=True)])
    assert answer == Answer("Because.", True, 11, 3)
    assert server.requests == [{"model": "large", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 7}]
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("logprobs", "first_token"),
    [
        ('{"content": [{"top_logprobs": [{"token": "1", "logprob": -0.5}, {"token": " 2", "logprob": -1}]}]}', True),
        ('{"content": [{"top_logprobs": [{"token": "1", "logprob": "-0.5"}]}]}', False),
        ('{"content": [{"top_logprobs": [{"token": "1", "logprob": 0.5}]}]}', False),
        ('{"content": [{"top_logprobs": [{"token": "1"}]}]}', False),
        ('{"content": [{"top_logprobs": []}]}', False),
        ('{"content": []}', False),
        ('{"tokens": ["1"]}', False),
        ("[1]", False),
        ("null", False),
    ],
)
def test_alternatives_of_the_first_token_are_read_where_they_have_the_protocol_s_form(
    logprobs: str, first_token: bool
) -> None:
    raw = f'{{"choices": [{{"message": {{"content": "1"}}, "finish_reason": "stop", "logprobs": {logprobs}}}]}}'
    answer, _ = asked([Reply(raw=raw.encode())])
    assert answer == Answer("1", False, None, None, {"1": -0.5, " 2": -1} if first_token else None)


@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=429, headers={"Retry-After": "0.01"}),
        Reply(status=429, headers={"Retry-After": formatdate(time.time() - 5, usegmt=True)}),
        Reply(status=429, headers={"Retry-After": "soon"}),
        Reply(status=500),
        Reply(status=503, raw=b"\xff\xfe"),
        Reply("cut", cut=True),
        Reply(raw=b""),
        Reply(raw=b"<html>busy</html>"),
        Reply(raw=b"[]"),
        Reply(raw=b'{"choices": []}'),
        Reply(raw=b'{"choices": [{"message": {"content": null}}]}'),
        Reply(raw=b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
        Reply(raw=b'{"choices": {"message": 1}}'),
        Reply(raw=b"[" * 100_000),
    ],
)
def test_what_may_pass_is_asked_again(failure: Reply) -> None:
    answer, server = asked([failure, failure, Reply("Yes.")])
    assert isinstance(answer, Answer) and answer.text == "Yes."
    assert len(server.requests) == 3


def test_a_slow_reply_is_asked_again() -> None:
    answer, server = asked([Reply("late", delay=1.0), Reply("Yes.")], timeout=0.2)
    assert isinstance(answer, Answer) and answer.text == "Yes." and len(server.requests) == 2


def test_nobody_listens() -> None:
    with chat_server(lambda body, before: Reply()) as server:
        url = server.url
    with pytest.raises(Unanswered, match="expected an answer, found .*refused.* at attempt 3"):
        ask(Endpoint(url, "large", 5.0, 3), {"messages": []}, threading.Event())


def test_a_set_stop_ends_the_attempts() -> None:
    stop = threading.Event()
    stop.set()
    with chat_server(lambda body, before: Reply(status=500)) as server:
        with pytest.raises(Unanswered, match="at attempt 1"):
            ask(Endpoint(server.url, "large", 5.0, 9), {"messages": []}, stop)
        assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "error"), [(400, Refused), (413, Refused), (422, Refused), (401, EndpointError)])
def test_what_does_not_pass_is_asked_once(status: int, error: type[Exception]) -> None:
    outcome, server = asked([Reply(status=status, raw=b'{"error": "too long"}')])
    assert type(outcome) is error and "too long" in str(outcome) and f"status {status}" in str(outcome)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 301, 307])
def test_a_wrong_address_or_key_ends_all_and_redirects_are_not_followed(status: int) -> None:
    with chat_server(lambda body, before: Reply("stolen")) as other:
        outcome, server = asked([Reply(status=status, headers={"Location": f"{other.url}/chat/completions"})])
        assert type(outcome) is EndpointError and KEY in str(outcome)
        assert len(server.requests) == 1 and not other.requests


@pytest.mark.parametrize("status", [401, 400, 500])
def test_a_server_that_quotes_the_key_does_not_spread_it(status: int) -> None:
    quoted = (b"x" * 150 + SECRET.encode()) * 3
    outcome, _ = asked([Reply(status=status, raw=quoted)], attempts=2)
    assert isinstance(outcome, Exception)
    assert not any(SECRET[:length] in str(outcome) for length in range(5, len(SECRET) + 1))
    assert SECRET not in repr(Endpoint("http://a/v1", "m", key=SECRET))


def test_counts_that_are_none_are_unknown() -> None:
    answer, _ = asked([Reply("Yes.", usage=None)])
    assert answer == Answer("Yes.", False, None, None)
    raw = b'{"choices": [{"message": {"content": "Yes."}}], "usage": {"prompt_tokens": -1, "completion_tokens": "2"}}'
    assert asked([Reply(raw=raw)])[0] == Answer("Yes.", False, None, None)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://me:pass@host/v1", "password"),
        ("ftp://host/v1", "http://HOST:PORT/v1"),
        ("host:8000/v1", "http://HOST:PORT/v1"),
        ("http:///v1", "http://HOST:PORT/v1"),
        ("http://host/v1?key=1", "http://HOST:PORT/v1"),
    ],
)
def test_addresses_that_are_refused(url: str, word: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint") as caught:
        Endpoint.from_environment(url, "large", 1.0)
    assert word in str(caught.value) and "me:pass" not in str(caught.value)


def test_the_key_is_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    assert Endpoint.from_environment("http://host/v1/", "large", 1.0) == Endpoint(
        "http://host/v1", "large", 1.0, key=SECRET
    )
    monkeypatch.setenv(KEY, "two\nlines")
    with pytest.raises(ConfigError, match=KEY) as caught:
        Endpoint.from_environment("http://host/v1", "large", 1.0)
    assert "two" not in str(caught.value)
    monkeypatch.delenv(KEY)
    assert Endpoint.from_environment("http://host/v1", "large", 1.0).key is None


def test_without_a_key_no_header_is_sent() -> None:
    with chat_server(lambda body, before: Reply("Yes.")) as server:
        ask(Endpoint(server.url, "large", 5.0, 1), {"messages": []}, threading.Event())
        assert "Authorization" not in server.headers[0]


def test_a_proxy_of_the_environment_does_not_get_what_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(body: dict[str, Any], before: int) -> Reply:
        raise AssertionError("asked the proxy")

    with chat_server(never) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        answer, _ = asked([Reply("Yes.")])
        assert isinstance(answer, Answer) and not proxy.requests
