"""Stage 3: the R-Scorer judges every sample's candidates against each other, verdict slots only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from srcfast.config.settings import ScorerConfig
from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import write_shards
from srcfast.data.prefixes import share_prefixes
from srcfast.data.records import Candidate, Sample
from srcfast.errors import ConfigError
from srcfast.models.scorer import ALONE, JudgeTree, Scorer, all_pairs, reference_text, slot_hidden
from srcfast.run.chunks import ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.stages.adaptive_pairs import AdaptivePairs, ordered
from srcfast.training.pipelining import behind
from srcfast_kernels import pairwise_verdict
from srcfast_kernels.transfers import fetch, to_device

Mode = Literal["pairwise", "independent"]
BLOCK = 64  # samples whose trees are packed together
CHUNK = 4 * BLOCK  # samples a chunk
Results = Callable[[], list[dict[str, Any]]]  # one a sample; waits for the device


class Progress(Protocol):
    """What `run.progress.track` gives."""

    def advance(self, count: int, tokens: int = 0) -> None: ...


def score_candidates(
    scorer: Scorer,
    samples: Sequence[Sample],
    candidates: Mapping[str, Sequence[Candidate]],
    token_budget: int,
    mode: Mode = "pairwise",
    progress: Progress | None = None,
    output: str | Path | None = None,
    adaptive: AdaptivePairs | None = None,
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
        adaptive: compare in two rounds those candidates alone that may be best or worst; it counts what was judged.
            "independent" has no pairs to choose from.

    Returns:
        The rows of `scored_rows`.

    Raises:
        InputError: a tree doesn't fit into the token budget; the sample is named.
    """
    rows = list(scored_rows(scorer, samples, candidates, token_budget, mode, progress, adaptive))
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
    adaptive: AdaptivePairs | None = None,
) -> Iterator[dict[str, Any]]:
    """`score_candidates` row by row, some samples in memory at a time.

    Yields:
        Rows of plain JSON values, n candidates each: sample_id; candidate_ids; scores [n]; win_probability q
        [n, n]; confidence u [n, n]; raw: p [n, n] of the ordered pairs (1/2 where there is none), or [n] if
        independent; alone: p [n] of each rated on its own; flip_rate: share of unordered pairs whose verdict
        names the same place in both orders; tie_rate: share of the pairs' verdicts that are ties; pairs and
        verdicts: what these rates are shares of. A pair that was not judged has q = 1/2 and u = 0.

    Raises:
        InputError: a tree doesn't fit into the token budget; the sample is named.
    """
    if mode not in ("pairwise", "independent"):
        raise ConfigError(f"scoring.mode: expected pairwise or independent, found {mode!r}")
    scorer.eval()
    judged = ((sample, own) for sample in samples if (own := candidates.get(sample.id)))

    def queued() -> Iterator[Callable[[], tuple[list[dict[str, Any]], int]]]:
        while block := list(islice(judged, BLOCK)):
            yield _score_block(scorer, *zip(*block, strict=True), token_budget, mode, adaptive)

    for rows_and_tokens in behind(queued(), scorer.verdict_values.device):
        rows, tokens = rows_and_tokens()
        yield from rows
        if progress is not None:
            progress.advance(len(rows), tokens=tokens)


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
    adaptive: AdaptivePairs | None,
) -> Callable[[], tuple[list[dict[str, Any]], int]]:
    """Judge some samples, their trees packed together.

    Returns:
        A function that waits for the device, and gives the rows and the number of tokens that were run.
    """
    texts = [list(dict.fromkeys(candidate.text for candidate in own)) for own in candidates]  # distinct, in order
    sizes = [len(distinct) for distinct in texts]
    pairwise, alone = mode == "pairwise", [[(i, ALONE) for i in range(n)] for n in sizes]
    # A lone text has nothing to be compared with.
    judged = [index for index, n in enumerate(sizes) if not pairwise or n >= 2]
    results: Results = partial(_all_lone, len(samples))
    tokens = 0
    if judged and pairwise and adaptive is not None:
        results, tokens = _in_two_rounds(scorer, samples, texts, judged, token_budget, adaptive)
    elif judged:
        pairs = {index: alone[index] + (all_pairs(sizes[index]) if pairwise else []) for index in judged}
        found, tokens = _compare(scorer, samples, texts, pairs, token_budget)
        results = (_pairwise if pairwise else _independent)(scorer, found, sizes)
    return lambda: ([_expand(*parts) for parts in zip(samples, candidates, texts, results(), strict=True)], tokens)


