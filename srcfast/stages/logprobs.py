"""Compute log-probabilities of responses: of preference pairs under their reference, of any responses after their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.config.settings import Config
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.jsonl import json_hash
from srcfast.data.logit_rows import response_logit_rows, row_positions, supports_row_selection
from srcfast.data.records import LOGPROB_ROUNDING, Preference, Sample
from srcfast.errors import SrcfastError
from srcfast.models.head import check_numbers
from srcfast.models.lvlm import ImageFeatures
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.sharding import in_step_with
from srcfast.run.chunks import ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.run.progress import StageProgress
from srcfast.stages.credit import credited_spans, credited_tokens
from srcfast.stages.pair_trees import pair_logprobs, preference_trees
from srcfast.stages.policy import Policy
from srcfast.stages.prompts import PromptEncoder, image_keys, image_prints
from srcfast.training.items import Features, Metrics
from srcfast.training.pipelining import behind
from srcfast_kernels.transfers import Fetched, fetch, to_device

REFERENCE_FIELDS = (
    "reference_chosen_logprob",
    "reference_rejected_logprob",
    "reference_chosen_span_logprob",
    "reference_rejected_span_logprob",
)
PAIRS = 256  # preference pairs a chunk, or requests for a log-probability


@torch.no_grad()
def reference_logprobs(
    model: VisionLanguageModel,
    preferences: Sequence[Preference],
    *,
    reference_hash: str,
    token_budget: int,
    features: Features | None = None,
    on_forest: Callable[[Forest], None] | None = None,
) -> list[Preference]:
    """Return the preferences with the model's log-probabilities as those of their reference, in nats.

    Args:
        model: base with the adapter as it is before the round.
        preferences: pairs.
        reference_hash: of base and adapter; stored in `extra["reference_hash"]`, and compared when training starts.
        token_budget: maximum of tokens in a forest.
        features: image keys to embeddings.
        on_forest: called after each forest, for progress.
    """
    trees = preference_trees(model, preferences)
    spans = [credited_spans(model, pair, tree) for pair, tree in zip(preferences, trees, strict=True)]
    results = list(preferences)
    head = model.decoder.head

    def sums(forest: Forest, hidden: Tensor) -> Tensor:
        tokens = credited_tokens(forest, [spans[index] for index in forest.indices])
        return torch.stack(pair_logprobs(hidden, forest, head, tokens))  # [2, P], or [4, P]

    for forest, logprobs in _run_forests(model, trees, sums, token_budget, features, on_forest):
        check_numbers(model, logprobs.sum(0).numpy(), [tree.key for tree in forest.trees])
        for index, values in zip(forest.indices, logprobs.T.tolist(), strict=True):
            results[index] = with_reference(preferences[index], values, reference_hash)
    return results


def with_reference(pair: Preference, logprobs: Sequence[float], reference_hash: str) -> Preference:
    """Return the pair with its reference's log-probabilities and with the hash of the model that they are from.

    logprobs: of the chosen and the rejected response, and of what is credited of both.
    """
    changes: dict[str, Any] = dict(zip(stated_reference(pair), logprobs, strict=False))
    return replace(pair, extra={**pair.extra, "reference_hash": reference_hash}, **changes)


def stated_reference(pair: Preference) -> dict[str, Any]:
    """Return the log-probabilities that the pair needs of its reference, by field; None where one is missing."""
    fields = REFERENCE_FIELDS if pair.credit is not None else REFERENCE_FIELDS[:2]
    return {field: getattr(pair, field) for field in fields}


@torch.no_grad()
def response_logprobs(
    model: VisionLanguageModel,
    items: Sequence[tuple[np.ndarray, tuple[str, ...], np.ndarray]],
    *,
    token_budget: int,
    features: Features | None = None,
    on_forest: Callable[[Forest], None] | None = None,
    keys: Sequence[str] | None = None,
) -> list[tuple[float, int]]:
    """Compute the summed log-probability, in nats, and the number of tokens of each response after its prompt.

    Args:
        items: (prompt token ids, image keys, response token ids with the end token). Responses to the same
            prompt share it.
        token_budget: maximum of tokens in a forest.
        keys: names of the items in errors; default: their numbers.

    Returns:
        (log-probability, tokens) in the order of `items`.
    """
    keys = keys or [f"number {index}" for index in range(len(items))]
    groups = _tree_members(items, token_budget)
    trees = []
    for members in groups:
        prompt, images, _ = items[members[0]]
        leaves = (Segment(items[index][2], 0) for index in members)
        trees.append(Tree((Segment(prompt), *leaves), images, key=keys[members[0]]))
    results: list[tuple[float, int]] = [(0.0, 0)] * len(items)

    def sums(forest: Forest, hidden: Tensor) -> Tensor:
        """Sum each response's log-probabilities: [responses], trees in the forest's order, leaves in each tree's."""
        host = forest.host or forest
        responses = [
            host.target_rows(number, [leaf])
            for number, tree in enumerate(host.trees)
            for leaf in range(1, len(tree.segments))
        ]
        rows, targets = (torch.cat(columns).numpy() for columns in zip(*responses, strict=True))  # [n] each
        positions = row_positions(rows, hidden, forest, response_logit_rows(forest))
        index = to_device(np.stack([positions, targets]), hidden.device)  # [2, n]
        logps = model.decoder.head.logprobs(hidden.index_select(0, index[0]), index[1])  # [n]
        return torch.stack(
            [response.sum() for response in logps.split([len(predictors) for predictors, _ in responses])]
        )

    for forest, totals in _run_forests(model, trees, sums, token_budget, features, on_forest):
        order = [index for tree_index in forest.indices for index in groups[tree_index]]
        check_numbers(model, totals.numpy(), [keys[index] for index in order])
        for index, total in zip(order, totals.tolist(), strict=True):
            results[index] = (total, len(items[index][2]))
    return results


