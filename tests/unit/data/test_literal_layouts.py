"""Forests, rows, records and hashes by literal values, field by field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srcfast.data.conversations import trl_preference
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.in_order import InOrder, samples_in_order
from srcfast.data.jsonl import as_json, flatten, json_hash, read_shards, write_shards
from srcfast.data.logit_rows import response_logit_rows, row_positions
from srcfast.data.records import Candidate, Fields, Preference, Sample
from srcfast.data.stage_rows import read_aligned, read_pairs, read_scores
from srcfast.errors import InputError

# prompt 10 11 12 -> {20 21 -> {30, 31 32}, 40}; then a tree of 50 51 -> 60
FOREST = Forest.of(
    [
        Tree(
            (Segment([10, 11, 12]), Segment([20, 21], 0), Segment([30], 1), Segment([31, 32], 1), Segment([40], 0)),
            ("a",),
        ),
        Tree((Segment([50, 51]), Segment([60], 0)), ("b", "c")),
    ]
)


def test_every_field_of_a_forest_is_literal() -> None:
    expected: dict[str, Any] = {
        "token_ids": [10, 11, 12, 20, 21, 30, 31, 32, 40, 50, 51, 60],
        "positions": [0, 1, 2, 3, 4, 5, 5, 6, 3, 0, 1, 2],
        "cu_seqlens_q": [0, 3, 5, 6, 8, 9, 11, 12],
        "cu_seqlens_k": [0, 3, 8, 14, 21, 25, 27, 30],
        "predictor": [-1, 0, 1, 2, 3, 4, 4, 6, 2, -1, 9, 10],
        "kv_index": [
            *[0, 1, 2],
            *[0, 1, 2, 3, 4],
            *[0, 1, 2, 3, 4, 5],
            *[0, 1, 2, 3, 4, 6, 7],
            *[0, 1, 2, 8],
            *[9, 10],
            *[9, 10, 11],
        ],
    }
    assert {name: getattr(FOREST, name).tolist() for name in expected} == expected
    assert FOREST.segment_start == [[0, 3, 5, 6, 8], [9, 11]]
    assert (FOREST.max_seqlen_q, FOREST.max_seqlen_k, FOREST.num_tokens, FOREST.wasted_tokens) == (3, 7, 12, 0)
    assert FOREST.images == ("a", "b", "c")
    assert [path.tolist() for path in FOREST.paths()] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 6, 7],
        [0, 1, 2, 8],
        [9, 10, 11],
    ]


@pytest.mark.parametrize(
    ("tree", "segments", "rows", "targets"),
    [
        (0, [0], [0, 1], [11, 12]),  # a root's first token has no predictor
        (0, [1, 4], [2, 3, 2], [20, 21, 40]),
        (0, [2, 3], [4, 4, 6], [30, 31, 32]),
        (1, [1, 0], [10, 9], [60, 51]),
    ],
)
def test_a_token_is_predicted_by_the_row_before_it_on_its_path(
    tree: int, segments: list[int], rows: list[int], targets: list[int]
) -> None:
    assert [part.tolist() for part in FOREST.target_rows(tree, segments)] == [rows, targets]


def test_the_rows_that_predict_responses_are_there_once_each_ascending() -> None:
    selected = response_logit_rows(FOREST)
    assert selected.tolist() == [2, 3, 4, 6, 10]
    wanted = np.array([10, 2, 4, 4, 6])
    assert row_positions(wanted, torch.zeros(5, 1), FOREST, selected).tolist() == [4, 0, 2, 2, 3]
    assert row_positions(wanted, torch.zeros(12, 1), FOREST, selected).tolist() == wanted.tolist()


def test_wasted_tokens_are_those_that_the_budget_has_left() -> None:
    (forest,) = Forest.pack([Tree((Segment([1, 2, 3]),)), Tree((Segment([4]),))], 10)
    assert (forest.num_tokens, forest.wasted_tokens, forest.token_budget) == (4, 6, 10)


# JSON -----------------------------------------------------------------------------------------------------------------


def test_a_hash_is_of_the_values_whatever_the_order_of_keys() -> None:
    text = '{"a": [1, 2.5, null, true], "b": {"c": "\\u00e9", "d": {}}}'
    value = {"b": {"d": {}, "c": "é"}, "a": [1, 2.5, None, True]}
    assert json_hash(value) == json_hash(json.loads(text)) == hashlib.sha256(text.encode()).hexdigest()
    assert json_hash([1, 2]) != json_hash([2, 1])
    assert flatten(value) == {"a": [1, 2.5, None, True], "b.c": "é", "b.d": {}}
    assert as_json({"a": (1, Path("x"))}) == {"a": [1, "x"]}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_shards_have_so_many_rows_each_and_a_marker_with_their_hashes(count: int, tmp_path: Path) -> None:
    rows = [{"n": number} for number in range(count)]
    assert write_shards(tmp_path, rows, shard_size=3) == count
    shards = [rows[start : start + 3] for start in range(0, max(count, 1), 3)]
    texts = ["".join(json.dumps(row) + "\n" for row in shard) for shard in shards]
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [file.name for file in files] == [f"{number:05d}.jsonl" for number in range(len(shards))]
    assert [file.read_text() for file in files] == texts
    marker = json.loads((tmp_path / "COMPLETE").read_text())
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert marker == {"rows": count, "shards": len(shards), "sha256": hashes}
    assert [(file.name, line, row) for file, line, row in read_shards(tmp_path)] == [
        (f"{number // 3:05d}.jsonl", number % 3 + 1, row) for number, row in enumerate(rows)
    ]


def test_values_are_returned_once_and_in_any_order() -> None:
    pairs = InOrder(iter([("a", 1), ("b", 2), ("c", 3), ("d", 4)]))
    assert (pairs.get("b"), pairs.get("b"), pairs.get("a")) == (2, None, 1)
    assert list(pairs.rest()) == [("c", 3), ("d", 4)]
    pairs = InOrder(iter([("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)]))
    assert (pairs.get("d"), pairs.get("b")) == (4, 2)
    assert list(pairs.rest()) == [("a", 1), ("c", 3), ("e", 5)]  # in the order of the shards


def test_a_sample_s_candidates_stand_one_after_the_other() -> None:
    def candidates(*names: str) -> Any:
        return samples_in_order(Candidate(f"{name}{k}", name, "t", "", "", -1.0) for k, name in enumerate(names))

    assert [(name, len(group)) for name, group in candidates("a", "a", "b").rest()] == [("a", 2), ("b", 1)]
    with pytest.raises(InputError, match="one after the other"):
        list(candidates("a", "b", "a").rest())


# Records --------------------------------------------------------------------------------------------------------------

SCORES: dict[str, Any] = {
    "sample_id": "s",
    "candidate_ids": ["a", "b"],
    "scores": [0.0, 1.0],
    "confidence": [[0.0, 1.0], [1.0, 0.0]],
    "flip_rate": 1.0,
    "tie_rate": 0.0,
    "pairs": 0,
    "verdicts": 0,
}


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"scores": [-1e-7, 1 + 1e-7]}, True),  # sums in fp32 round so
        ({"scores": [-1e-5, 1.0]}, False),
        ({"scores": [0.0, 1 + 1e-5]}, False),
        ({"scores": [0.0]}, False),
        ({"scores": [0.0, True]}, False),
        ({"alone": [0.5, 1 + 1e-7]}, True),
        ({"alone": [0.5, 1.1]}, False),
        ({"confidence": [[0.0, 1 + 1e-7], [1.0, 0.0]]}, True),
        ({"confidence": [[0.0, 1.1], [1.0, 0.0]]}, False),
        ({"confidence": [[0.0, 1.0]]}, False),
        ({"win_probability": [[0.5, 1.1], [0.0, 0.5]]}, False),
        ({"flip_rate": 1.01}, False),
        ({"tie_rate": -0.01}, False),
        ({"pairs": -1}, False),
    ],
)
def test_score_rows_are_numbers_from_0_to_1_but_for_rounding(
    change: dict[str, Any], passes: bool, tmp_path: Path
) -> None:
    write_shards(tmp_path, [SCORES | change])
    if passes:
        assert list(read_scores(tmp_path)) == [SCORES | change]
    else:
        with pytest.raises(InputError, match=f"field '{next(iter(change))}'"):
            list(read_scores(tmp_path))


def test_predictions_say_whether_each_is_aligned(tmp_path: Path) -> None:
    rows = [{"id": "a", "aligned": True}, {"id": "b", "aligned": False}, {"id": "c", "aligned": None}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_aligned(tmp_path / "p.jsonl") == {"a": True, "b": False, "c": False}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    with pytest.raises(InputError, match="an id that occurs once"):
        read_aligned(tmp_path / "p.jsonl")


PAIR = {"sample_id": "s", "images": [], "prompt": "Why?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("more", "confidence", "judged"),
    [
        ({}, 1.0, 1.0),
        ({"confidence": 0.25}, 0.25, 0.25),  # what weighs a pair is its confidence where no other is stated
        ({"confidence": 0.25, "judge_confidence": 0.75}, 0.25, 0.75),
        ({"judge_confidence": 0.0}, 1.0, 0.0),
        ({"confidence": 1.0}, 1.0, 1.0),
        ({"confidence": 0.0}, None, None),
        ({"confidence": 1.01}, None, None),
        ({"confidence": -0.1}, None, None),
        ({"judge_confidence": 1.01}, None, None),
        ({"judge_confidence": -0.01}, None, None),
    ],
)
def test_a_pair_s_confidences(more: dict[str, float], confidence: float | None, judged: float | None) -> None:
    def read() -> Preference:
        return Preference.from_json(PAIR | more, file="f", line=3, image_root=Path("."))

    if confidence is None:
        with pytest.raises(InputError, match=f"line 3, sample 's', field '{next(iter(more))}'"):
            read()
    else:
        assert (read().confidence, read().judge_confidence) == (confidence, judged)


def said(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": word} for k, word in enumerate(words)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "turns", "responses"),
    [
        (said("Q", "a"), said("Q", "b"), "Q", 0, ("a", "b")),
        (said("Q", "x", "R", "a"), said("Q", "x", "R", "b"), "R", 2, ("a", "b")),
        (said("Q", "a"), said("Q", "a"), None, 0, None),  # the same: a response is left, and refused as such
        (said("Q", "a", "R", "c"), said("Q", "b", "R", "c"), None, 0, None),  # responses of several turns
    ],
)
def test_an_implicit_prompt_is_what_both_conversations_begin_with(
    chosen: Any, rejected: Any, prompt: str | None, turns: int, responses: tuple[str, str] | None
) -> None:
    row = {"id": "s", "chosen": chosen, "rejected": rejected}
    if prompt is None:
        with pytest.raises(InputError) as error:
            trl_preference(Fields(row, "f", 1), Path("."))
        wanted = "a response other than the chosen one" if chosen == rejected else "one message of role 'assistant'"
        assert wanted in str(error.value)
        return
    [pair] = trl_preference(Fields(row, "f", 1), Path("."))
    assert (pair.prompt, len(pair.turns), (pair.chosen, pair.rejected)) == (prompt, turns, responses)


def test_pairs_are_read_with_the_images_roots_of_their_samples(tmp_path: Path) -> None:
    samples = {name: Sample(name, ("x.png",), "Why?", "a", image_root=tmp_path / f"of {name}") for name in ("a", "b")}
    rows = [PAIR | {"sample_id": name, "images": ["x.png"]} for name in ("b", "a")]
    write_shards(tmp_path / "pairs", rows)
    read = read_pairs(tmp_path / "pairs", samples)
    assert [(pair.sample_id, pair.image_root) for pair in read] == [(n, tmp_path / f"of {n}") for n in ("b", "a")]
    with pytest.raises(InputError, match="line 1, field 'sample_id': expected a sample of this run"):
        read_pairs(tmp_path / "pairs", {"a": samples["a"]})
