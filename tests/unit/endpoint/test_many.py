"""Many requests at once: how many, in which order what follows, and what ends them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import ChatServer, Reply, chat_server, question_of

from srcfast.endpoint import client
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget, Limit, LimitReached
from srcfast.endpoint.client import Answer, Endpoint, EndpointError, Refused, Unanswered
from srcfast.endpoint.many import Body, Outcome, Request, ask_many
from srcfast.errors import InputError, Interrupted
from srcfast.run import signals


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.01)


def request_of(text: str) -> Request[str]:
    body = {"messages": [{"role": "user", "content": text}]}
    return Request(text, partial(Body, lambda: body, body, 10.0, 100))


def run(
    folder: Path,
    texts: list[str],
    reply: Callable[[str, int], Reply],
    following: Callable[[str, Outcome], Request[str] | None] | None = None,
    concurrency: int = 3,
    limits: tuple[Limit, ...] = (),
) -> tuple[dict[str, Outcome], ChatServer, BaseException | None]:
    """Ask texts; return the outcomes by text, the server, and what was raised."""
    outcomes: dict[str, Outcome] = {}

    def follow(owner: str, outcome: Outcome) -> Request[str] | None:
        outcomes[owner] = outcome
        return None if following is None else following(owner, outcome)

    log, raised = AnswerLog(folder / "answers.jsonl"), None
    with chat_server(lambda body, before: reply(question_of(body), before)) as server:
        endpoint, budget = (
            Endpoint(server.url, "large", 20.0, 2),
            Budget(limits, log.prompt_tokens, log.completion_tokens),
        )
        try:
            ask_many(endpoint, iter(map(request_of, texts)), follow, log, budget, concurrency)
        except (Exception, Interrupted) as error:
            raised = error
    log.close()
    return outcomes, server, raised


def test_what_follows_from_an_answer_is_asked_and_no_more_at_once_than_may_be(tmp_path: Path) -> None:
    def following(owner: str, outcome: Outcome) -> Request[str] | None:
        return request_of(f"{owner}+") if len(owner) < 3 else None

    outcomes, server, raised = run(tmp_path, list("abcdefgh"), lambda text, _: Reply(text, delay=0.02), following)
    assert raised is None and server.at_once == 3
    assert {text: outcome.text for text, outcome in outcomes.items() if isinstance(outcome, Answer)} == {
        f"{letter}{plus}": f"{letter}{plus}" for letter in "abcdefgh" for plus in ("", "+", "++")
    }


def test_the_same_request_is_asked_once_also_at_the_same_time_and_by_a_later_process(tmp_path: Path) -> None:
    first = run(tmp_path, ["a", "a", "b", "a"], lambda text, _: Reply(text, delay=0.1), concurrency=4)
    assert Counter(map(question_of, first[1].requests)) == {"a": 1, "b": 1}
    _, server, _ = run(tmp_path, ["b", "c", "a"], lambda text, _: Reply(text))
    assert list(map(question_of, server.requests)) == ["c"]


def test_refused_requests_stop_no_other_once_one_was_answered(tmp_path: Path) -> None:
    texts = ["yes", *(f"no {n}" for n in range(20)), "yes too"]
    reply: Callable[[str, int], Reply] = lambda text, _: Reply(text) if "yes" in text else Reply(status=400)  # noqa: E731
    outcomes, _, raised = run(tmp_path, texts, reply, concurrency=1)
    assert raised is None
    assert Counter(type(outcome) for outcome in outcomes.values()) == {Answer: 2, Refused: 20}
    outcomes, server, raised = run(tmp_path / "other", texts[1:], reply, concurrency=1)
    assert type(raised) is EndpointError and "8 requests failed in a row" in str(raised) and len(server.requests) == 8


def test_unanswered_requests_in_a_row_end_it_and_others_do_not(tmp_path: Path) -> None:
    texts = [f"{n}" for n in range(30)]
    reply: Callable[[str, int], Reply] = lambda text, _: Reply(text) if int(text) % 8 == 0 else Reply(status=500)  # noqa: E731
    outcomes, _, raised = run(tmp_path, texts, reply, concurrency=1)
    assert raised is None and Counter(type(outcome) for outcome in outcomes.values()) == {Answer: 4, Unanswered: 26}
    outcomes, server, raised = run(tmp_path / "other", texts, lambda text, _: Reply(status=500), concurrency=2)
    assert type(raised) is EndpointError and len(set(map(question_of, server.requests))) <= 10


def test_a_body_that_cannot_be_built_is_an_outcome_and_a_fault_is_raised(tmp_path: Path) -> None:
    def broken(error: Exception) -> Request[str]:
        def build() -> Body:
            raise error

        return Request("broken", build)

    def following(error: Exception) -> Callable[[str, Outcome], Request[str] | None]:
        return lambda owner, _: broken(error) if owner == "a" else None

    image = InputError(expected="an image", found="none")
    outcomes, _, raised = run(tmp_path, ["a", "b"], lambda text, _: Reply(text), following(image))
    assert raised is None and outcomes["broken"] is image and len(outcomes) == 3
    _, _, raised = run(tmp_path, ["a", "b"], lambda text, _: Reply(text), following(ZeroDivisionError("bug")))
    assert isinstance(raised, ZeroDivisionError)


def test_a_limit_ends_it_after_what_is_under_way(tmp_path: Path) -> None:
    texts = [f"{n}" for n in range(30)]
    reply: Callable[[str, int], Reply] = lambda text, _: Reply(text, usage=(30, 70), delay=0.01)  # noqa: E731
    outcomes, server, raised = run(tmp_path, texts, reply, limits=(Limit("tokens", 950),), concurrency=4)
    assert isinstance(raised, LimitReached) and server.tokens == 900 and len(outcomes) == 9


def test_an_answer_that_the_rest_of_a_limit_cut_off_is_paid_but_not_used(tmp_path: Path) -> None:
    def reply(text: str, _: int) -> Reply:
        most = server_limit[text]
        return Reply(text, usage=(10, min(90, most)), truncated=most < 90)

    server_limit = {"a": 100, "b": 80}
    outcomes, server, raised = run(tmp_path, ["a", "b"], reply, limits=(Limit("tokens", 190),), concurrency=1)
    assert isinstance(raised, LimitReached) and "too few" in str(raised)
    assert [body["max_tokens"] for body in server.requests] == [100, 80]
    assert list(outcomes) == ["a"] and server.tokens == 190
    log = AnswerLog(tmp_path / "answers.jsonl")
    assert log.prompt_tokens + log.completion_tokens == 190
    log.close()
    server_limit["b"] = 100
    outcomes, server, raised = run(tmp_path, ["a", "b"], reply, limits=(Limit("tokens", 1000),))
    assert raised is None and set(outcomes) == {"a", "b"} and list(map(question_of, server.requests)) == ["b"]


def test_a_signal_ends_it_once_what_is_under_way_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{n}" for n in range(50)]

    def following(owner: str, _: Any) -> None:
        if owner == "9":
            monkeypatch.setattr(signals, "_pending_signal", 15)

    outcomes, server, raised = run(tmp_path, texts, lambda text, _: Reply(text, delay=0.01), following)
    assert isinstance(raised, Interrupted) and raised.status == 143
    answered = [outcome for outcome in outcomes.values() if isinstance(outcome, Answer)]
    assert 10 <= len(answered) <= len(outcomes) <= 16 and len(server.answered) == len(answered)
