"""What an endpoint's answer says of two candidates, and what is reported of all answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import Reply, chat_server, question_of

from srcfast.data.records import Sample
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget
from srcfast.endpoint.client import Answer, Endpoint, Refused, Unanswered
from srcfast.run.progress import track
from srcfast.stages.endpoint_verdicts import (
    Verdicts,
    ask_verdicts,
    build_body,
    read_verdict,
    take_verdict,
    verdict_report,
    verdict_rows,
)
from srcfast.stages.judged_pairs import RunPair

SAMPLE = Sample("s", (), "Which colour?", "red", rationale="It is red.")


@pytest.mark.parametrize(
    ("text", "first_token", "shares", "source"),
    [
        ("1", {"1": math.log(0.6), "2": math.log(0.2), "The": math.log(0.2)}, (0.75, 0.0, 0.25), "logprobs"),
        ("1", {" 1": math.log(0.3), "1": math.log(0.3), "0\n": math.log(0.4)}, (0.6, 0.4, 0.0), "logprobs"),
        ("2", {"1": math.log(0.2), "2": math.log(0.2), "The": math.log(0.6)}, (0.0, 0.0, 1.0), "text"),
        ("0", {"1": math.log(0.25), "0": math.log(0.25)}, (0.5, 0.5, 0.0), "logprobs"),  # half is enough
        ("2", None, (0.0, 0.0, 1.0), "text"),
        (" **0**.", None, (0.0, 1.0, 0.0), "text"),
        ("<think> 2 is 2, so 1 it is not. </think>\n1", None, (1.0, 0.0, 0.0), "text"),
        ("Response 2 is better.", None, (0.0, 0.0, 1.0), "text"),
        ("Response 1 is better than response 2.", None, None, "text"),
        ("The first one.", None, None, "text"),
        ("10", None, None, "text"),
        ("1.5", None, None, "text"),
        ("", None, None, "text"),
    ],
)
def test_a_verdict_is_of_the_first_token_or_else_of_the_text(
    text: str, first_token: dict[str, float] | None, shares: tuple[float, ...] | None, source: str
) -> None:
    read, where = read_verdict(Answer(text, False, None, None, first_token))
    assert where == source and (read == shares if shares is None else read == pytest.approx(shares))


def test_the_request_has_the_instructions_the_reference_and_both_candidates() -> None:
    body = build_body(SAMPLE, "It is {red}.", "It is blue.", 8, True)
    [message] = body.body()["messages"]
    text = message["content"]
    assert text.startswith("Judge responses to a question about pictures, which you do not see.")
    assert text.endswith(
        "\nQuestion: Which colour?\nRationale: It is red.\nAnswer: red\nFirst response: It is {red}.\n"
        "Second response: It is blue.\nWhich response is better? Reply with 1 for the first, 2 for the second,"
        " or 0 if they are equally good, and nothing else."
    )
    assert body.body()["temperature"] == 0.0 and body.body()["logprobs"] is True and body.body()["top_logprobs"] == 5
    assert "logprobs" not in body.content and body.content["max_tokens"] == body.max_tokens == 8
    plain = build_body(SAMPLE, "It is {red}.", "It is blue.", 8, False)
    assert "logprobs" not in plain.body() and plain.content == body.content  # an answer to either counts


@pytest.mark.parametrize("odd", [0, 3])
def test_a_server_without_log_probabilities_is_asked_without_wherever_it_says_so(odd: int, tmp_path: Path) -> None:
    """The first answers are of another server, which gave them, or one request alone is refused in either form."""
    pairs = [RunPair(Sample(f"s{n}", (), f"Colour {n}?", "red"), "a", "b", "random", None) for n in range(4)]
    log = tmp_path / "answers.jsonl"

    def ask(url: str, of: list[RunPair]) -> Verdicts:
        verdicts, answers = Verdicts(), AnswerLog(log)
        with track("verdicts", 2 * len(of), quiet=True) as progress:
            ask_verdicts(Endpoint(url, "m", attempts=1), of, 8, answers, Budget([], 0, 0), 1, progress, verdicts)
        answers.close()
        return verdicts

    def reply(body: dict[str, Any], before: int) -> Reply:
        return Reply(status=400) if "logprobs" in body or f"Colour {odd}?" in question_of(body) else Reply("1")

    with chat_server(lambda body, before: Reply("2", first_token={"2": -0.1})) as server:
        assert len(ask(server.url, pairs[1:2]).shares) == 2
    with chat_server(reply) as server:
        verdicts = ask(server.url, [pairs[1], pairs[0], *pairs[2:]])
        assert verdicts.reasons == {slot: "refused" for slot in [(1 if odd == 0 else 3, 0), (1 if odd == 0 else 3, 1)]}
        assert len(verdicts.shares) == 6 and verdicts.sources == {"logprobs": 2, "text": 4}
        assert sum("logprobs" in body for body in server.requests) <= 3, "later requests do not ask for them"


def test_the_report_and_the_records_by_hand() -> None:
    samples = [Sample(f"s{n}", (), "Q?", "red") for n in range(5)]
    scorer = (0.9, 0.9, None, 0.4, 0.8)
    chosen = ("unsure", "unsure", "random", "random", "random")
    pairs = [RunPair(samples[n], "a", "b", chosen[n], scorer[n]) for n in range(5)]  # type: ignore[arg-type]
    verdicts = Verdicts()
    given = [
        ((0.8, 0.2, 0.0), (0.1, 0.1, 0.8)),  # a both times
        ((0.7, 0.0, 0.3), (0.9, 0.0, 0.1)),  # whoever is shown first, b by more
        ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        ((0.6, 0.0, 0.4), (0.4, 0.0, 0.6)),  # a, where the R-Scorer says b
    ]
    for index, (there, back) in enumerate(given):
        verdicts.shares[index, 0], verdicts.shares[index, 1] = there, back
    take_verdict(verdicts, (4, 0), Answer("1", False, None, None))
    take_verdict(verdicts, (4, 1), Answer("Well, the", True, None, None))
    report = verdict_report(pairs, verdicts)
    assert report["pairs"] == 5 and report["judged"] == 4 and report["dropped"] == {"cut_off": 1}
    assert report["sources"] == {"text": 1} and report["order_flip_rate"] == pytest.approx(1 / 4)
    # p of the eight verdicts: 0.9, 0.15, 0.7, 0.9, 0.5, 0, 0.6, 0.4
    assert report["order_shift"] == pytest.approx((0.9 + 0.15 + 0.7 + 0.9 + 0.5 + 0 + 0.6 + 0.4) / 8 - 0.5)
    assert report["scorer"] == {"unsure": {"pairs": 2, "same_side": 0.5}, "random": {"pairs": 1, "same_side": 0.0}}
    rows = list(verdict_rows(pairs, verdicts, "large"))
    assert [row["id"] for row in rows] == ["s0", "s1", "s2", "s3"]
    assert rows[0]["verdict"] == pytest.approx([0.8, 0.15, 0.05]) and rows[0]["by_order"][1] == [0.1, 0.1, 0.8]
    assert rows[1]["verdict"] == pytest.approx([0.4, 0.0, 0.6]) and rows[1]["judges"] == ["large"]


def test_why_a_pair_has_no_verdict_and_that_a_later_one_counts() -> None:
    verdicts = Verdicts()
    take_verdict(verdicts, (0, 0), Refused("no"))
    take_verdict(verdicts, (1, 0), Unanswered("late"))
    take_verdict(verdicts, (2, 0), Answer("none", False, None, None))
    assert verdicts.reasons == {(0, 0): "refused", (1, 0): "unanswered", (2, 0): "unreadable"}
    take_verdict(verdicts, (1, 0), Answer("2", False, None, None))
    assert verdicts.reasons.keys() == {(0, 0), (2, 0)} and verdicts.shares == {(1, 0): (0.0, 0.0, 1.0)}
    empty = verdict_report([], Verdicts())
    assert empty["order_flip_rate"] is None and empty["scorer"]["random"] == {"pairs": 0, "same_side": None}