def _tree_members(
    items: Sequence[tuple[np.ndarray, tuple[str, ...], np.ndarray]], token_budget: int
) -> list[list[int]]:
    """Group the items' indices into trees of one prompt; a prompt with more responses than fit a forest has several trees."""
    groups: list[list[int]] = []
    for indices in _same_prompt(items):
        members: list[int] = []
        capacity = 0
        for index in indices:
            size = len(items[index][2])
            # A response that exceeds the budget alone gets a tree as well: packing raises the error that names it.
            if not members or size > capacity:
                capacity, members = token_budget - len(items[index][0]), []
                groups.append(members)
            capacity -= size
            members.append(index)
    return groups


def _same_prompt(items: Sequence[tuple[np.ndarray, tuple[str, ...], np.ndarray]]) -> list[list[int]]:
    """Group the items' indices by prompt tokens and images."""
    groups: dict[tuple[bytes, tuple[str, ...]], list[int]] = {}
    for index, (prompt, images, _) in enumerate(items):
        groups.setdefault((np.asarray(prompt, dtype=np.int64).tobytes(), tuple(images)), []).append(index)
    return list(groups.values())


def _run_forests(
    model: VisionLanguageModel,
    trees: Sequence[Tree],
    measure: Callable[[Forest, Tensor], Tensor],
    token_budget: int,
    features: Features | None,
    on_forest: Callable[[Forest], None] | None,
) -> Iterator[tuple[Forest, Tensor]]:
    """Pack the trees into forests and run them in evaluation mode; yield each forest and `measure`'s result on the host.

    `measure` takes (forest, hidden [T, D]), or [M, D] of the `response_logit_rows` where the model can select rows. A GPU
    computes the next forest while the host reads the numbers of the last one.
    """
    device = next(model.parameters()).device

    def queued() -> Iterator[tuple[Forest, Fetched]]:
        for forest in Forest.packed(trees, token_budget):
            forest = forest.to(device)
            inputs = () if features is None else (features(list(dict.fromkeys(forest.images))),)
            selected = {"rows": response_logit_rows(forest)} if supports_row_selection(model) else {}
            yield forest, fetch(measure(forest, model(forest, *inputs, **selected)))

    was_training = model.training
    model.eval()  # log-probabilities are those without dropout
    for forest, numbers in behind(queued(), device):
        yield forest, numbers.wait()
        if on_forest is not None:
            on_forest(forest)
    model.train(was_training)


def check_logprobs(metrics: Metrics) -> None:
    """Raise SrcfastError where a step's greatest log-probability is above 0 by more than rounding: the step is wrong then."""
    if metrics.get("max_logprob", 0.0) > LOGPROB_ROUNDING:
        raise SrcfastError(
            f"step {metrics['step']}: expected log-probabilities of at most 0, found {metrics['max_logprob']:.3g}. "
            "Fix: see whether the checkpoint's weights are whole, and try another dtype; "
            "`srcfast doctor` says which kernels are used"
        )


