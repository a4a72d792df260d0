"""Log-probabilities of responses: of preference pairs under their reference, of any responses after their prompts."""

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
from srcfast.models.lvlm import ImageFeatures
from srcfast.models.sharding import in_step_with
from srcfast.run.chunks import ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.run.progress import StageProgress
from srcfast.stages.pair_trees import pair_logprobs, preference_trees
from srcfast.stages.policy import Policy
from srcfast.stages.prompts import PromptEncoder, image_keys, image_prints
from srcfast.training.loop import Features, Metrics
from srcfast.training.pipelining import behind
from srcfast_kernels.linear_logprob import linear_logprob
from srcfast_kernels.transfers import Fetched, fetch, to_device


@torch.no_grad()
def reference_logprobs(
    model: Any,
    preferences: Sequence[Preference],
    *,
    reference_hash: str,
    token_budget: int,
    features: Features | None = None,
    on_forest: Callable[[Forest], None] | None = None,
) -> list[Preference]:
    """The preferences with the model's log-probabilities as their reference.

    Args:
        model: base with the adapter as it is before the round.
        preferences: pairs.
        reference_hash: of base and adapter; stored in `extra["reference_hash"]`, and asked for when training.
        token_budget: most tokens in a forest.
        features: image keys to embeddings.
        on_forest: called after each forest, for progress.
    """
    trees = preference_trees(model, preferences)
    done = list(preferences)
    head = model.decoder.head_weight

    def sums(forest: Forest, hidden: Tensor) -> Tensor:
        return torch.stack(pair_logprobs(hidden, forest, head))  # [2, P]

    for forest, (chosen, rejected) in _run(model, trees, sums, token_budget, features, on_forest):
        for index, one, other in zip(forest.indices, chosen.tolist(), rejected.tolist(), strict=True):
            done[index] = replace(
                preferences[index],
                reference_chosen_logprob=one,
                reference_rejected_logprob=other,
                extra={**preferences[index].extra, "reference_hash": reference_hash},
            )
    return done


@torch.no_grad()
def response_logprobs(
    model: Any,
    items: Sequence[tuple[np.ndarray, tuple[str, ...], np.ndarray]],
    *,
    token_budget: int,
    features: Features | None = None,
    on_forest: Callable[[Forest], None] | None = None,
) -> list[tuple[float, int]]:
    """Summed log-probability and number of tokens of each response after its prompt.

    Args:
        items: (prompt token ids, image keys, response token ids with the end token). Responses to the same
            prompt share it.

    Returns:
        (log-probability, tokens) in the order of `items`.
    """
    trees: list[Tree] = []
    members: list[list[int]] = []
    for indices in _same_prompt(items):
        prompt_size, room = len(items[indices[0]][0]), 0
        part: list[int] = []
        for index in indices:
            size = len(items[index][2])
            if not part or size > room:
                room, part = token_budget - prompt_size, []
                members.append(part)
            room -= size
            part.append(index)
    for part in members:
        prompt, images, _ = items[part[0]]
        leaves = (Segment(items[index][2], 0) for index in part)
        trees.append(Tree((Segment(prompt), *leaves), images, key=f"number {part[0]}"))
    found: list[tuple[float, int]] = [(0.0, 0)] * len(items)

    def sums(forest: Forest, hidden: Tensor) -> Tensor:
        """Of each response in the forest, [responses]."""
        host = forest.host or forest
        responses = [
            host.target_rows(number, [leaf])
            for number, tree in enumerate(host.trees)
            for leaf in range(1, len(tree.segments))
        ]
        rows, targets = (torch.cat(parts).numpy() for parts in zip(*responses, strict=True))
        places = row_positions(rows, hidden, forest, response_logit_rows(forest))
        looked_up = to_device(np.stack([places, targets]), hidden.device)  # [2, n]
        logps = linear_logprob(hidden.index_select(0, looked_up[0]), model.decoder.head_weight, looked_up[1])
        return torch.stack([part.sum() for part in logps.split([len(own) for own, _ in responses])])

    for forest, totals in _run(model, trees, sums, token_budget, features, on_forest):
        order = [index for tree_index in forest.indices for index in members[tree_index]]
        for index, total in zip(order, totals.tolist(), strict=True):
            found[index] = (total, len(items[index][2]))
    return found


def _same_prompt(items: Sequence[tuple[np.ndarray, tuple[str, ...], np.ndarray]]) -> list[list[int]]:
    groups: dict[tuple[bytes, tuple[str, ...]], list[int]] = {}
    for index, (prompt, images, _) in enumerate(items):
        groups.setdefault((np.asarray(prompt, dtype=np.int64).tobytes(), tuple(images)), []).append(index)
    return list(groups.values())


