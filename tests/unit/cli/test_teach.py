"""The command `teach` against a stand-in server: nothing lost, nothing asked twice, limits hold, no key in any file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import Reply, chat_server, question_of
from PIL import Image
from typer.testing import CliRunner, Result

from srcfast.cli.app import app
from srcfast.data.rationale_pairs import read_teacher
from srcfast.endpoint import client
from srcfast.endpoint.client import KEY

SECRET = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)
    monkeypatch.setenv(KEY, SECRET)


def write_samples(folder: Path, count: int, **more: object) -> Path:
    """Write samples `0`, `1`, ..., whose questions end in their number and whose answers are it, with a picture each."""
    rows = []
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append(
            {"id": str(number), "image": f"{number}.png", "question": f"Number {number}", "answer": str(number)} | more
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def number_of(body: dict[str, Any]) -> int:
    return int(question_of(body).split()[1])


def response(answer: object) -> str:
    return f"<see> There is a sign. </see> <think> It says {answer}. </think> <answer> {answer} </answer>"


def words(data: Path, url: str, *more: str) -> list[str]:
    named = ["--data", str(data), "--image-root", str(data.parent), "--endpoint", url, "--endpoint-model", "large"]
    return ["teach", *named, "--output", str(data.parent / "out" / "taught.jsonl"), "--quiet", *more]


def run(data: Path, url: str, *more: str) -> Result:
    return CliRunner().invoke(app, words(data, url, *more))


def taught(data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (data.parent / "out" / "taught.jsonl").read_text().splitlines()]


def funnel(data: Path) -> dict[str, Any]:
    return json.loads((data.parent / "out" / "taught.jsonl.asked" / "funnel.json").read_text())  # type: ignore[no-any-return]


def test_rationales_are_written_in_the_samples_order_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    data = write_samples(tmp_path, 20)

    def reply(body: dict[str, Any], before: int) -> Reply:
        number = number_of(body)
        failures = [Reply(status=429), Reply(status=500), Reply(cut=True), Reply(raw=b"{")]
        if number % 4 == 1 and before < 2:
            return failures[(number + before) % 4]
        if number == 6:  # never right
            return Reply(response(7))
        if number == 9:  # right at the third draw
            return Reply(response(9) if body["seed"] == 2 else "It is not easy to tell what this is.")
        return Reply(response(number), delay=0.02 * (number % 3))

    with chat_server(reply) as server:
        result = run(data, server.url, "--concurrency", "4")
        assert result.exit_code == 0, result.output
        assert server.at_once == 4
        first = len(server.requests)
        asked = Counter(json.dumps(body, sort_keys=True) for body in server.answered)
        assert set(asked.values()) == {1}
        rows = taught(data)
        assert rows == [
            {
                "id": str(n),
                "rationale": f"<see> There is a sign. </see> <think> It says {n}. </think>",
                "answer": str(n),
            }
            for n in range(20)
            if n != 6
        ]
        assert list(read_teacher(data.parent / "out" / "taught.jsonl")) == [row["id"] for row in rows]
        assert funnel(data) == {
            "samples": 20,
            "taught": 19,
            "dropped": {"wrong_answer": 1},
            "not_asked": 0,
            "draws": {"taken": 19, "wrong_answer": 4, "unreadable": 2},
            "rejected": 0,
            "prompt_tokens": 50 * 25,
            "completion_tokens": 20 * 25,
        }
        # The same command again asks nothing; with a further sample, that one alone.
        assert run(data, server.url).exit_code == 0
        assert len(server.requests) == first and taught(data) == rows
        write_samples(tmp_path, 21)
        assert run(data, server.url).exit_code == 0
        assert [number_of(body) for body in server.requests[first:]] == [20] and len(taught(data)) == 20
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


def test_the_limit_of_tokens_holds_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    data = write_samples(tmp_path, 30)
    with chat_server(lambda body, before: Reply(response(number_of(body)), delay=0.01)) as server:
        result = run(data, server.url, "--max-tokens-total", "1000", "--max-tokens", "40")
        assert result.exit_code == 1 and "tokens 910 of 1000" in result.output
        assert server.tokens == 910  # 13 of 70; a further one might take 50 + 40, of which 40 is not the 64 of LEAST
        assert len(taught(data)) == 13 and funnel(data)["not_asked"] == 17
        result = run(data, server.url, "--max-tokens-total", "100000", "--max-tokens", "40")
        assert result.exit_code == 0, result.output
        assert len(taught(data)) == 30 and len(server.requests) == 30 and server.tokens == 2100


def test_costs_are_counted_and_limited(tmp_path: Path) -> None:
    data = write_samples(tmp_path, 9)
    prices = ["--prompt-price", "1000", "--completion-price", "5000"]  # 0.05 + 0.1 a request
    with chat_server(lambda body, before: Reply(response(number_of(body)))) as server:
        result = run(data, server.url, "--max-cost", "0.8", "--max-tokens", "40", *prices)
        assert result.exit_code == 1 and "cost 0.6 of 0.8" in result.output
        assert funnel(data)["cost"] == pytest.approx(0.6) and len(taught(data)) == 4
        assert "Fix: name --prompt-price" in run(data, server.url, "--max-cost", "1").output


def test_samples_that_need_no_teacher_are_not_asked(tmp_path: Path) -> None:
    data = write_samples(tmp_path, 2)
    rows = data.read_text().splitlines()
    rows.append(json.dumps({"id": "a", "image": "0.png", "question": "Q 5", "answer": "5", "rationale": "So five."}))
    rows.append(json.dumps({"id": "b", "image": "none.png", "question": "Q 5", "answer": "5"}))
    data.write_text("\n".join(rows))
    with chat_server(lambda body, before: Reply(response(number_of(body)))) as server:
        assert run(data, server.url).exit_code == 0
        assert len(server.requests) == 2 and len(taught(data)) == 2
    assert funnel(data)["dropped"] == {"has_rationale": 1} and funnel(data)["rejected"] == 1
    assert "none.png" in (tmp_path / "out" / "taught.jsonl.rejected.jsonl").read_text()


def test_a_sample_that_is_refused_stops_no_other_and_one_unanswered_is_asked_again(tmp_path: Path) -> None:
    data, down = write_samples(tmp_path, 12), True

    def reply(body: dict[str, Any], before: int) -> Reply:
        number = number_of(body)
        if number == 3:
            return Reply(status=400, raw=b"too long")
        return Reply(status=500) if number == 5 and down else Reply(response(number))

    with chat_server(reply) as server:
        result = run(data, server.url)
        assert result.exit_code == 1 and "1 samples were not answered" in result.output
        assert len(taught(data)) == 10 and funnel(data)["dropped"] == {"refused": 1, "unanswered": 1}
        down, before = False, len(server.answered)
        assert run(data, server.url).exit_code == 0
        assert len(taught(data)) == 11 and [number_of(body) for body in server.answered[before:]] == [5]


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_all_ends_the_command(tmp_path: Path, status: int) -> None:
    data = write_samples(tmp_path, 50)
    with chat_server(lambda body, before: Reply(status=status, raw=f"no {SECRET}".encode())) as server:
        result = run(data, server.url, "--concurrency", "2")
        assert result.exit_code == 1 and "OPENAI_API_KEY" in result.output and SECRET not in result.output
        assert len(server.requests) <= 4 and taught(data) == []


def test_a_server_that_has_gone_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_samples(tmp_path, 50)
    with chat_server(lambda body, before: Reply(status=503)) as server:
        result = run(data, server.url, "--concurrency", "4")
        assert result.exit_code == 1 and "8 requests failed in a row" in result.output
        assert len({number_of(body) for body in server.requests}) <= 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_goes_on_with_what_is_missing(tmp_path: Path, number: signal.Signals) -> None:
    data, enough = write_samples(tmp_path, 30), threading.Event()

    def reply(body: dict[str, Any], before: int) -> Reply:
        if len(server.answered) >= 10:
            enough.set()
        return Reply(response(number_of(body)), delay=0.1)

    with chat_server(reply) as server:
        command = [sys.executable, "-m", "srcfast", *words(data, server.url, "--concurrency", "2")]
        process = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True)
        assert enough.wait(120)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        time.sleep(0.3)  # what the server was still answering
        before = len(server.answered)
        if number == signal.SIGTERM:
            assert process.returncode == 143 and "The same command continues" in stderr
            assert len(taught(data)) == before  # what was under way was waited for
        assert before < 30 and run(data, server.url).exit_code == 0
        asked = Counter(map(number_of, server.answered))
        again = sum(asked.values()) - 30
        assert set(asked) == set(range(30)) and again <= (0 if number == signal.SIGTERM else 2)
        assert [row["id"] for row in taught(data)] == [str(n) for n in range(30)]


@pytest.mark.parametrize(
    ("more", "word"),
    [(["--endpoint", "host:80"], "http://HOST:PORT/v1"), (["--concurrency", "0"], "concurrency")],
)
def test_options_that_are_refused(tmp_path: Path, more: list[str], word: str) -> None:
    data = write_samples(tmp_path, 1)
    result = run(data, "http://127.0.0.1:1/v1", *more)
    assert result.exit_code == 2 and word in result.output and not (tmp_path / "out").exists()


def test_the_file_that_the_settings_name_for_the_teacher_may_be_written(tmp_path: Path) -> None:
    data = write_samples(tmp_path, 1)
    with chat_server(lambda body, before: Reply(response(number_of(body)))) as server:
        result = run(data, server.url, f"rationale.teacher={data.parent / 'out' / 'taught.jsonl'}")
    assert result.exit_code == 0 and len(taught(data)) == 1


def test_an_output_that_would_replace_the_data_is_refused(tmp_path: Path) -> None:
    data = write_samples(tmp_path, 1)
    result = run(data, "http://127.0.0.1:1/v1", "--output", str(data))
    assert result.exit_code == 2 and "apart from the inputs" in result.output
    words = ["teach", "--data", str(data), "--output", str(tmp_path / "o")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "--endpoint: expected a teacher" in result.output
    result = CliRunner().invoke(app, [*words, "--endpoint", "http://127.0.0.1:1/v1"])
    assert result.exit_code == 2 and "--endpoint-model: expected" in result.output
