"""Free answers and their judge, a stand-in server: what it is asked, what its replies count, and what it fails to score."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import Reply, chat_server, question_of

from srcfast.config.settings import Config
from srcfast.data.answer_rules import JudgeScores, rule_text
from srcfast.data.jsonl import read_jsonl, write_jsonl
from srcfast.data.records import Sample
from srcfast.endpoint import client
from srcfast.endpoint.budget import LimitReached
from srcfast.endpoint.client import KEY, Answer, EndpointError, Refused
from srcfast.errors import ConfigError, SrcfastError
from srcfast.run.chunks import ChunkFiles
from srcfast.stages.datasets import EvaluationSet
from srcfast.stages.evaluation import write_evaluation
from srcfast.stages.free_answers import (
    PROMPT,
    SAMPLING,
    SYSTEM,
    free_answer,
    judge_answers,
    judge_endpoint,
    parse_scores,
    prompt_hash,
    read_judgement,
)

SECRET = "sk-secret-judge-0123456789"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.01)
    monkeypatch.setenv(KEY, SECRET)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 9", (8, 9)),
        ("8.5 9.25\nThe first ...", (8.5, 9.25)),
        ("8, 9", (8, 9)),
        ("8,9", (8, 9)),
        ("\n 10 1 \n", (10, 1)),
        ("<think> 3 4 is too low. </think>\n\n7 7", (7, 7)),
        ("Scores: 8 9", None),
        ("8 9 10", None),
        ("8", None),
        ("8  9", None),
        ("8/10 9/10", None),
        ("0 9", None),
        ("0.9 9", None),
        ("8 11", None),
        ("10.1 9", None),
        ("-8 9", None),
        ("**8 9**", None),
        ("\u0668 9", None),
        ("nan 9", None),
        ("The first is better.\n8 9", None),
        ("", None),
    ],
)
def test_two_numbers_alone_in_the_first_line_are_scores(reply: str, scores: tuple[float, float] | None) -> None:
    assert parse_scores(reply) == scores


def test_scores_are_means_over_both_orders() -> None:
    def said(text: str) -> Answer:
        return Answer(text, False, 1, 1)

    # The reference's answer comes first in the first reply, second in the other one.
    assert read_judgement(said("8 5"), said("6 9")) == JudgeScores(reference=8.5, prediction=5.5)
    assert read_judgement(said("8 5"), said("I can't say")) == "unreadable"
    assert read_judgement(said("what"), said("8 5")) == "unreadable"
    assert read_judgement(Refused("too long"), said("8 5")) == "refused"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<see> A dog. </see> <think> So. </think> <answer> A dog sleeps. </answer>", "A dog sleeps."),
        ("It sleeps. Answer: a dog", "a dog"),
        (
            " A dog sleeps on a large red mat, in the sun.\nIt looks tired. ",
            "A dog sleeps on a large red mat, in the sun.\nIt looks tired.",
        ),
        ("<see> A dog. </see> <think> So", "<see> A dog. </see> <think> So"),
        (" \n", None),
    ],
)
def test_a_response_without_a_stated_answer_is_one(text: str, answer: str | None) -> None:
    assert free_answer(text) == answer


def settings(url: str, **more: object) -> Config:
    evaluation = {"judge_endpoint": url, "judge_model": "large", "bootstrap_resamples": 200, "judge_concurrency": 4}
    return Config(evaluation=evaluation | more)


def samples(count: int) -> list[Sample]:
    return [
        Sample(f"s{n}", (), f"What is in picture {n}?", f"reference {n}", extra={"category": ("conv", "detail")[n % 2]})
        for n in range(count)
    ]


def answers_between(body: dict[str, Any]) -> tuple[str, str]:
    """Return the two answers of a request, in their order."""
    text = question_of(body)
    first = text.split("[Assistant 1]\n")[1].split("\n[End of Assistant 1]")[0]
    return first, text.split("[Assistant 2]\n")[1].split("\n[End of Assistant 2]")[0]


def judged(url: str, folder: Path, texts: Sequence[str], **more: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary's entry and the predictions of responses with these texts."""
    of = samples(len(texts))
    write_jsonl(
        folder / "answers.jsonl", [{}, *({"id": one.id, "text": text} for one, text in zip(of, texts, strict=True))]
    )
    dataset = EvaluationSet("bench", "test", of, "judge")
    entry = write_evaluation(
        folder / "p" / "bench-test", ChunkFiles((folder / "answers.jsonl",)), dataset, "base", settings(url, **more)
    )
    return entry, [row for _, row in read_jsonl(folder / "p" / "bench-test.jsonl")]