def _run(
    model: Any,
    trees: Sequence[Tree],
    measure: Callable[[Forest, Tensor], Tensor],
    token_budget: int,
    features: Features | None,
    on_forest: Callable[[Forest], None] | None,
) -> Iterator[tuple[Forest, Tensor]]:
    """The trees packed into forests, in evaluation mode: each forest and what `measure` makes of it, on the host.

    `measure` is given (forest, hidden [T, D], or [M, D] of the `response_logit_rows` where the model takes them). A GPU computes
    the next forest while the numbers of one are read.
    """
    device = next(model.parameters()).device

    def queued() -> Iterator[tuple[Forest, Fetched]]:
        for forest in Forest.packed(trees, token_budget):
            forest = forest.to(device)
            inputs = () if features is None else (features(list(dict.fromkeys(forest.images))),)
            wanted = {"rows": response_logit_rows(forest)} if supports_row_selection(model) else {}
            yield forest, fetch(measure(forest, model(forest, *inputs, **wanted)))

    was_training = model.training
    model.eval()
    for forest, numbers in behind(queued(), device):
        yield forest, numbers.wait()
        if on_forest is not None:
            on_forest(forest)
    model.train(was_training)


def check_logprobs(metrics: Metrics) -> None:
    """Raises SrcfastError where a log-probability is above 0 by more than rounding: then no number of the step is right."""
    if metrics.get("max_logprob", 0.0) > LOGPROB_ROUNDING:
        raise SrcfastError(
            f"step {metrics['step']}: expected log-probabilities of at most 0, found {metrics['max_logprob']:.3g}. "
            "Fix: see whether the checkpoint's weights are whole, and try another dtype; "
            "`srcfast doctor` says which kernels are used"
        )


PAIRS = 256  # preference pairs a piece, or requests for a log-probability


def references_in_chunks(chunks: Chunks) -> Callable[..., list[Preference]]:
    """What stands in for `reference_logprobs`: the same, in pieces; each call has a folder of its own under `place`."""
    calls = count()

    def logprobs(
        model: Any,
        preferences: Sequence[Preference],
        *,
        reference_hash: str,
        token_budget: int,
        features: ImageFeatures,
        on_forest: Callable[[Forest], None] | None = None,
    ) -> list[Preference]:
        def work(piece: Sequence[Preference]) -> ChunkResult:
            features.clear()
            done = reference_logprobs(
                model,
                piece,
                reference_hash=reference_hash,
                token_budget=token_budget,
                features=features,
                on_forest=on_forest,
            )
            return [
                {"chosen": one.reference_chosen_logprob, "rejected": one.reference_rejected_logprob} for one in done
            ], {}

        beside = in_step_with(model)
        parts = run_chunks(chunks.below(str(next(calls))), preferences, PAIRS, work, beside)
        return [
            replace(
                pair,
                reference_chosen_logprob=row["chosen"],
                reference_rejected_logprob=row["rejected"],
                extra={**pair.extra, "reference_hash": reference_hash},
            )
            for pair, row in zip(preferences, parts.rows(), strict=True)
        ]

    return logprobs


def logprobs_in_chunks(
    chunks: Chunks,
    model: Any,
    requests: Sequence[Sample],
    *,
    features: ImageFeatures,
    token_budget: int,
) -> ChunkFiles:
    """`response_logprobs` of the requests' answers, each after its question; `logprobs_of` reads them.

    Answers to the same prompt share it within a piece, and pieces are cut where the same prompts follow each other.

    Raises:
        InputError: a prompt that does not fit the model, before any is computed; it names the request.
    """
    encode = PromptEncoder(model)
    for one in requests:
        encode(one, one.question, one.id)

    def work(piece: Sequence[Sample]) -> ChunkResult:
        features.clear()
        items = [
            (encode(one, one.question, one.id), image_keys(one), model.encode_response(one.answer)) for one in piece
        ]
        found = response_logprobs(
            model,
            items,
            token_budget=token_budget,
            features=features,
            on_forest=lambda forest: chunks.progress.advance(
                sum(len(tree.segments) - 1 for tree in forest.trees), tokens=forest.num_tokens
            ),
        )
        return [{"logprob": value, "tokens": tokens} for value, tokens in found], {}

    ordered = [requests[index] for index in _same_prompts_together(requests)]
    return run_chunks(chunks, ordered, PAIRS, work, in_step_with(model))


def logprobs_of(requests: Sequence[Sample], logprobs: ChunkFiles) -> list[dict[str, Any]]:
    """The requests' rows {logprob, tokens}, in the requests' order."""
    rows = zip(_same_prompts_together(requests), logprobs.rows(), strict=True)
    return [row for _, row in sorted(rows, key=itemgetter(0))]


def _same_prompts_together(requests: Sequence[Sample]) -> list[int]:
    """The requests' numbers by images and question: each image, too, is then encoded in few pieces."""
    return sorted(range(len(requests)), key=lambda index: (requests[index].images, requests[index].question))


def logprob_chunks(
    config: Config, policy: Policy, records: Sequence[Sample | Preference], directory: Path, progress: StageProgress
) -> Chunks:
    """Return where log-probabilities of a command are stored.

    They depend on the records' text, on their images' contents, and of the settings of `dpo` on the token budget alone.
    """
    resolved = config.model_dump(mode="json")

    def depends_on() -> dict[str, Any]:
        settings = {"seed": resolved["seed"], "model": resolved["model"]}
        budget = {"token_budget": config.dpo.token_budget}
        return settings | {"policy": policy.hash(), "images": json_hash(image_prints(records)), "dpo": budget}

    return Chunks(directory, depends_on, progress)
