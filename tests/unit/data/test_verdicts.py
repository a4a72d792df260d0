"""Records of verdicts: what is read, what is refused and by which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srcfast.data.verdicts import JudgedPair, mean_shares, pair_key, pair_row, read_verdicts, reversed_shares
from srcfast.errors import InputError

ROW: dict[str, Any] = {
    "id": "s",
    "question": "Q?",
    "answer": "red",
    "facts": ["It is red."],
    "candidates": ["It is red.", "It is blue."],
    "verdict": [0.7, 0.2, 0.1],
}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "v.jsonl"


def test_a_record_is_read_and_written_again(tmp_path: Path) -> None:
    [pair] = read_verdicts(write(tmp_path, ROW | {"judges": ["anna"]}))
    assert (pair.sample.id, pair.sample.facts, pair.candidates) == ("s", ("It is red.",), ("It is red.", "It is blue."))
    assert pair.verdict == pytest.approx((0.7, 0.2, 0.1))
    assert pair_row(pair.sample, *pair.candidates) == {key: ROW[key] for key in ROW if key != "verdict"}


def test_shares_that_add_up_to_1_within_rounding_are_scaled_to_it() -> None:
    pair = JudgedPair.from_json(ROW | {"verdict": [0.5005, 0, 0.5]}, file="f", line=1)
    assert pair.verdict == pytest.approx((0.5005 / 1.0005, 0, 0.5 / 1.0005)) and sum(pair.verdict) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"verdict": [0.5, 0.2, 0.1]}, "verdict"),
        ({"verdict": [0.9, 0.1]}, "verdict"),
        ({"verdict": [1.2, 0.0, -0.2]}, "verdict"),
        ({"verdict": [True, 0, 0]}, "verdict"),
        ({"verdict": "first"}, "verdict"),
        ({"candidates": ["one", "one"]}, "candidates"),
        ({"candidates": ["one"]}, "candidates"),
        ({"candidates": ["one", " "]}, "candidates"),
        ({"candidates": "one"}, "candidates"),
        ({"question": ""}, "question"),
        ({"facts": [1]}, "facts"),
        ({"id": None}, "id"),
    ],
    ids=str,
)
def test_what_is_no_verdict_is_refused_by_line_and_field(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = write(tmp_path, ROW, ROW | change)
    with pytest.raises(InputError, match=f"line 2, (sample 's', )?field '{field}'"):
        read_verdicts(path)


def test_a_sample_has_one_question_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2, sample 's', field 'id': expected the question and reference"):
        read_verdicts(write(tmp_path, ROW, ROW | {"question": "Another?"}))
    with pytest.raises(InputError, match="at least one verdict"):
        read_verdicts(write(tmp_path))


def test_a_key_is_of_what_is_judged_alone() -> None:
    assert pair_key(ROW) == pair_key(ROW | {"verdict": [0, 1, 0], "judges": ["ben"]})
    changes = [{"question": "P?"}, {"candidates": ["It is blue.", "It is red."]}, {"facts": []}, {"id": "t"}]
    assert len({pair_key(ROW | change) for change in [{}, *changes]}) == 5


def test_shares_are_turned_round_and_averaged() -> None:
    assert reversed_shares((0.7, 0.2, 0.1)) == (0.1, 0.2, 0.7)
    assert mean_shares([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]) == pytest.approx((2 / 3, 1 / 3, 0.0))
