"""Limits hold over requests that are under way; a log's answers survive a process that was killed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from srcfast.endpoint.answer_log import AnswerLog, content_key
from srcfast.endpoint.budget import Budget, Limit, LimitReached
from srcfast.endpoint.client import Answer
from srcfast.errors import InputError


def test_without_a_limit_everything_is_granted() -> None:
    budget = Budget([])
    assert [budget.grant(1e9, 500)[1] for _ in range(3)] == [500, 500, 500]


def test_the_last_request_gets_what_is_left_and_then_none() -> None:
    budget = Budget([Limit("tokens", 1000)], prompt_tokens=300, completion_tokens=100)
    first, granted = budget.grant(100.0, 200)
    assert granted == 200
    budget.settle(first, 100.0, (200, 150))  # twice as many as estimated: 250 are left
    second, granted = budget.grant(50.0, 200)
    assert granted == 150  # 250 less 2 * 50
    budget.settle(second, 50.0, (100, 80))
    with pytest.raises(LimitReached, match="tokens 930 of 1000"):
        budget.grant(10.0, 200)  # 50 tokens for an answer are too few,
    assert budget.grant(10.0, 50)[1] == 50  # but not for one that need not be longer


def test_until_the_first_count_one_request_is_under_way() -> None:
    budget = Budget([Limit("tokens", 10_000)])
    first, _ = budget.grant(100.0, 100)
    granted: list[int] = []
    waiting = threading.Thread(target=lambda: granted.append(budget.grant(100.0, 100)[1]), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not granted
    budget.settle(first, 100.0, (120, 30))
    waiting.join(10)
    assert granted == [100]


def test_a_request_waits_for_what_others_may_leave() -> None:
    budget = Budget([Limit("tokens", 1000)])
    first, _ = budget.grant(100.0, 100)
    budget.settle(first, 100.0, (100, 100))  # 800 are left
    second, _ = budget.grant(100.0, 600)
    granted: list[int] = []
    waiting = threading.Thread(target=lambda: granted.append(budget.grant(100.0, 300)[1]), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()  # 100 are left, and 300 + 100 wanted
    budget.settle(second, 100.0, None)  # not answered: it took nothing
    waiting.join(10)
    assert granted == [300]


def test_a_limit_of_cost_counts_prices() -> None:
    budget = Budget([Limit("cost", 1.0, 0.001, 0.01)])
    number, granted = budget.grant(100.0, 1000)
    assert granted == 90  # (1 - 0.1) / 0.01
    budget.settle(number, 100.0, (100, 80))
    with pytest.raises(LimitReached, match="cost 0.9 of 1"):
        budget.grant(100.0, 1000)
    free = Budget([Limit("cost", 1.0, 0.001, 0.0)])
    assert free.grant(1000.0, 50)[1] == 50
    with pytest.raises(LimitReached):
        Budget([Limit("cost", 1.0, 0.001, 0.0)]).grant(1001.0, 50)


def test_a_log_is_read_back_without_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path)
    log.add("one", Answer("Ein Satz: «ä»\n", False, 1, 2), (10, 5))
    log.add("two", None, (20, 7))
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "three", "text": "half of')
    again = AnswerLog(path)
    assert path.read_bytes() == whole
    assert (again.prompt_tokens, again.completion_tokens) == (30, 12)
    with again.claimed("one") as known:
        assert known == Answer("Ein Satz: «ä»\n", False, None, None)
    for key in ("two", "three"):
        with again.claimed(key) as known:
            assert known is None
    again.add("three", Answer("x", True, None, None), (1, 1))
    again.add("four", Answer("1", False, 5, 1, {"1": -0.25, "2": -2}), (5, 1))
    again.close()
    with AnswerLog(path).claimed("three") as known:
        assert known == Answer("x", True, None, None)
    with AnswerLog(path).claimed("four") as known:
        assert known == Answer("1", False, None, None, {"1": -0.25, "2": -2.0})


FIRST = '{"key": "k", "text": "a", "truncated": false, "prompt_tokens": 1, "completion_tokens": 1, "first_token": '


@pytest.mark.parametrize(
    "line",
    [
        f"{FIRST}[1]}}",
        f'{FIRST}{{"1": "high"}}}}',
        '{"key": "one"}',
        "[]",
        "no JSON",
        '{"text": "a", "prompt_tokens": "1"}',
    ],
)
def test_a_damaged_log_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match="line 1"):
        AnswerLog(path)


def test_who_claims_a_request_keeps_others_from_asking_it(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    seen: list[Answer | None] = []

    def other() -> None:
        with log.claimed("one") as known:
            seen.append(known)

    with log.claimed("one") as known:
        assert known is None
        waiting = threading.Thread(target=other, daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        log.add("one", Answer("done", False, 1, 1), (1, 1))
    waiting.join(10)
    assert seen == [Answer("done", False, 1, 1)]


def test_a_key_is_of_the_content_whatever_its_order() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1}) != content_key({"a": 1, "b": [3]})
