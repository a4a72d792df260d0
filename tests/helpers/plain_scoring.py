"""The R-Scorer's rows in plain Python: each comparison is run as a text of its own, each formula is written out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.models.scorer import Scorer

VALUES = {"choice": (1.0, 0.5, 0.0), "graded": (1.0, 0.75, 0.5, 0.25, 0.0)}


@torch.no_grad()
def plain_shares(scorer: Scorer, reference: str, first: str, second: str | None) -> np.ndarray:
    """The probability of each verdict on the first against the second, or on the first alone."""
    texts = (reference, f"First: {first}\n", f"Second: {'none' if second is None else second}\nBetter:")
    tokenizer = scorer.text_model.tokenizer
    ids = [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64) for text in texts]
    tokens = np.concatenate([scorer.opening, *ids, scorer.closing])
    hidden = scorer.text_model(Forest.of([Tree((Segment(tokens),))]))[-1].double()
    weight = scorer.text_model.decoder.head_weight.double()
    logits = [float(weight[token] @ hidden) for token in scorer.verdict_token_ids.tolist()]
    shares = np.exp(np.array(logits) - max(logits))
    return shares / shares.sum()


def plain_verdict(scorer: Scorer, reference: str, first: str, second: str | None) -> tuple[float, float]:
    """p of the first against the second, or of the first alone, and the value of the likeliest verdict."""
    shares, values = plain_shares(scorer, reference, first, second), VALUES[scorer.verdict_form]
    return float(shares @ np.array(values)), values[int(np.argmax(shares))]


def contenders(ratings: Sequence[float], margin: float, count: int) -> list[int]:
    """The candidates that may be the best or the worst: within the margin of the highest or lowest, the nearest few."""
    order = sorted(range(len(ratings)), key=lambda i: (-ratings[i], i))
    best = [i for i in order if ratings[i] >= max(ratings) - margin][:count]
    worst = [i for i in reversed(order) if ratings[i] <= min(ratings) + margin][:count]
    return sorted({*best, *worst})


def _tournament(
    scorer: Scorer, reference: str, texts: Sequence[str], compared: Sequence[int]
) -> tuple[
    dict[tuple[int, int], tuple[float, float]], list[list[float]], list[list[float]], list[list[float]], list[float]
]:
    """Verdicts on the ordered pairs of some of the texts; q, p and u of all pairs; scores."""
    n = len(texts)
    met = {(i, j): plain_verdict(scorer, reference, texts[i], texts[j]) for i in compared for j in compared if i != j}
    q = [[0.5] * n for _ in range(n)]
    u = [[0.0] * n for _ in range(n)]
    raw = [[0.5] * n for _ in range(n)]
    for (i, j), (p, _) in met.items():
        back = met[j, i][0]
        raw[i][j] = p
        q[i][j] = (p + 1 - back) / 2
        u[i][j] = abs(2 * q[i][j] - 1) * (1 - abs(p + back - 1))
    scores = [sum(a * b for a, b in zip(u[i], q[i], strict=True)) / sum(u[i]) if sum(u[i]) else 0.5 for i in range(n)]
    return met, q, raw, u, scores


def plain_row(
    scorer: Scorer, sample_id: str, reference: str, texts: Sequence[str], mode: str, adaptive: Any = None
) -> dict[str, Any]:
    """The row of a sample's candidates; `adaptive` has margin, contenders, confidence and audit, None compares all pairs."""
    distinct = list(dict.fromkeys(texts))
    index = [distinct.index(text) for text in texts]
    n = len(distinct)
    single = n == 1 and mode == "pairwise"
    rated = [plain_verdict(scorer, reference, text, None) for text in distinct]
    alone = [0.5 if single else p for p, _ in rated]
    if mode == "independent":
        q = [[0.5 if i == j else (1 + alone[i] - alone[j]) / 2 for j in range(n)] for i in range(n)]
        u = [[abs(alone[i] - alone[j]) for j in range(n)] for i in range(n)]
        ties = [verdict == 0.5 for _, verdict in rated]
        scores, raw, flips, pairs, verdicts = alone, alone, 0.0, 0, n
    else:
        compared: Sequence[int] = range(n)
        if adaptive is not None and n > 2 * adaptive["contenders"]:
            audited = random.Random(f"audit/{sample_id}").random() < adaptive["audit"]
            compared = range(n) if audited else contenders(alone, adaptive["margin"], adaptive["contenders"])
            _, _, _, u, scores = _tournament(scorer, reference, distinct, compared)
            first, second = sorted(compared, key=lambda i: -scores[i])[:2]
            if u[first][second] < adaptive["confidence"] and not audited:
                compared = contenders(alone, 1.0, 2 * adaptive["contenders"])
        met, q, raw, u, scores = _tournament(scorer, reference, distinct, compared)
        unordered = [(i, j) for i, j in met if i < j]
        same_place = [(met[i, j][1] - 0.5) * (met[j, i][1] - 0.5) > 0 for i, j in unordered]
        ties = [verdict == 0.5 for _, verdict in met.values()]
        flips, pairs, verdicts = float(np.mean(same_place or [0.0])), len(unordered), len(met)

    def spread(matrix: list[list[float]]) -> list[list[float]]:
        return [[matrix[i][j] for j in index] for i in index]

    return {
        "sample_id": sample_id,
        "scores": [scores[i] for i in index],
        "win_probability": spread(q),
        "confidence": spread(u),
        "raw": [raw[i] for i in index] if mode == "independent" else spread(raw),
        "alone": [alone[i] for i in index],
        "flip_rate": flips,
        "tie_rate": float(np.mean(ties or [0.0])),
        "pairs": pairs,
        "verdicts": verdicts,
    }
