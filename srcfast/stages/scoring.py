"""Stage 3: the R-Scorer judges every sample's candidates against each other, verdict slots only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import write_shards
from srcfast.data.records import Candidate, Sample
from srcfast.errors import ConfigError, InputError
from srcfast.models.scorer import ALONE, JudgeTree, Scorer, all_pairs, reference_text, slot_hidden
from srcfast_kernels import pairwise_verdict

Mode = Literal["pairwise", "independent"]
BLOCK = 64  # samples whose trees are packed together


class Progress(Protocol):
    """What `runtime.telemetry.track` gives."""

    def advance(self, count: int, tokens: int = 0) -> None: ...


def score_candidates(
    scorer: Scorer,
    samples: Sequence[Sample],
    candidates: Mapping[str, Sequence[Candidate]],
    token_budget: int,
    mode: Mode = "pairwise",
    progress: Progress | None = None,
    output: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Score each sample's candidates; candidates of the same text are judged once and share the result.

    Args:
        scorer: the judge.
        samples: in the order of the rows that come back; a sample without candidates gets no row.
        candidates: sample id -> its candidates.
        token_budget: most tokens in one forward. The scores don't depend on it.
        mode: "pairwise" over all ordered pairs; "independent": each candidate on its own with S_i = p_i,
            q_ij = (1 + S_i - S_j) / 2 and u_ij = |S_i - S_j|, so that curation can treat both alike.
        progress: told of samples done and tokens run.
        output: directory for the rows in numbered JSONL shards.

    Returns:
        The rows of `scored_rows`.

    Raises:
        InputError: a tree doesn't fit into the token budget; the sample is named.
    """
    rows = list(scored_rows(scorer, samples, candidates, token_budget, mode, progress))
    if output is not None:
        write_shards(output, rows)
    return rows


