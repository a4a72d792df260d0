"""The R-Scorer on the simulated device: the CPU's verdicts and scores, of each mode."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from srcfast.config.settings import ScorerConfig
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import Candidate, Sample
from srcfast.models.scorer import load_scorer
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.scoring import score_candidates
from srcfast.world.samples import world_samples

pytestmark = pytest.mark.simulated


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return world_samples("train", 6, 5, image_dir=tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def candidates(samples: list[Sample]) -> dict[str, list[Candidate]]:
    """Of each sample its own true response and those of others; of one sample a single one, of another two alike."""
    texts = [response for _, response in build_raps(samples)[0]]
    counts = (4, 3, 1, 5, 2, 4)
    chosen = [[texts[(i + k) % len(texts)] for k in range(count)] for i, count in enumerate(counts)]
    chosen[4][1] = chosen[4][0]
    return {
        sample.id: [Candidate(f"{sample.id}#{k}", sample.id, text, "", "", 0.0, ()) for k, text in enumerate(own)]
        for sample, own in zip(samples, chosen, strict=True)
    }


def judged(
    device: str, dtype: torch.dtype, samples: Any, candidates: Any, mode: Any, adaptive: bool
) -> list[dict[str, Any]]:
    scorer = load_scorer("embedded", dtype=dtype, device=device)
    rounds = AdaptivePairs(ScorerConfig()) if adaptive else None
    return score_candidates(scorer, samples, candidates, token_budget=1200, mode=mode, adaptive=rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "adaptive"), [("pairwise", False), ("pairwise", True), ("independent", False)])
def test_verdicts_and_scores_are_the_cpus_and_no_memory_stays(
    mode: str, adaptive: bool, dtype: torch.dtype, samples: list[Sample], candidates: dict[str, list[Candidate]]
) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        ours = judged("cuda", dtype, samples, candidates, mode, adaptive)
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
    theirs = judged("cpu", dtype, samples, candidates, mode, adaptive)
    # A verdict's logits are rounded once or twice in 16 bits, and added up in another order in fp32; a win's probability moves
    # by a quarter of that at most. Confidence and score are products and quotients of up to four of these.
    bound = (64 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
    assert [row["sample_id"] for row in ours] == [row["sample_id"] for row in theirs] == [one.id for one in samples]
    for own, other in zip(ours, theirs, strict=True):
        for name, allowed in (
            ("raw", bound),
            ("win_probability", bound),
            ("confidence", 4 * bound),
            ("scores", 4 * bound),
        ):
            np.testing.assert_allclose(own[name], other[name], rtol=0, atol=allowed, err_msg=name)
        for name in ("candidate_ids", "pairs", "verdicts", "flip_rate", "tie_rate"):  # no verdict is near to another
            assert own[name] == other[name], name
    spread = np.ptp(np.concatenate([row["scores"] for row in theirs]))
    assert spread > 0.2  # the judge tells them apart
