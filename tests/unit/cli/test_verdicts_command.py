"""The command `verdicts` against a stand-in server: both orders, nothing asked twice, limits, no key in any file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.chat_server import Reply, chat_server, question_of
from helpers.judged_run import write_judged_run

from srcfast.data.verdicts import read_verdicts
from srcfast.endpoint import client
from srcfast.endpoint.client import KEY

SECRET = "sk-secret-0123456789"
Srcfast = Callable[..., Result]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)
    monkeypatch.setenv(KEY, SECRET)


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The first line of both candidates that a request shows."""
    text = question_of(body)
    first = text.partition("\nFirst response: ")[2].partition("\nSecond response: ")
    return first[0], first[2].partition("\nWhich response")[0]


def is_first(body: dict[str, Any]) -> bool:
    """Whether the candidate that is shown first is the better one: the gold answer, then blue, then green."""
    rank = ["<see>", "It is blue", "It is green"]
    first, second = (next(i for i, start in enumerate(rank) if text.startswith(start)) for text in shown(body))
    return first < second


def judge(body: dict[str, Any], before: int) -> Reply:
    """Prefer the better candidate with 0.8, or 0.7 where it is shown second: the first has an advantage."""
    share = 0.8 if is_first(body) else 0.3
    first_token = {"1": math.log(share), "2": math.log(1 - share)} if body.get("logprobs") else None
    return Reply("1" if share > 0.5 else "2", first_token=first_token, usage=(50, 5))


def words(run: Path, url: str, *more: object) -> tuple[object, ...]:
    output = run.parent / "out" / "verdicts.jsonl"
    return ("verdicts", run, "--endpoint", url, "--endpoint-model", "large", "--output", output, "--quiet", *more)


def results(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    output = run.parent / "out" / "verdicts.jsonl"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return rows, json.loads(output.with_name("verdicts.jsonl.asked").joinpath("funnel.json").read_text())


def test_pairs_are_judged_in_both_orders_by_log_probabilities(tmp_path: Path, srcfast: Srcfast) -> None:
    run = write_judged_run(tmp_path, 4, scores={f"s{n}": [0.5, 0.5, 0.5] for n in range(4)})
    with chat_server(judge) as server:
        result = srcfast(*words(run, server.url, "--pairs", 8, "--concurrency", 3))
        assert result.exit_code == 0, result.output
        assert len(server.requests) == 16 and {body["max_tokens"] for body in server.requests} == {8}
        assert len({(*sorted(shown(body)), question_of(body).partition("First")[0]) for body in server.requests}) == 8
        rows, report = results(run)
        assert report["judged"] == len(rows) == 8 and report["sources"] == {"logprobs": 16} and not report["dropped"]
        assert report["order_flip_rate"] == 0.0 and report["order_shift"] == pytest.approx((0.8 + 0.3) / 2 - 0.5)
        assert report["scorer"]["unsure"] == {"pairs": 4, "same_side": 1.0}
        for row, pair in zip(rows, read_verdicts(run.parent / "out" / "verdicts.jsonl"), strict=True):
            better = (
                0 if row["candidates"][0].startswith("<see>") or row["candidates"][1].startswith("It is green") else 2
            )
            assert pair.verdict[better] == pytest.approx(0.75) and pair.verdict[1] == 0.0
            assert row["judges"] == ["large"] and row["facts"][0].startswith("It is")
        # The same command asks nothing; more pairs are asked alone.
        assert srcfast(*words(run, server.url, "--pairs", 8)).exit_code == 0
        assert len(server.requests) == 16 and results(run)[0] == rows
        assert srcfast(*words(run, server.url, "--pairs", 12)).exit_code == 0
        assert len(server.requests) == 24 and len(results(run)[0]) == 12
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


def test_a_server_without_log_probabilities_is_asked_for_text(tmp_path: Path, srcfast: Srcfast) -> None:
    run = write_judged_run(tmp_path, 3)

    def reply(body: dict[str, Any], before: int) -> Reply:
        return Reply(status=400, raw=b"logprobs: unknown field") if body.get("logprobs") else judge(body, before)

    with chat_server(reply) as server:
        result = srcfast(*words(run, server.url, "--pairs", 5))
        assert result.exit_code == 0, result.output
        assert len(server.answered) == 10 and len(server.requests) == 11  # one that was refused
    rows, report = results(run)
    assert report["sources"] == {"text": 10} and report["judged"] == 5
    assert {share for row in rows for share in row["verdict"]} == {0.0, 1.0}


def test_a_limit_ends_it_with_what_is_there_and_a_higher_one_goes_on(tmp_path: Path, srcfast: Srcfast) -> None:
    run = write_judged_run(tmp_path, 4)
    with chat_server(judge) as server:
        result = srcfast(*words(run, server.url, "--pairs", 12, "--max-tokens-total", 500))
        assert result.exit_code == 1 and "the limit leaves too little" in result.output
        assert 0 < server.tokens <= 500
        rows, report = results(run)
        assert report["prompt_tokens"] + report["completion_tokens"] == server.tokens and 0 < len(rows) < 12
        assert srcfast(*words(run, server.url, "--pairs", 12)).exit_code == 0
        assert len(server.answered) == 24 and len(results(run)[0]) == 12


def test_pairs_without_a_verdict_are_counted_and_those_unanswered_asked_again(tmp_path: Path, srcfast: Srcfast) -> None:
    run, down = write_judged_run(tmp_path, 2), True

    def reply(body: dict[str, Any], before: int) -> Reply:
        texts = "".join(shown(body))
        if "blue" in texts and "green" in texts and "Which colour 0" in question_of(body):
            return Reply("The second response is better.")
        if "<see>" in texts and "green" in texts and "Which colour 1" in question_of(body) and down:
            return Reply(status=500)
        return judge(body, before)

    with chat_server(reply) as server:
        result = srcfast(*words(run, server.url))
        assert result.exit_code == 1 and "1 pairs were not answered" in result.output
        rows, report = results(run)
        assert len(rows) == 4 and report["dropped"] == {"unreadable": 1, "unanswered": 1}
        down = False
        assert srcfast(*words(run, server.url)).exit_code == 0
        assert len(results(run)[0]) == 5 and results(run)[1]["dropped"] == {"unreadable": 1}


def test_a_wrong_key_an_address_that_is_none_and_outputs_over_inputs_are_refused(
    tmp_path: Path, srcfast: Srcfast
) -> None:
    run = write_judged_run(tmp_path, 2)
    with chat_server(lambda body, before: Reply(status=401, raw=f"no {SECRET}".encode())) as server:
        result = srcfast(*words(run, server.url))
        assert result.exit_code == 1 and KEY in result.output and SECRET not in result.output
        assert len(server.requests) == 1
    result = srcfast(*words(run, "host:80"))
    assert result.exit_code == 2 and "http://HOST:PORT/v1" in result.output
    result = srcfast(*words(run, "http://127.0.0.1:1/v1"), "--output", run / "config.yaml")
    assert result.exit_code == 2 and "apart from the inputs" in result.output
