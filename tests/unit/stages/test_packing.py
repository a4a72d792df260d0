"""Scores don't move with the batch: whatever is packed together, in whatever order and sizes."""

import numpy as np
import pytest
import torch
from test_scoring import world

from srcfast.data.records import Candidate
from srcfast.errors import InputError
from srcfast.models import scorer as scorer_module
from srcfast.models.scorer import load_scorer
from srcfast.stages import scoring
from srcfast.stages.scoring import score_candidates

# How far a verdict's probability may move, by the type that the model computes in: the last place of its hidden state,
# some times over. The head's product and the softmax are in fp32 in each.
MOVES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def raw_by_sample(rows: list[dict]) -> dict[str, np.ndarray]:
    return {row["sample_id"]: np.array(row["raw"]) for row in rows}


@pytest.mark.parametrize("dtype", MOVES)
def test_scores_are_the_same_whatever_is_packed_together(scorer_directory, monkeypatch, dtype):
    monkeypatch.setattr(scorer_module, "CPU_TOKENS", 0)  # budgets as they are given
    scorer = load_scorer(scorer_directory, dtype=dtype)
    samples, groups = world(21, [4, 2, 5, 3, 6, 2])
    results = []
    for order, budget, block in ((1, 100_000, 64), (-1, 100_000, 64), (1, 1500, 64), (-1, 1500, 2), (1, 1500, 1)):
        monkeypatch.setattr(scoring, "BLOCK", block)
        results.append(raw_by_sample(score_candidates(scorer, samples[::order], groups, budget)))
    moved = max(np.abs(other[s.id] - results[0][s.id]).max() for other in results[1:] for s in samples)
    assert moved < MOVES[dtype]


def test_half_precision_stays_near_fp32_and_float16_nearer_than_bfloat16(scorer_directory):
    samples, groups = world(22, [5, 4])
    exact, *others = [
        raw_by_sample(score_candidates(load_scorer(scorer_directory, dtype=dtype), samples, groups, 100_000))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    in_half, in_bfloat = (np.mean([np.abs(other[s.id] - exact[s.id]).mean() for s in samples]) for other in others)
    assert 0.0 < 2.0 * in_half < in_bfloat < 5e-2  # three more bits: an eighth, less what chance makes of it


def test_candidates_that_begin_alike_are_judged_as_if_each_were_alone(scorer_directory, monkeypatch):
    scorer = load_scorer(scorer_directory)
    samples, _ = world(23, [1])
    begun = "There is a red circle . So it is red . "
    texts = ["", "red", "blue", "red blue", f"{begun}red", f"{begun}blue and green", f"{begun}blue and gold"]
    groups = {"s0": [Candidate(f"s0/{k}", "s0", text, "", "", 0.0) for k, text in enumerate(texts)]}
    run: list[int] = []

    class Progress:
        def advance(self, count, tokens=0):
            run.append(tokens)

    results = []
    for share in (scorer_module.share_prefixes, lambda tree: (tree, list(range(len(tree.segments))))):
        monkeypatch.setattr(scorer_module, "share_prefixes", share)
        (row,) = score_candidates(scorer, samples, groups, 100_000, progress=Progress())
        results.append(row)
    for name in ("raw", "alone", "win_probability"):
        assert np.array(results[0][name]) == pytest.approx(np.array(results[1][name]), abs=1e-5)  # fp32
    assert run[0] < 0.75 * run[1]


def test_numbers_that_overflow_are_refused_with_the_type_to_choose(scorer_directory):
    scorer = load_scorer(scorer_directory, dtype=torch.float16)
    with torch.no_grad():
        scorer.text_model.decoder.layers[0].mlp.down_proj.weight.fill_(6e4)
    samples, groups = world(24, [3])
    with pytest.raises(InputError, match=r"float16.*scorer\.dtype"):
        score_candidates(scorer, samples, groups, 100_000)
