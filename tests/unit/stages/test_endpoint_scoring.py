"""Scores by an endpoint's verdicts: the formulas by a loop written out, what is asked, and what is asked again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from helpers.chat_server import Reply, chat_server, question_of
from helpers.judged_run import write_judged_run
from helpers.seeds import fresh_rng
from helpers.small_run import SETTINGS

from srcfast.config.load import load_config
from srcfast.data.records import Candidate, Sample
from srcfast.data.stage_rows import check_scores, read_scores
from srcfast.endpoint import client
from srcfast.errors import ConfigError
from srcfast.stages.endpoint_scoring import score_row

Srcfast = Callable[..., Result]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)


def candidates_of(texts: str) -> list[Candidate]:
    return [Candidate(f"s#{n}", "s", text, "", "", -1.0) for n, text in enumerate(texts)]


def test_a_row_has_the_formulas_of_the_method() -> None:
    rng = fresh_rng()
    texts, group = list("xyz"), candidates_of("xyxz")
    given: dict[tuple[int, int], Any] = {
        (i, j): (tuple(rng.dirichlet([1, 1, 1])), tuple(rng.dirichlet([1, 1, 1]))) for i, j in ((0, 1), (1, 2))
    }
    row = score_row(Sample("s", (), "Q?", "a"), group, texts, given)  # x and z were not compared
    check_scores(row, "f", 1)
    p = {(i, j): first + tie / 2 for (i, j), ((first, tie, _), _) in given.items()}
    p |= {(j, i): first + tie / 2 for (i, j), (_, (first, tie, _)) in given.items()}
    q = {(i, j): (p[i, j] + 1 - p[j, i]) / 2 for i, j in p}
    u = {(i, j): abs(2 * q[i, j] - 1) * (1 - abs(p[i, j] + p[j, i] - 1)) for i, j in p}
    scores = []
    for i in range(3):
        total = sum(u[i, j] for j in range(3) if (i, j) in u)
        scores.append(sum(u[i, j] * q[i, j] for j in range(3) if (i, j) in u) / total)
    of = [0, 1, 0, 2]  # each candidate's text
    assert row["scores"] == pytest.approx([scores[i] for i in of])
    for a, i in enumerate(of):
        for b, j in enumerate(of):
            assert row["win_probability"][a][b] == pytest.approx(q.get((i, j), 0.5))
            assert row["confidence"][a][b] == pytest.approx(u.get((i, j), 0.0))
            assert row["raw"][a][b] == pytest.approx(p.get((i, j), 0.5))
    assert (row["pairs"], row["verdicts"], "alone" in row) == (2, 4, False)


def test_flips_and_ties_are_those_of_the_likeliest_verdicts() -> None:
    given = {
        (0, 1): ((0.6, 0.1, 0.3), (0.5, 0.1, 0.4)),  # the first both times
        (0, 2): ((0.2, 0.6, 0.2), (0.5, 0.1, 0.4)),
        (1, 2): ((0.6, 0.1, 0.3), (0.1, 0.1, 0.8)),
    }
    row = score_row(Sample("s", (), "Q?", "a"), candidates_of("xyz"), list("xyz"), given)
    assert (row["flip_rate"], row["tie_rate"]) == (pytest.approx(1 / 3), pytest.approx(1 / 6))
    one = score_row(Sample("s", (), "Q?", "a"), candidates_of("xx"), ["x"], {})
    assert one["scores"] == [0.5, 0.5] and one["pairs"] == 0 and np.all(np.array(one["win_probability"]) == 0.5)


def shown(body: dict[str, Any]) -> tuple[str, str]:
    first, _, rest = question_of(body).partition("\nFirst response: ")[2].partition("\nSecond response: ")
    return first, rest.partition("\nWhich response")[0]


def prefer_longer(body: dict[str, Any], before: int) -> Reply:
    first, second = map(len, shown(body))
    share = 0.9 if first > second else 0.2
    return Reply("1", first_token={"1": math.log(share), "2": math.log(1 - share)}, usage=(50, 1))


def test_the_command_scores_asks_nothing_twice_and_goes_on_with_a_higher_limit(
    tmp_path: Path, srcfast: Srcfast
) -> None:
    run, output = write_judged_run(tmp_path, 3, texts=("long text", "short", "long text", "s")), tmp_path / "scores"
    down = True

    def reply(body: dict[str, Any], before: int) -> Reply:
        if "colour 2" in question_of(body) and shown(body) == ("short", "s"):
            return Reply("who knows")
        failing = down and "colour 1" in question_of(body) and shown(body) == ("s", "short")
        return Reply(status=503) if failing else prefer_longer(body, before)

    with chat_server(reply) as server:
        words = ["score", "--data", tmp_path / "data.jsonl", "--candidates", run / "iteration-1" / "candidates"]
        words += ["--output", output, "quiet=true", f"scorer.endpoint={server.url}", "scorer.endpoint_model=large"]
        result = srcfast(*words, "scorer.endpoint_tokens=300")
        assert result.exit_code == 1 and "the limit leaves too little" in result.output and server.tokens <= 300
        result = srcfast(*words, "scorer.endpoint_concurrency=2")
        assert result.exit_code == 1 and "1 verdicts were not answered" in result.output
        down, before = False, len(server.answered)
        assert srcfast(*words).exit_code == 0
        assert len(server.answered) == before + 1 == 3 * 6  # three texts that differ, both orders
    rows = list(read_scores(output))
    assert [row["sample_id"] for row in rows] == ["s0", "s1", "s2"]
    assert rows[0]["raw"][0] == pytest.approx([0.5, 0.9, 0.5, 0.9]) and rows[0]["raw"][3][1] == pytest.approx(0.2)
    assert rows[0]["win_probability"][0][1] == pytest.approx(0.85)
    assert rows[0]["scores"][0] == rows[0]["scores"][2] > rows[0]["scores"][1] > rows[0]["scores"][3]
    assert rows[2]["pairs"] == 2 and rows[2]["confidence"][1][3] == 0.0  # one order has no verdict
    assert json.loads((output / "endpoint.json").read_text())["without_verdict"] == {"unreadable": 1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["scorer.endpoint=http://h/v1"], "endpoint_model"),
        (["scorer.endpoint_model=m"], "endpoint_model"),
        (["scorer.endpoint=http://h/v1", "scorer.endpoint_model=m", "scorer.mode=independent"], "mode pairwise"),
        (["scorer.endpoint=http://h/v1", "scorer.endpoint_model=m", "scorer.finalists=2"], "no finalists"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(None, words)


def test_a_run_does_not_measure_headroom_by_an_endpoint(tmp_path: Path, srcfast: Srcfast) -> None:
    (tmp_path / "small.yaml").write_text(SETTINGS)
    words = ["calibrate", tmp_path / "small.yaml", f"output={tmp_path}", "scorer.endpoint=http://127.0.0.1:1/v1"]
    result = srcfast(*words, "scorer.endpoint_model=large")
    assert result.exit_code == 2 and "evaluation.headroom_samples: expected 0 with scorer.endpoint" in result.output


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["scorer.endpoint=http://user:secret@h/v1"], "scorer.endpoint: expected no name or password"),
        (["scorer.endpoint=http://h/v1?key=secret"], "scorer.endpoint: expected http://HOST:PORT/v1"),
        (["scorer.endpoint=http://h/v1", "curation.min_rating=0.5"], "curation.min_rating: expected 0"),
        (["scorer.endpoint=http://h/v1", "evaluation.judge_endpoint=h", "evaluation.judge_model=m"], "judge_endpoint"),
    ],
)
def test_what_an_endpoint_can_not_do_is_said_before_anything_is_written(
    tmp_path: Path, srcfast: Srcfast, more: list[str], expected: str
) -> None:
    (tmp_path / "small.yaml").write_text(SETTINGS)
    words = ["calibrate", tmp_path / "small.yaml", f"output={tmp_path / 'runs'}", "evaluation.headroom_samples=0"]
    result = srcfast(*words, "scorer.endpoint_model=large", *more)
    assert result.exit_code == 2 and expected in result.output and "secret" not in result.output
    assert not any("secret" in file.read_text() for file in (tmp_path / "runs").rglob("*.yaml"))


def test_a_model_without_any_verdict_ends_the_stage(tmp_path: Path, srcfast: Srcfast) -> None:
    run = write_judged_run(tmp_path, 1, texts=("long text", "short"))
    words = ["score", "--data", tmp_path / "data.jsonl", "--candidates", run / "iteration-1" / "candidates"]
    with chat_server(lambda body, before: Reply("<think> Well", truncated=True)) as server:
        words += ["--output", tmp_path / "scores", "quiet=true", f"scorer.endpoint={server.url}"]
        result = srcfast(*words, "scorer.endpoint_model=large")
    assert result.exit_code == 1 and "raise scorer.endpoint_max_tokens" in result.output
    assert server.requests[0]["max_tokens"] == 8


def test_where_the_endpoint_is_and_how_much_it_is_asked_identifies_no_run() -> None:
    words = ["scorer.endpoint_model=m"]
    a, b, c = (
        load_config(None, [*words, *more]).identity()
        for more in (
            ["scorer.endpoint=http://a/v1"],
            ["scorer.endpoint=http://b/v1", "scorer.endpoint_tokens=9", "scorer.endpoint_concurrency=1"],
            ["scorer.endpoint=http://a/v1", "scorer.endpoint_model=n"],
        )
    )
    assert a == b != c and "endpoint_model" not in load_config(None).identity()["scorer"]


@pytest.mark.slow
def test_an_endpoint_is_the_judge_of_a_run(tmp_path: Path, srcfast: Srcfast) -> None:
    settings = yaml.safe_load(SETTINGS)
    settings["evaluation"]["headroom_samples"] = 0
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    with chat_server(prefer_longer) as server:
        words = ["calibrate", tmp_path / "small.yaml", f"output={tmp_path}", f"scorer.endpoint={server.url}"]
        result = srcfast(*words, "scorer.endpoint_model=large")
        assert result.exit_code == 0, result.output
        asked = len(server.requests)
        assert srcfast(*words, "scorer.endpoint_model=large").exit_code == 0
        assert len(server.requests) == asked > 0
    run = tmp_path / "small"
    rows = list(read_scores(run / "iteration-1" / "scores"))
    assert asked == sum(row["verdicts"] for row in rows) and len(rows) == 6
    entry = json.loads((run / "manifest.json").read_text())["iteration-1/scores"]
    assert entry["endpoint"]["sources"] == {"logprobs": asked} and entry["endpoint"]["tokens"] == 51 * asked
    summary = json.loads((run / "summary.json").read_text())
    assert summary["funnel"]["iteration-1"]["order_shift"] == pytest.approx((0.9 + 0.2) / 2 - 0.5)
