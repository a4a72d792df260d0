"""Score rows are checked for what curation reads of them, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srcfast.data.jsonl import write_shards
from srcfast.data.records import Candidate
from srcfast.data.stage_rows import read_scores
from srcfast.errors import InputError

ROW: dict[str, Any] = {
    "sample_id": "s",
    "candidate_ids": ["a", "b"],
    "scores": [0.25, 0.75],
    "confidence": [[0.0, 0.5], [0.5, 0.0]],
    "flip_rate": 0.0,
    "tie_rate": 0.5,
    "pairs": 1,
    "verdicts": 2,
}


def test_rows_of_another_scorer_are_read_without_win_probabilities(tmp_path: Path) -> None:
    write_shards(tmp_path, [ROW])
    assert list(read_scores(tmp_path)) == [ROW]


def test_win_probabilities_that_are_there_are_checked(tmp_path: Path) -> None:
    write_shards(tmp_path, [ROW | {"win_probability": [[0.5, 0.5]]}])
    with pytest.raises(InputError, match="line 1, sample 's', field 'win_probability': expected 2 x 2 numbers"):
        list(read_scores(tmp_path))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"candidate_ids": ["a", "a"]}, "candidate_ids"),
        ({"candidate_ids": ["a", 1]}, "candidate_ids"),
        ({"candidate_ids": "ab"}, "candidate_ids"),
        ({"candidate_ids": ["a", "b", "c"]}, "scores"),
        ({"scores": [0.25, 1.01]}, "scores"),
        ({"scores": [0.25, -0.01]}, "scores"),
        ({"scores": [0.25]}, "scores"),
        ({"alone": [0.25]}, "alone"),
        ({"confidence": [[0.0, 0.5]]}, "confidence"),
        ({"confidence": [[0.0, 0.5], [0.5]]}, "confidence"),
        ({"confidence": [[0.0, 2.0], [0.5, 0.0]]}, "confidence"),
        ({"raw": [0.5, 1.5]}, "raw"),
        ({"raw": [[0.5, 0.5]]}, "raw"),
        ({"raw": "none"}, "raw"),
        ({"flip_rate": 1.01}, "flip_rate"),
        ({"tie_rate": -0.01}, "tie_rate"),
        ({"pairs": -1}, "pairs"),
        ({"verdicts": -1}, "verdicts"),
    ],
    ids=str,
)
def test_a_row_that_curation_could_not_use_is_refused_by_field(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    write_shards(tmp_path, [ROW | change])
    with pytest.raises(InputError, match=f"line 1, sample 's', field '{field}'"):
        list(read_scores(tmp_path))


def test_numbers_on_their_bounds_are_read(tmp_path: Path) -> None:
    bounds = {"scores": [0.0, 1.0], "flip_rate": 1.0, "tie_rate": 1.0, "pairs": 0, "verdicts": 0, "alone": [1.0, 0.0]}
    row = ROW | bounds | {"confidence": [[0.0, 1.0], [1.0, 0.0]], "win_probability": [[0.5, 1.0], [0.0, 0.5]]}
    write_shards(tmp_path, [row])
    assert list(read_scores(tmp_path)) == [row]


def test_a_candidate_s_log_probability_exceeds_0_by_rounding_alone() -> None:
    row = {"id": "s#0", "sample_id": "s", "text": "Yes."}
    for value in (-3.5, 0.0, 0.001):
        assert Candidate.from_json({**row, "logprob": value}, file="c.jsonl", line=1).logprob == value
    for value in (0.0011, 0.5, 3.0):
        with pytest.raises(InputError, match=f"field 'logprob': expected a log-probability, at most 0, found {value}"):
            Candidate.from_json({**row, "logprob": value}, file="c.jsonl", line=1)
