"""Stage 3: the R-Scorer compares every sample's candidates with each other, at the verdict slots alone.

A block of samples is one batch: their trees (`JudgeTree`) are packed into forests, the hidden states at the verdict slots
go through `srcfast_kernels.pairwise_verdict`, and the results, over distinct texts, become one row a sample. While the
device runs a block the host builds the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from srcfast.data.records import Candidate, ReferenceQuality, Sample
from srcfast.errors import ConfigError
from srcfast.models.head import check_numbers
from srcfast.models.scorer import ALONE, JudgeTree, Scorer, all_pairs, reference_text, slot_hidden
from srcfast.run.chunks import ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.stages.adaptive_pairs import AdaptivePairs, ordered
from srcfast.training.pipelining import behind
from srcfast_kernels import pairwise_verdict
from srcfast_kernels.transfers import fetch, to_device

Mode = Literal["pairwise", "independent"]
BLOCK = 64  # samples whose trees are packed together
CHUNK = 4 * BLOCK  # samples a chunk
Results = Callable[[], list[dict[str, Any]]]  # waits for the device and returns one result a sample


class Progress(Protocol):
    """Counts samples and tokens as they are done: `run.progress.StageProgress`."""

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
    """Score each sample's candidates; candidates of the same text are scored once and share the result.

    Args:
        scorer: the R-Scorer.
        samples: in the order of the rows that come back; a sample without candidates gets no row.
        candidates: sample id -> its candidates.
        token_budget: maximum of tokens in one forward pass. The scores don't depend on it.
        mode: "pairwise" over all ordered pairs; "independent": each candidate alone with S_i = p_i,
            q_ij = (1 + S_i - S_j) / 2 and u_ij = |S_i - S_j|, so that curation can treat both alike.
        progress: advances by samples done and tokens run.
        output: directory for the rows in numbered JSONL shards.
        adaptive: compare in two rounds only those candidates that may be best or worst; it counts the comparisons.
            "independent" has no pairs to choose from.

    Returns:
        The rows of `scored_rows`.

    Raises:
        InputError: a single comparison doesn't fit into the token budget; the sample is named.
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
    """Score candidates as `score_candidates` does, row by row, at most two blocks of samples in memory.

    Yields:
        Rows of plain JSON values, n candidates each: sample_id; candidate_ids; scores [n]; win_probability q
        [n, n]; confidence u [n, n]; raw: p [n, n] of the ordered pairs (1/2 where there is none), or [n] if
        independent; alone: p [n] of each candidate rated alone; flip_rate: share of unordered pairs whose verdict
        names the same position in both orders; tie_rate: share of the pairs' verdicts that are ties; pairs and
        verdicts: what these rates are shares of. A pair that was not compared has q = 1/2 and u = 0.

    Raises:
        InputError: a single comparison doesn't fit into the token budget; the sample is named.
    """
    if mode not in ("pairwise", "independent"):
        raise ConfigError(f"scoring.mode: expected pairwise or independent, found {mode!r}")
    scorer.eval()
    groups = ((sample, group) for sample in samples if (group := candidates.get(sample.id)))

    def queued() -> Iterator[Callable[[], tuple[list[dict[str, Any]], int]]]:
        while block := list(islice(groups, BLOCK)):
            yield _score_block(scorer, *zip(*block, strict=True), token_budget, mode, adaptive)

    for rows_and_tokens in behind(queued(), scorer.verdict_values.device):
        rows, tokens = rows_and_tokens()
        yield from rows
        if progress is not None:
            progress.advance(len(rows), tokens=tokens)


def sample_reference(sample: Sample, quality: ReferenceQuality = "complete") -> str:
    """Return what the R-Scorer reads of a sample: question and reference, and the quality that the prompt states."""
    return reference_text(sample.question, sample.answer, sample.facts, sample.rationale, quality)