def by_length(noise: Callable[[str], float] = lambda answer: 0.0) -> Callable[[dict[str, Any], int], Reply]:
    """A judge that likes the first answer by a point more than it should, and references by their number."""

    def reply(body: dict[str, Any], before: int) -> Reply:
        first, second = answers_between(body)
        scores = [1 + len(answer) % 7 + noise(answer) for answer in (first, second)]
        return Reply(f"{scores[0] + 1} {scores[1]}\nBecause.")

    return reply


def test_both_orders_are_asked_with_all_that_is_known(tmp_path: Path) -> None:
    sample = Sample(
        "s", (), "long prompt", "It is {red}.", extra={"vlmeval_question": "Which colour?", "caption": ["A", "B"]}
    )
    with chat_server(lambda body, before: Reply("5 6")) as server:
        assert judge_answers(settings(server.url), [(sample, "Blue")], tmp_path) == {"s": JudgeScores(5.5, 5.5)}
        first, second = sorted(server.requests, key=lambda body: question_of(body).index("Blue"), reverse=True)
    assert first["messages"][0] == {"role": "system", "content": SYSTEM}
    assert question_of(first).startswith(
        "[Context]\nA\nB\n\n[Question]\nWhich colour?\n\n[Assistant 1]\nIt is {red}.\n[End of"
    )
    assert answers_between(first) == ("It is {red}.", "Blue") and answers_between(second) == ("Blue", "It is {red}.")
    assert {key: first[key] for key in ("model", "temperature", "seed", "max_tokens")} == {
        "model": "large",
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 1024,
    }
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_the_relative_score_is_that_of_a_loop(tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = ["word " * rng.randint(6, 40) for _ in range(30)]
    with chat_server(by_length()) as server:
        entry, rows = judged(server.url, tmp_path, texts)
        assert len(server.requests) == 60
    reference, prediction, wins, by_category = 0.0, 0.0, 0, {"conv": [0.0, 0.0], "detail": [0.0, 0.0]}
    for n, text in enumerate(texts):
        of_reference, of_answer = (1 + len(answer) % 7 + 0.5 for answer in (f"reference {n}", text.strip()))
        reference, prediction = reference + of_reference, prediction + of_answer
        wins += of_answer >= of_reference
        by_category[("conv", "detail")[n % 2]][0] += of_answer
        by_category[("conv", "detail")[n % 2]][1] += of_reference
        assert rows[n]["judged"] == {"reference": of_reference, "prediction": of_answer}
        assert rows[n]["right"] == (of_answer >= of_reference) and rows[n]["prediction"] == text.strip()
    assert entry["scores"] == {
        "relative": pytest.approx(prediction / reference),
        "prediction": pytest.approx(prediction / 300),
        "reference": pytest.approx(reference / 300),
        "unscored": 0.0,
    }
    assert entry["accuracy"] == wins / 30 and entry["n"] == 30
    for name, (of_answers, of_references) in by_category.items():
        assert entry["by_category"]["category"][name]["scores"]["relative"] == pytest.approx(of_answers / of_references)
    low, high = entry["judge"]["relative_ci95"]
    assert low < entry["scores"]["relative"] < high and high - low < 0.6
    hashed = hashlib.sha256(json.dumps([SYSTEM, PROMPT, SAMPLING], sort_keys=True).encode()).hexdigest()
    assert entry["judge"] | {"relative_ci95": None} == {
        "model": "large",
        "prompt_sha256": hashed,
        "unscored": {},
        "relative_ci95": None,
    }
    assert rule_text(entry).startswith("free answers: ") and rule_text(entry).endswith(
        f"judge large, prompt {hashed[:12]}"
    )
    assert prompt_hash() == hashed


def test_what_the_judge_fails_to_score_is_counted(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        both = answers_between(body)
        if "empty" in str(both):
            return Reply("Both are fine.") if both[0].startswith("ref") else Reply("5 5")
        return Reply(status=400) if "long" in str(both) else Reply("5 5")

    with chat_server(reply) as server:
        entry, rows = judged(server.url, tmp_path, ["empty words of an answer here", "a long answer", "one", " "])
        assert len(server.requests) == 8  # an empty answer is asked, too
    assert entry["judge"]["unscored"] == {"unreadable": 1, "refused": 1} and entry["scores"]["unscored"] == 0.5
    assert entry["scores"]["relative"] == 1.0 and entry["accuracy"] == 0.5 and entry["unparsed"] == 1
    assert [row["judged"] for row in rows[:2]] == [{"unscored": "unreadable"}, {"unscored": "refused"}]
    assert [row["right"] for row in rows] == [False, False, True, True]


def test_a_judge_that_scores_nothing_leaves_no_score(tmp_path: Path) -> None:
    with chat_server(lambda body, before: Reply("?")) as server:
        entry, _ = judged(server.url, tmp_path, ["one", "two"])
    assert entry["scores"] == {"unscored": 1.0} and entry["accuracy"] == 0.0 and "relative_ci95" not in entry["judge"]


def test_nothing_is_asked_twice_and_the_key_is_in_no_file(tmp_path: Path) -> None:
    with chat_server(by_length()) as server:
        first, _ = judged(server.url, tmp_path, ["one", "two", "three"])
        again, _ = judged(server.url, tmp_path, ["one", "two", "three"])
        assert again == first and len(server.requests) == 6
        judged(server.url, tmp_path, ["one", "two", "another"])
        assert len(server.requests) == 8
        judged(server.url, tmp_path, ["one", "two", "another"], judge_max_tokens=512)
        assert len(server.requests) == 14  # what is asked is another request then
    texts = [file.read_text(encoding="utf-8") for file in tmp_path.rglob("*") if file.is_file()]
    assert len(texts) == 4 and not any(SECRET in text for text in texts)


def unreliable(server_fails: list[bool]) -> Callable[[dict[str, Any], int], Reply]:
    return lambda body, before: (
        Reply(status=503) if server_fails[0] and "second answer" in question_of(body) else Reply("5 5")
    )


def test_a_judge_that_is_down_ends_the_evaluation_and_the_same_command_goes_on(tmp_path: Path) -> None:
    fails = [True]
    with chat_server(unreliable(fails)) as server:
        with pytest.raises(SrcfastError, match="2 requests unanswered"):
            judged(server.url, tmp_path, ["one", "second answer", "three"])
        assert not (tmp_path / "p" / "bench-test.jsonl").exists()
        fails[0] = False
        count = len(server.answered)
        entry, _ = judged(server.url, tmp_path, ["one", "second answer", "three"])
        assert (count, len(server.answered)) == (4, 6) and entry["scores"]["unscored"] == 0.0


def test_a_judge_that_refuses_the_key_ends_it_at_once(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        return Reply(status=401, raw=f"no {SECRET}".encode())

    with chat_server(reply) as server, pytest.raises(EndpointError) as caught:
        judged(server.url, tmp_path, ["one"])
    assert SECRET not in str(caught.value)


def test_a_limit_of_tokens_holds_over_all_processes(tmp_path: Path) -> None:
    texts = [f"answer {n}" for n in range(12)]
    limit = {"judge_token_limit": 4000, "judge_max_tokens": 100}
    with chat_server(lambda body, before: Reply("5 5", usage=(300, 20))) as server:
        for _ in range(2):
            with pytest.raises(LimitReached, match="tokens"):
                judged(server.url, tmp_path, texts, **limit)
        assert 8 <= len(server.answered) and server.tokens <= 4000


@pytest.mark.parametrize(
    ("evaluation", "name"),
    [
        ({}, "evaluation.judge_endpoint: expected a judge"),
        ({"judge_endpoint": "http://host/v1"}, "evaluation.judge_model: expected a judge"),
        ({"judge_endpoint": "host:80", "judge_model": "m"}, "evaluation.judge_endpoint: expected http://HOST"),
        ({"judge_endpoint": "http://a:b@host/v1", "judge_model": "m"}, "evaluation.judge_endpoint: expected no name"),
    ],
)
def test_a_judge_has_an_address_and_a_name(evaluation: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        judge_endpoint(Config(evaluation=evaluation))
