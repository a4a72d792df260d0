"""Judging and training a judge on a simulated device, which counts: one wait for each block of samples, behind the next one."""

import random

import numpy as np
import pytest
import simulated_cuda
import torch
from test_scorer_training import VOCABULARY, raps
from test_scoring import world

from srcfast.config.settings import LoRAConfig, ScorerConfig, TrainingConfig
from srcfast.models.scorer import Scorer, load_scorer
from srcfast.stages import scoring
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.scorer_training import scorer_examples, train_scorer
from srcfast.stages.scoring import scored_rows

pytestmark = pytest.mark.simulated
# Against the CPU: in fp32 another order of sums, in fp16 its rounding through two layers of random weights.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK", 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("mode", "adaptive", "waits_a_block"),
    [
        ("pairwise", None, 1),
        ("independent", None, 1),
        ("pairwise", {"audit": 0.0}, 2),  # the second round's pairs follow from the first one's numbers
        ("pairwise", {"audit": 1.0}, 4),  # and each of two samples is scored once more, by its shorter tournament
    ],
)
def test_judging_waits_for_a_block_s_numbers_alone(scorer_directory, dtype, mode, adaptive, waits_a_block):
    samples, groups = world(5, [6, 7, 6, 7, 6, 7])
    rows = {}
    for device in ("cuda", "cpu"):
        scorer = load_scorer(scorer_directory, dtype=dtype, device=device)
        rounds = (
            None
            if adaptive is None
            else AdaptivePairs(
                ScorerConfig(
                    adaptive_margin=0.05,
                    adaptive_contenders=2,
                    **{f"adaptive_{name}": value for name, value in adaptive.items()},
                )
            )
        )
        with simulated_cuda.recording() as record:
            rows[device] = list(scored_rows(scorer, samples, groups, 4096, mode, adaptive=rounds))
        assert not record.waits and not record.pageable_copies, record.text()
        blocks = 3 if device == "cuda" else 0
        assert sum(record.event_waits.values()) == waits_a_block * blocks, record.text()
    for found, expected in zip(rows["cuda"], rows["cpu"], strict=True):
        assert found["sample_id"] == expected["sample_id"]
        assert np.array(found["raw"]) == pytest.approx(np.array(expected["raw"]), abs=TOLERANCE[dtype])
        assert found["alone"] == pytest.approx(expected["alone"], abs=TOLERANCE[dtype])


def test_a_block_is_read_behind_the_next_one(scorer_directory, monkeypatch):
    samples, groups = world(6, [3, 2, 3, 2, 3, 2])
    order = []
    judge, finish = scoring._score_block, scoring.expand_row
    monkeypatch.setattr(scoring, "_score_block", lambda *args: order.append("queued") or judge(*args))
    monkeypatch.setattr(scoring, "expand_row", lambda *args: order.append("read") or finish(*args))
    assert len(list(scored_rows(load_scorer(scorer_directory, device="cuda"), samples, groups, 4096))) == 6
    assert order == ["queued", "queued", "read", "read", "queued", "read", "read", "read", "read"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4, alpha=8.0)], ids=["whole", "lora"])
def test_a_judge_s_training_waits_for_one_event_a_step(scorer_directory, dtype, lora):
    examples = scorer_examples(raps(6), random.Random(1), VOCABULARY)
    losses = {}
    for device in ("cuda", "cpu"):
        scorer: Scorer = load_scorer(scorer_directory, dtype=dtype, device=device, lora=lora)
        settings = TrainingConfig(
            micro_batch_size=2,
            token_budget=4096,
            learning_rate=0.0001,
            warmup_ratio=0.0,
            gradient_accumulation_steps=1,
            activation_checkpointing=0,
        )
        with simulated_cuda.recording() as record:
            losses[device] = [row["loss"] for row in train_scorer(scorer, examples, settings)]
        assert not record.waits and not record.pageable_copies, record.text()
        assert sum(record.event_waits.values()) == (3 if device == "cuda" else 0), record.text()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=TOLERANCE[dtype])