@torch.no_grad()
def _score_block(
    scorer: Scorer,
    samples: Sequence[Sample],
    candidates: Sequence[Sequence[Candidate]],
    token_budget: int,
    mode: Mode,
    adaptive: AdaptivePairs | None,
) -> Callable[[], tuple[list[dict[str, Any]], int]]:
    """Score a block of samples, their trees packed together.

    Returns:
        A function that waits for the device, and returns the rows and the number of tokens that were run.
    """
    texts = [list(dict.fromkeys(candidate.text for candidate in group)) for group in candidates]  # distinct, in order
    sizes = [len(distinct) for distinct in texts]
    pairwise = mode == "pairwise"
    pairs = {index: pairs for index, n in enumerate(sizes) if (pairs := pairs_of(n, mode))}
    results: Results | None = None
    tokens = 0
    if pairs and pairwise and adaptive is not None:
        results, tokens = _in_rounds(scorer, samples, texts, _logprobs(candidates), pairs, token_budget, adaptive)
    elif pairs:
        comparisons, tokens = _compare(scorer, samples, texts, pairs, token_budget)
        results = (_pairwise if pairwise else _independent)(scorer, comparisons, sizes)

    def rows_and_tokens() -> tuple[list[dict[str, Any]], int]:
        of_samples = [_single() for _ in samples] if results is None else results()
        return [expand_row(*row) for row in zip(samples, candidates, texts, of_samples, strict=True)], tokens

    return rows_and_tokens


def pairs_of(count: int, mode: Mode) -> list[tuple[int, int]]:
    """Return the ordered pairs that score `count` texts: each alone and, if pairwise, each with each other.

    To rate a text alone takes a few tokens more in the same tree. A single text has nothing to be compared with: no pairs.
    """
    alone = [(index, ALONE) for index in range(count)]
    return alone if mode == "independent" else alone + all_pairs(count) if count > 1 else []


@dataclass(frozen=True)
class Comparisons:
    """The M comparisons of a block of samples.

    Attributes:
        slots: hidden states at the verdict slots, [M, D].
        first, second: indices of the candidates in the sample's distinct texts, [M] int64; second -1: first alone.
        sample: index of the sample in the block, [M] int64.
        keys: ids of the samples, [M].
    """

    slots: Tensor
    first: np.ndarray
    second: np.ndarray
    sample: np.ndarray
    keys: np.ndarray

    def select(self, mask: np.ndarray) -> Comparisons:
        """Return those that the mask [M] is true for."""
        slots = self.slots.index_select(0, to_device(np.flatnonzero(mask), self.slots.device))
        return Comparisons(slots, self.first[mask], self.second[mask], self.sample[mask], self.keys[mask])

    def concatenate(self, others: Comparisons) -> Comparisons:
        """Return these and then the others."""
        return Comparisons(
            torch.cat([self.slots, others.slots]),
            np.concatenate([self.first, others.first]),
            np.concatenate([self.second, others.second]),
            np.concatenate([self.sample, others.sample]),
            np.concatenate([self.keys, others.keys]),
        )


def _compare(
    scorer: Scorer,
    samples: Sequence[Sample],
    texts: Sequence[Sequence[str]],
    pairs: Mapping[int, Sequence[tuple[int, int]]],
    token_budget: int,
) -> tuple[Comparisons, int]:
    """Compare the ordered pairs of each sample, given by its index; return the comparisons and the number of tokens run."""
    of_sample = {
        index: _trees(scorer, samples[index], texts[index], sorted(of_index), token_budget)
        for index, of_index in pairs.items()
    }
    trees = [tree for group in of_sample.values() for tree in group]
    slots, tokens = slot_hidden(scorer, trees, token_budget)  # [M, D]
    first = np.concatenate([tree.first for tree in trees])
    second = np.concatenate([tree.second for tree in trees])
    counts = [sum(len(tree.slots) for tree in group) for group in of_sample.values()]
    sample = np.repeat(list(pairs), counts)
    return Comparisons(slots, first, second, sample, np.array([one.id for one in samples])[sample]), tokens


def _trees(
    scorer: Scorer, sample: Sample, texts: Sequence[str], pairs: Sequence[tuple[int, int]], token_budget: int
) -> list[JudgeTree]:
    """Tokenise one sample's comparisons, in ascending order, as one tree; as several where one is larger than the budget."""
    tree = _tree(scorer, sample, texts, pairs)
    fits = tree.tree.num_tokens <= token_budget or share_prefixes(tree.tree)[0].num_tokens <= token_budget
    if fits or len(pairs) == 1:
        return [tree]
    halves = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    return [tree for half in halves for tree in _trees(scorer, sample, texts, half, token_budget)]