@dataclass(frozen=True)
class Comparisons:
    """Hidden states [M, D] at the verdict slots, and of each the candidates and the sample, [M] int64."""

    slots: Tensor
    first: np.ndarray
    second: np.ndarray
    owner: np.ndarray

    def among(self, kept: np.ndarray) -> Comparisons:
        """Those that are kept, [M] bool."""
        slots = self.slots.index_select(0, to_device(np.flatnonzero(kept), self.slots.device))
        return Comparisons(slots, self.first[kept], self.second[kept], self.owner[kept])

    def with_others(self, others: Comparisons) -> Comparisons:
        """These and then the others."""
        mine, theirs = ((x.first, x.second, x.owner) for x in (self, others))
        indices = (np.concatenate(both) for both in zip(mine, theirs, strict=True))
        return Comparisons(torch.cat([self.slots, others.slots]), *indices)


def _compare(
    scorer: Scorer,
    samples: Sequence[Sample],
    texts: Sequence[Sequence[str]],
    pairs: Mapping[int, Sequence[tuple[int, int]]],
    token_budget: int,
) -> tuple[Comparisons, int]:
    """The pairs of each sample, by its index: the comparisons, and the number of tokens that were run."""
    trees = [_tree(scorer, samples[index], texts[index], own) for index, own in pairs.items()]
    slots, tokens = slot_hidden(scorer, trees, token_budget)  # [M, D]
    first, second = (np.concatenate([getattr(one, name) for one in trees]) for name in ("first", "second"))
    return Comparisons(slots, first, second, np.repeat(list(pairs), [len(one.slots) for one in trees])), tokens