def references_in_chunks(chunks: Chunks) -> Callable[..., list[Preference]]:
    """Return a function with the signature of `reference_logprobs` that works chunk by chunk.

    The calls store their chunks in the directories 0, 1, ... below that of `chunks`.
    """
    calls, names = count(), ("chosen", "rejected", "chosen_span", "rejected_span")

    def logprobs(
        model: VisionLanguageModel,
        preferences: Sequence[Preference],
        *,
        reference_hash: str,
        token_budget: int,
        features: ImageFeatures,
        on_forest: Callable[[Forest], None] | None = None,
    ) -> list[Preference]:
        def work(chunk: Sequence[Preference]) -> ChunkResult:
            features.clear()  # nothing may carry over from one chunk to the next
            pairs = reference_logprobs(
                model,
                chunk,
                reference_hash=reference_hash,
                token_budget=token_budget,
                features=features,
                on_forest=on_forest,
            )
            return [dict(zip(names, stated_reference(pair).values(), strict=False)) for pair in pairs], {}

        files = run_chunks(chunks.below(str(next(calls))), preferences, PAIRS, work, in_step_with(model))
        return [
            with_reference(pair, [row[name] for name in names if name in row], reference_hash)
            for pair, row in zip(preferences, files.rows(), strict=True)
        ]

    return logprobs


def logprobs_in_chunks(
    chunks: Chunks,
    model: VisionLanguageModel,
    requests: Sequence[Sample],
    *,
    features: ImageFeatures,
    token_budget: int,
) -> ChunkFiles:
    """Run `response_logprobs` of the requests' answers, each after its question, chunk by chunk; `logprobs_of` reads them.

    Answers to the same prompt share it within a chunk; requests with the same prompt follow each other, so that few chunks
    cut between them.

    Raises:
        InputError: a prompt that does not fit the model, before any is computed; it names the request.
    """
    encode_prompt = PromptEncoder(model)
    for request in requests:
        model.response_tokens(encode_prompt(request), request.answer, request.id, "response")

    def work(chunk: Sequence[Sample]) -> ChunkResult:
        features.clear()
        items = [
            (encode_prompt(request), image_keys(request), model.encode_response(request.answer)) for request in chunk
        ]
        logprobs = response_logprobs(
            model,
            items,
            token_budget=token_budget,
            features=features,
            keys=[request.id for request in chunk],
            on_forest=lambda forest: chunks.progress.advance(
                sum(len(tree.segments) - 1 for tree in forest.trees), tokens=forest.num_tokens
            ),
        )
        return [{"logprob": value, "tokens": tokens} for value, tokens in logprobs], {}

    ordered = [requests[index] for index in _order_by_prompt(requests)]
    return run_chunks(chunks, ordered, PAIRS, work, in_step_with(model))


def logprobs_of(requests: Sequence[Sample], logprobs: ChunkFiles) -> list[dict[str, Any]]:
    """Read the requests' rows {logprob, tokens}, in the requests' order."""
    rows = zip(_order_by_prompt(requests), logprobs.rows(), strict=True)
    return [row for _, row in sorted(rows, key=itemgetter(0))]


def _order_by_prompt(requests: Sequence[Sample]) -> list[int]:
    """Sort the requests' indices by images and prompt: each image, too, is then encoded in few chunks."""

    def prompt(index: int) -> tuple[Any, ...]:
        request = requests[index]
        return request.images, request.question, request.turns

    return sorted(range(len(requests)), key=prompt)


def logprob_chunks(
    config: Config, policy: Policy, records: Sequence[Sample | Preference], directory: Path, progress: StageProgress
) -> Chunks:
    """Return where a command stores log-probabilities.

    They depend on the records' text, on their images' contents, and of the settings of `dpo` on the token budget alone.
    """
    resolved = config.identity()

    def depends_on() -> dict[str, Any]:
        settings = {"seed": resolved["seed"], "model": resolved["model"]}
        budget = {"token_budget": config.dpo.token_budget}
        return settings | {"policy": policy.hash(), "images": json_hash(image_prints(records)), "dpo": budget}

    return Chunks(directory, depends_on, progress)