def scored_rows(
    scorer: Scorer,
    samples: Iterable[Sample],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    token_budget: int,
    mode: Mode = "pairwise",
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """`score_candidates` row by row, some samples in memory at a time.

    Yields:
        Rows of plain JSON values, n candidates each: sample_id; candidate_ids; scores [n]; win_probability q
        [n, n]; confidence u [n, n]; raw: p [n, n] of the ordered pairs (1/2 where there is none), or [n] if
        independent; alone: p [n] of each rated on its own; flip_rate: share of unordered pairs whose verdict
        names the same place in both orders; tie_rate: share of the pairs' verdicts that are ties; pairs and
        verdicts: what these rates are shares of.

    Raises:
        InputError: a tree doesn't fit into the token budget; the sample is named.
    """
    if mode not in ("pairwise", "independent"):
        raise ConfigError(f"scoring.mode: expected pairwise or independent, found {mode!r}")
    scorer.eval()
    judged = ((sample, own) for sample in samples if (own := candidates.get(sample.id)))
    while block := list(islice(judged, BLOCK)):
        rows, tokens = _score_block(scorer, *zip(*block, strict=True), token_budget, mode)
        yield from rows
        if progress is not None:
            progress.advance(len(block), tokens=tokens)


def sample_reference(sample: Sample) -> str:
    """The judge's view of a sample: question and reference."""
    return reference_text(sample.question, sample.answer, sample.facts, sample.rationale)


@torch.no_grad()
def _score_block(
    scorer: Scorer,
    samples: Sequence[Sample],
    candidates: Sequence[Sequence[Candidate]],
    token_budget: int,
    mode: Mode,
) -> tuple[list[dict[str, Any]], int]:
    """Rows of some samples, their trees packed together, and the number of tokens that were run."""
    texts = [list(dict.fromkeys(candidate.text for candidate in own)) for own in candidates]  # distinct, in order
    trees: list[JudgeTree] = []
    owners: list[int] = []  # the sample of each tree
    for index, (sample, distinct) in enumerate(zip(samples, texts, strict=True)):
        pairs = [(i, ALONE) for i in range(len(distinct))]
        if mode == "pairwise":
            pairs += all_pairs(len(distinct))
        if mode == "independent" or len(distinct) >= 2:  # a lone text has nothing to be compared with
            trees.append(scorer.judge_tree(sample_reference(sample), distinct, pairs, key=sample.id))
            owners.append(index)
    results, tokens = [_lone() for _ in samples], 0
    if trees:
        slots, tokens = slot_hidden(scorer, trees, token_budget)  # [M, D]
        owner = np.repeat(owners, [len(one.slots) for one in trees])  # [M]
        first = np.concatenate([one.first for one in trees])
        second = np.concatenate([one.second for one in trees])
        judge = _independent if mode == "independent" else _pairwise
        results = judge(scorer, slots, first, second, owner, [len(distinct) for distinct in texts])
    rows = [_expand(*parts) for parts in zip(samples, candidates, texts, results, strict=True)]
    return rows, tokens


def _pairwise(
    scorer: Scorer,
    slots: Tensor,
    first: np.ndarray,
    second: np.ndarray,
    owner: np.ndarray,
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """Per sample the scores, q, u, p and rates over its distinct texts; slots [M, D], indices [M] each."""
    device = slots.device
    pair = second != ALONE  # [M]
    output = pairwise_verdict(
        slots[torch.from_numpy(pair).to(device)],
        scorer.verdict_weight,
        torch.from_numpy(first[pair]).to(device),
        torch.from_numpy(second[pair]).to(device),
        max(sizes),
        verdict_values=scorer.verdict_values,
        sample_ids=torch.from_numpy(owner[pair]).to(device),
        num_samples=len(sizes),
    )
    scores, wins, confidence = (
        x.double().cpu().numpy() for x in (output.scores, output.win_probability, output.confidence)
    )
    p, verdict = scorer.win_and_verdict(slots)
    results = []
    for sample, n in enumerate(sizes):
        mine, rated = (owner == sample) & pair, (owner == sample) & ~pair
        if not mine.any():
            results.append(_lone())
            continue
        alone = np.full(n, 0.5)
        alone[first[rated]] = p[rated]
        raw, said = np.full((2, n, n), 0.5)
        raw[first[mine], second[mine]] = p[mine]
        said[first[mine], second[mine]] = verdict[mine]
        flips = (said - 0.5) * (said.T - 0.5) > 0.0
        results.append(
            {
                "scores": scores[sample, :n],
                "win_probability": wins[sample, :n, :n],
                "confidence": confidence[sample, :n, :n],
                "raw": raw,
                "alone": alone,
                "flip_rate": float(flips[np.triu_indices(n, 1)].mean()),
                "tie_rate": float((verdict[mine] == 0.5).mean()),
                "pairs": n * (n - 1) // 2,
                "verdicts": n * (n - 1),
            }
        )
    return results


def _independent(
    scorer: Scorer,
    slots: Tensor,
    first: np.ndarray,
    second: np.ndarray,
    owner: np.ndarray,
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """`_pairwise` for candidates that were each rated on their own; `second` is -1 throughout."""
    p, verdict = scorer.win_and_verdict(slots)
    results = []
    for sample in range(len(sizes)):
        mine = owner == sample
        scores = p[mine][np.argsort(first[mine])]
        margin = scores[:, None] - scores[None, :]
        results.append(
            {
                "scores": scores,
                "win_probability": 0.5 * (1.0 + margin),
                "confidence": np.abs(margin),
                "raw": scores,
                "alone": scores,
                "flip_rate": 0.0,
                "tie_rate": float((verdict[mine] == 0.5).mean()),
                "pairs": 0,
                "verdicts": len(scores),
            }
        )
    return results


def _lone() -> dict[str, Any]:
    """The result where all candidates say the same: nothing to compare."""
    half, nought = np.full((1, 1), 0.5), np.zeros((1, 1))
    rates = {"flip_rate": 0.0, "tie_rate": 0.0, "pairs": 0, "verdicts": 0}
    return {"scores": half[0], "win_probability": half, "confidence": nought, "raw": half, "alone": half[0], **rates}


def _expand(
    sample: Sample, candidates: Sequence[Candidate], distinct: Sequence[str], result: dict[str, Any]
) -> dict[str, Any]:
    """A row over all candidates from one over distinct texts; equal texts are an even match of no weight."""
    place = {text: index for index, text in enumerate(distinct)}
    of = np.array([place[candidate.text] for candidate in candidates])
    grid = np.ix_(of, of)
    raw = result["raw"]
    return {
        "sample_id": sample.id,
        "candidate_ids": [candidate.id for candidate in candidates],
        "scores": result["scores"][of].tolist(),
        "win_probability": _even_diagonal(result["win_probability"], 0.5)[grid].tolist(),
        "confidence": _even_diagonal(result["confidence"], 0.0)[grid].tolist(),
        "raw": (raw[of] if raw.ndim == 1 else raw[grid]).tolist(),
        "alone": result["alone"][of].tolist(),
        **{name: result[name] for name in ("flip_rate", "tie_rate", "pairs", "verdicts")},
    }


def _even_diagonal(matrix: np.ndarray, value: float) -> np.ndarray:
    filled = matrix.copy()
    np.fill_diagonal(filled, value)
    return filled


def group_by_sample(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates as the shards hold them, one after the other, by their sample's id."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.sample_id, []).append(candidate)
    return groups


def samples_in_order(candidates: Iterable[Candidate]) -> InOrder[list[Candidate]]:
    """`group_by_sample` while they are read: for samples that are asked for in the shards' order.

    Raises (when it comes to it):
        InputError: a sample's candidates are not one after the other.
    """
    return InOrder(_groups(candidates))


def _groups(candidates: Iterable[Candidate]) -> Iterator[tuple[str, list[Candidate]]]:
    seen: set[str] = set()
    for sample_id, own in groupby(candidates, key=lambda one: one.sample_id):
        if sample_id in seen:
            raise InputError(
                sample_id=sample_id,
                field="sample_id",
                expected="a sample's candidates one after the other",
                found="some of them behind another sample's",
                mend="sort the candidates by sample",
            )
        seen.add(sample_id)
        yield sample_id, list(own)