def _tree(scorer: Scorer, sample: Sample, texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> JudgeTree:
    return scorer.judge_tree(sample_reference(sample), texts, pairs, key=sample.id)


def _in_two_rounds(
    scorer: Scorer,
    samples: Sequence[Sample],
    texts: Sequence[Sequence[str]],
    judged: Sequence[int],
    token_budget: int,
    adaptive: AdaptivePairs,
) -> tuple[Results, int]:
    """`_pairwise` over the pairs that `adaptive` asks for, or over all where a sample is audited or small; and the tokens."""
    sizes = [len(distinct) for distinct in texts]
    alone = {index: [(i, ALONE) for i in range(sizes[index])] for index in judged}
    full = {index: alone[index] + all_pairs(sizes[index]) for index in judged}
    short = [index for index in judged if adaptive.is_short(sizes[index])]
    audited = [index for index in short if adaptive.is_audited(samples[index].id)]
    waiting = set(short) - set(audited)
    asked = {index: (alone if index in waiting else full)[index] for index in judged}
    found, tokens = _compare(scorer, samples, texts, asked, token_budget)
    p, _ = fetch(scorer.win_and_verdict(found.slots)).wait().numpy()
    scorer.check_wins(p)
    rated = found.second == ALONE
    chosen = {index: adaptive.pairs(p[rated & (found.owner == index)]) for index in short}
    if waiting:
        second_round = {index: chosen[index] for index in short if index in waiting}
        others, more = _compare(scorer, samples, texts, second_round, token_budget)
        found, tokens = found.with_others(others), tokens + more
    whole = _pairwise(scorer, found, sizes)
    shortened = {
        index: _pairwise(
            scorer, found.among((found.owner == index) & ordered(chosen[index], found.first, found.second)), sizes
        )
        for index in audited
    }

    def cost(index: int, pairs: Sequence[tuple[int, int]]) -> int:
        return share_prefixes(_tree(scorer, samples[index], texts[index], pairs).tree)[0].num_tokens

    def results() -> list[dict[str, Any]]:
        results = whole()
        for index in judged:
            count, all_tokens = sizes[index] * (sizes[index] - 1), cost(index, full[index])
            if index not in chosen:
                adaptive.count(count, count, all_tokens, all_tokens)
                continue
            two_rounds = cost(index, alone[index]) + cost(index, chosen[index])
            adaptive.count(len(chosen[index]), count, two_rounds, all_tokens)
            if index in shortened:
                adaptive.compare(shortened[index]()[index]["scores"], results[index]["scores"])
        return results

    return results, tokens


def _pairwise(scorer: Scorer, found: Comparisons, sizes: Sequence[int]) -> Results:
    """Per sample the scores, q, u, p and rates over its distinct texts; computed at once, waited for when they are asked for."""
    device = found.slots.device
    pair = found.second != ALONE  # [M]
    columns = np.stack([np.flatnonzero(pair), found.first[pair], found.second[pair], found.owner[pair]])
    compared, first, second, owner = to_device(columns, device)  # [pairs] each
    output = pairwise_verdict(
        found.slots.index_select(0, compared),
        scorer.verdict_weight,
        first,
        second,
        max(sizes),
        verdict_values=scorer.verdict_values,
        sample_ids=owner,
        num_samples=len(sizes),
    )
    verdicts = scorer.win_and_verdict(found.slots)  # [2, M]
    parts = (output.scores, output.win_probability, output.confidence, verdicts)
    fetched = fetch(torch.cat([part.double().flatten() for part in parts]))  # one copy to the host

    def results() -> list[dict[str, Any]]:
        numbers = fetched.wait().split([part.numel() for part in parts])
        return _by_sample(
            scorer, found, sizes, *(x.view(part.shape).numpy() for x, part in zip(numbers, parts, strict=True))
        )

    return results


def _by_sample(
    scorer: Scorer,
    found: Comparisons,
    sizes: Sequence[int],
    scores: np.ndarray,
    wins: np.ndarray,
    confidence: np.ndarray,
    verdicts_of_slots: np.ndarray,
) -> list[dict[str, Any]]:
    """`_pairwise` from what the device has computed: scores [S, N], q and u [S, N, N], p and verdict [2, M]."""
    first, second, owner = found.first, found.second, found.owner
    pair = second != ALONE  # [M]
    p, verdict = verdicts_of_slots
    scorer.check_wins(p)
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
        flips = (said - 0.5) * (said.T - 0.5) > 0.0  # False where a pair was not judged
        verdicts = int(mine.sum())
        results.append(
            {
                "scores": scores[sample, :n],
                "win_probability": wins[sample, :n, :n],
                "confidence": confidence[sample, :n, :n],
                "raw": raw,
                "alone": alone,
                "flip_rate": float(flips[np.triu_indices(n, 1)].sum() / (verdicts // 2)),
                "tie_rate": float((verdict[mine] == 0.5).mean()),
                "pairs": verdicts // 2,
                "verdicts": verdicts,
            }
        )
    return results


def _independent(scorer: Scorer, found: Comparisons, sizes: Sequence[int]) -> Results:
    """`_pairwise` for candidates that were each rated on their own; `second` is -1 throughout."""
    fetched = fetch(scorer.win_and_verdict(found.slots))
    return lambda: _rated(scorer, found, sizes, *fetched.wait().numpy())


def _rated(
    scorer: Scorer, found: Comparisons, sizes: Sequence[int], p: np.ndarray, verdict: np.ndarray
) -> list[dict[str, Any]]:
    scorer.check_wins(p)
    first, owner = found.first, found.owner
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


def _all_lone(count: int) -> list[dict[str, Any]]:
    return [_lone() for _ in range(count)]


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


def scores_in_chunks(
    chunks: Chunks,
    scorer: Scorer,
    samples: Sequence[Sample],
    candidates: Callable[[], InOrder[list[Candidate]]],
    settings: ScorerConfig,
    adaptive: AdaptivePairs | None = None,
) -> ChunkFiles:
    """`scored_rows` in the order of the candidates; the parts' counts are `adaptive`'s.

    Args:
        candidates: reads (sample id, its candidates), from the beginning each time. They are read twice: once for what there
            is, once to judge it, a piece at a time.

    Raises:
        InputError: a candidate that can't be read, or a sample's candidates are not one after the other.
    """
    known = {sample.id: sample for sample in samples}
    digest, judged = hashlib.sha256(), []
    for sample_id, own in candidates().rest():
        if sample_id in known:
            judged.append(known[sample_id])
            digest.update(json.dumps([(one.id, one.text) for one in own]).encode())
    chunks.progress.set_total(len(judged))
    groups = candidates().rest()

    def work(piece: Sequence[Sample]) -> ChunkResult:
        counted = None if adaptive is None else replace(adaptive, counts=Counter())
        own = _next_of(groups, {sample.id for sample in piece})
        rows = list(scored_rows(scorer, piece, own, settings.token_budget, settings.mode, chunks.progress, counted))
        return rows, {} if counted is None else counted.counts

    def on_candidates() -> Mapping[str, Any]:
        return {**chunks.depends_on(), "candidates": digest.hexdigest()}

    return run_chunks(replace(chunks, depends_on=on_candidates), judged, CHUNK, work)


def _next_of(groups: Iterator[tuple[str, list[Candidate]]], wanted: set[str]) -> dict[str, list[Candidate]]:
    """The next candidates of these samples, of which none was passed over yet; others' on the way are other ranks' work."""
    found: dict[str, list[Candidate]] = {}
    while len(found) < len(wanted):
        sample_id, own = next(groups)
        if sample_id in wanted:
            found[sample_id] = own
    return found