def _tree(scorer: Scorer, sample: Sample, texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> JudgeTree:
    """Tokenise one sample's comparisons."""
    return scorer.judge_tree(sample_reference(sample, scorer.quality), texts, pairs, key=sample.id)


def _logprobs(candidates: Sequence[Sequence[Candidate]]) -> list[np.ndarray]:
    """Return the log-probabilities of each sample's distinct texts, [n] each, of each text's first candidate."""
    logprobs = []
    for group in candidates:
        by_text: dict[str, float] = {}
        for candidate in group:
            by_text.setdefault(candidate.text, candidate.logprob)
        logprobs.append(np.array(list(by_text.values())))
    return logprobs


def _in_rounds(
    scorer: Scorer,
    samples: Sequence[Sample],
    texts: Sequence[Sequence[str]],
    logprobs: Sequence[np.ndarray],
    full: Mapping[int, Sequence[tuple[int, int]]],
    token_budget: int,
    adaptive: AdaptivePairs,
) -> tuple[Results, int]:
    """Run `_pairwise` over the pairs that `adaptive` chooses, over all, `full`, where a sample is audited or small; count tokens.

    Round 1 rates each candidate alone; audited and small samples have their whole tournament in it. Round 2 compares the
    contenders of the other samples, and round 3 twice as many where `adaptive` finds the best uncertain.
    """
    sizes = [len(distinct) for distinct in texts]
    alone = {index: pairs_of(sizes[index], "independent") for index in full}
    short = [index for index in full if adaptive.is_short(sizes[index])]
    audited = [index for index in short if adaptive.is_audited(samples[index].id)]
    second_round = set(short) - set(audited)
    first_pairs = {index: (alone if index in second_round else full)[index] for index in full}
    comparisons, tokens = _compare(scorer, samples, texts, first_pairs, token_budget)
    # The host waits here: which pairs come next depends on the ratings.
    p, _ = fetch(scorer.win_and_verdict(comparisons.slots)).wait().numpy()  # [M]
    check_numbers(scorer.text_model, p, comparisons.keys.tolist(), "verdicts")
    rated = comparisons.second == ALONE  # [M]
    ratings = {index: p[rated & (comparisons.sample == index)] for index in short}
    chosen = {index: adaptive.pairs(ratings[index], logprobs=logprobs[index]) for index in short}
    rounds = {index: [alone[index], chosen[index]] for index in short}

    def compare_more(pairs: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        nonlocal comparisons, tokens
        if pairs := {index: of_sample for index, of_sample in pairs.items() if index in second_round}:
            others, more_tokens = _compare(scorer, samples, texts, pairs, token_budget)
            comparisons, tokens = comparisons.concatenate(others), tokens + more_tokens

    compare_more(chosen)
    if adaptive.settings.adaptive_confidence and short:
        so_far = _pairwise(scorer, _of_pairs(comparisons, chosen), sizes)()  # the host waits here, too
        for index in short:
            if adaptive.is_uncertain(so_far[index]["scores"], so_far[index]["confidence"], chosen[index]):
                wider = adaptive.pairs(ratings[index], wider=True, logprobs=logprobs[index])
                rounds[index].append([pair for pair in wider if pair not in chosen[index]])
                chosen[index] = wider
        adaptive.counts["widened"] += sum(len(of_sample) > 2 for of_sample in rounds.values())
        compare_more({index: of_sample[2] for index, of_sample in rounds.items() if len(of_sample) > 2})
    wait = _pairwise(scorer, comparisons, sizes)
    # What the short way would have said of the audited samples, from the comparisons that are there anyway.
    shortened: dict[int, Results] = {}
    for index in audited:
        shortened[index] = _pairwise(scorer, _of_pairs(comparisons, {index: chosen[index]}), sizes)

    def tokens_of(index: int, pairs: Sequence[tuple[int, int]]) -> int:
        return share_prefixes(_tree(scorer, samples[index], texts[index], pairs).tree)[0].num_tokens

    def results() -> list[dict[str, Any]]:
        results = wait()
        for index in full:
            num_pairs, all_tokens = sizes[index] * (sizes[index] - 1), tokens_of(index, full[index])
            if index not in chosen:
                adaptive.count(num_pairs, num_pairs, all_tokens, all_tokens)
                continue
            in_rounds = sum(tokens_of(index, pairs) for pairs in rounds[index])
            adaptive.count(len(chosen[index]), num_pairs, in_rounds, all_tokens)
            if index in shortened:
                adaptive.compare(shortened[index]()[index]["scores"], results[index]["scores"])
        return results

    return results, tokens


def _of_pairs(comparisons: Comparisons, pairs: Mapping[int, Sequence[tuple[int, int]]]) -> Comparisons:
    """Return the comparisons that are among the pairs of their sample, given by its index."""
    mask = np.zeros(len(comparisons.sample), dtype=bool)
    for index, of_sample in pairs.items():
        mask |= (comparisons.sample == index) & ordered(of_sample, comparisons.first, comparisons.second)
    return comparisons.select(mask)


def _pairwise(scorer: Scorer, comparisons: Comparisons, sizes: Sequence[int]) -> Results:
    """Compute per sample the scores, q, u, p and rates over its distinct texts, without waiting; the result waits.

    The scores' formulas are those of `srcfast_kernels.pairwise_verdict`.
    """
    device = comparisons.slots.device
    pair = comparisons.second != ALONE  # [M]
    columns = [comparisons.first[pair], comparisons.second[pair], comparisons.sample[pair]]  # [pairs] each
    compared, first, second, sample = to_device(np.stack([np.flatnonzero(pair), *columns]), device)  # [pairs] each
    head = scorer.verdict_head
    output = pairwise_verdict(
        comparisons.slots.index_select(0, compared),
        head.weight,
        first,
        second,
        max(sizes),
        verdict_values=scorer.verdict_values,
        sample_ids=sample,
        num_samples=len(sizes),
        **head.options,
    )
    verdicts = scorer.win_and_verdict(comparisons.slots)  # [2, M]
    tensors = (output.scores, output.win_probability, output.confidence, verdicts)
    fetched = fetch(torch.cat([tensor.double().flatten() for tensor in tensors]))  # one copy to the host

    def results() -> list[dict[str, Any]]:
        numbers = fetched.wait().split([tensor.numel() for tensor in tensors])
        arrays = [x.view(tensor.shape).numpy() for x, tensor in zip(numbers, tensors, strict=True)]
        return _by_sample(scorer, comparisons, sizes, *arrays)

    return results


def _by_sample(
    scorer: Scorer,
    comparisons: Comparisons,
    sizes: Sequence[int],
    scores: np.ndarray,
    wins: np.ndarray,
    confidence: np.ndarray,
    verdicts_of_slots: np.ndarray,
) -> list[dict[str, Any]]:
    """Split what the device has computed by sample: scores [S, N], q and u [S, N, N], p and verdict [2, M]."""
    first, second = comparisons.first, comparisons.second
    pair = second != ALONE  # [M]
    p, verdict = verdicts_of_slots  # [M] each
    check_numbers(scorer.text_model, p, comparisons.keys.tolist(), "verdicts")
    results = []
    for sample, n in enumerate(sizes):
        in_sample = comparisons.sample == sample  # [M]
        compared, rated = in_sample & pair, in_sample & ~pair  # [M] each
        if not compared.any():
            results.append(_single())
            continue
        alone = np.full(n, 0.5)
        alone[first[rated]] = p[rated]
        raw = np.full((n, n), 0.5)
        raw[first[compared], second[compared]] = p[compared]
        said = np.full((n, n), 0.5)  # the verdict of each ordered pair: 1 first, 0 second, 1/2 a tie
        said[first[compared], second[compared]] = verdict[compared]
        # Both orders name the same position, not the same candidate. False where a pair was not compared.
        flips = (said - 0.5) * (said.T - 0.5) > 0.0
        verdicts = int(compared.sum())
        results.append(
            {
                "scores": scores[sample, :n],
                "win_probability": wins[sample, :n, :n],
                "confidence": confidence[sample, :n, :n],
                "raw": raw,
                "alone": alone,
                "flip_rate": float(flips[np.triu_indices(n, 1)].sum() / (verdicts // 2)),
                "tie_rate": float((verdict[compared] == 0.5).mean()),
                "pairs": verdicts // 2,
                "verdicts": verdicts,
            }
        )
    return results


def _independent(scorer: Scorer, comparisons: Comparisons, sizes: Sequence[int]) -> Results:
    """Score candidates that were each rated alone (`second` is -1 throughout); results as those of `_pairwise`."""
    fetched = fetch(scorer.win_and_verdict(comparisons.slots))
    return lambda: _rated(scorer, comparisons, sizes, *fetched.wait().numpy())


def _rated(
    scorer: Scorer, comparisons: Comparisons, sizes: Sequence[int], p: np.ndarray, verdict: np.ndarray
) -> list[dict[str, Any]]:
    """Return S_i = p_i, q_ij = (1 + S_i - S_j) / 2 and u_ij = |S_i - S_j| of each sample from p and verdict, [M] each."""
    check_numbers(scorer.text_model, p, comparisons.keys.tolist(), "verdicts")
    results = []
    for sample in range(len(sizes)):
        in_sample = comparisons.sample == sample  # [M]
        scores = p[in_sample][np.argsort(comparisons.first[in_sample])]  # [n]
        margin = scores[:, None] - scores[None, :]  # [n, n]
        results.append(
            {
                "scores": scores,
                "win_probability": 0.5 * (1.0 + margin),
                "confidence": np.abs(margin),
                "raw": scores,
                "alone": scores,
                "flip_rate": 0.0,
                "tie_rate": float((verdict[in_sample] == 0.5).mean()),
                "pairs": 0,
                "verdicts": len(scores),
            }
        )
    return results


def _single() -> dict[str, Any]:
    """Return the result of a sample with one distinct text: nothing to compare."""
    half, zero = np.full((1, 1), 0.5), np.zeros((1, 1))
    rates = {"flip_rate": 0.0, "tie_rate": 0.0, "pairs": 0, "verdicts": 0}
    return {"scores": half[0], "win_probability": half, "confidence": zero, "raw": half, "alone": half[0], **rates}


def expand_row(
    sample: Sample, candidates: Sequence[Candidate], distinct: Sequence[str], result: dict[str, Any]
) -> dict[str, Any]:
    """Expand a result over distinct texts to a row over all candidates; equal texts are an even match of no weight."""
    index_of = {text: index for index, text in enumerate(distinct)}
    indices = np.array([index_of[candidate.text] for candidate in candidates])  # [n]
    grid = np.ix_(indices, indices)  # [n, n]
    raw = result["raw"]
    return {
        "sample_id": sample.id,
        "candidate_ids": [candidate.id for candidate in candidates],
        "scores": result["scores"][indices].tolist(),
        "win_probability": _fill_diagonal(result["win_probability"], 0.5)[grid].tolist(),
        "confidence": _fill_diagonal(result["confidence"], 0.0)[grid].tolist(),
        "raw": (raw[indices] if raw.ndim == 1 else raw[grid]).tolist(),
        **({"alone": result["alone"][indices].tolist()} if "alone" in result else {}),
        **{name: result[name] for name in ("flip_rate", "tie_rate", "pairs", "verdicts")},
    }


def _fill_diagonal(matrix: np.ndarray, value: float) -> np.ndarray:
    """Return a copy of the matrix [n, n] with this value on its diagonal."""
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
    """Run `scored_rows` chunk by chunk, in the order of the candidates; the chunks' counts are `adaptive`'s.

    Args:
        candidates: reads (sample id, its candidates) from the beginning at each call. It is called twice: once to list the
            samples and hash the texts, once to score them, a chunk at a time.

    Raises:
        InputError: a candidate that can't be read, or a sample's candidates are not one after the other.
    """
    by_id = {sample.id: sample for sample in samples}
    digest, scored = hashlib.sha256(), []
    for sample_id, group in candidates().rest():
        if sample_id in by_id:
            scored.append(by_id[sample_id])
            digest.update(json.dumps([(candidate.id, candidate.text) for candidate in group]).encode())
    chunks.progress.set_total(len(scored))
    groups = candidates().rest()

    def work(chunk: Sequence[Sample]) -> ChunkResult:
        # Counts of this chunk alone: `run_chunks` adds the chunks' counts up.
        counted = None if adaptive is None else replace(adaptive, counts=Counter())
        of_chunk = _read_candidates(groups, {sample.id for sample in chunk})
        rows = list(
            scored_rows(scorer, chunk, of_chunk, settings.token_budget, settings.mode, chunks.progress, counted)
        )
        return rows, {} if counted is None else counted.counts

    def depends_on() -> Mapping[str, Any]:
        return {**chunks.depends_on(), "candidates": digest.hexdigest()}

    return run_chunks(replace(chunks, depends_on=depends_on), scored, CHUNK, work)


def _read_candidates(groups: Iterator[tuple[str, list[Candidate]]], sample_ids: set[str]) -> dict[str, list[Candidate]]:
    """Read on until these samples' candidates are complete, and pass over others': they are in other ranks' chunks.

    A rank's chunks come in ascending order, so none of these samples has been passed over before.
    """
    result: dict[str, list[Candidate]] = {}
    while len(result) < len(sample_ids):
        sample_id, group = next(groups)
        if sample_id in sample_ids:
            result[sample_id] = group
    return result
