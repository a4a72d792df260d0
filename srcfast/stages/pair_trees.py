"""A preference pair as a tree: the prompt, what both responses share at their beginning, and the two ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.logit_rows import response_logit_rows, row_positions
from srcfast.data.records import Preference
from srcfast.errors import InputError
from srcfast.stages.prompts import PromptEncoder, image_keys
from srcfast_kernels.linear_logprob import linear_logprob
from srcfast_kernels.transfers import to_device


def preference_tree(
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    images: tuple[str, ...] = (),
    key: Any = None,
) -> Tree:
    """prompt -> {chosen, rejected}, or prompt -> shared beginning -> {chosen, rejected}.

    Args:
        prompt, chosen, rejected: token ids; responses with their end token. Each keeps at least one token of
            its own.

    Raises:
        InputError: the two responses are the same.
    """
    if np.array_equal(chosen, rejected):
        raise InputError(
            sample_id=None if key is None else str(key),
            field="rejected",
            expected="a response other than the chosen one",
            found="the same tokens",
            fix="drop this pair: it prefers nothing to nothing",
        )
    most = min(len(chosen), len(rejected)) - 1
    differs = np.flatnonzero(chosen[:most] != rejected[:most])
    shared = int(differs[0]) if differs.size else most
    middle = (Segment(chosen[:shared], 0),) if shared else ()
    parent = len(middle)
    leaves = (Segment(chosen[shared:], parent), Segment(rejected[shared:], parent))
    return Tree((Segment(prompt), *middle, *leaves), images, key)


def pair_rows(forest: Forest) -> np.ndarray:
    """What `pair_logprobs` looks up, [3, n] int64: the row that predicts each token of a response, the token, its slot.

    The slots of tree k are 3k for tokens that chosen and rejected share, 3k + 1 chosen, 3k + 2 rejected. Stored in the cache
    of the forest on the host.
    """
    host = forest.host or forest
    if "pair rows" not in host.cache:
        predictor, tokens = host.predictor.numpy(), host.token_ids.numpy()
        rows, targets, slots = [], [], []
        for number, (tree, starts) in enumerate(zip(host.trees, host.segment_start, strict=True)):
            last = len(tree.segments) - 1
            for segment in range(1, last + 1):
                slot = max(0, segment - last + 2) if last > 1 else 1  # a response alone is chosen
                part = slice(starts[segment], starts[segment] + tree.segments[segment].tokens.size)
                rows.append(predictor[part])
                targets.append(tokens[part])
                slots.append(np.full(part.stop - part.start, 3 * number + slot))
        host.cache["pair rows"] = np.stack([np.concatenate(part) for part in (rows, targets, slots)])
    return host.cache["pair rows"]


def loss_rows(forest: Forest) -> Tensor:
    """Return `response_logit_rows`, and compute `pair_rows` on the way: a worker process does both ahead of the step."""
    pair_rows(forest)
    return response_logit_rows(forest)


def pair_logprobs(hidden: Tensor, forest: Forest, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen and the rejected response of each preference tree, summed over their
    whole paths.

    Args:
        hidden: `[T, D]`, or `[M, D]` of the forest's `response_logit_rows`.
        forest: of P trees of preferences, or of prompt and response alone: of these it is the response's, and 0.
        head_weight: `[V, D]`.

    Returns:
        (chosen `[P]`, rejected `[P]`), differentiable. Shared tokens pass through the head once.
    """
    rows, targets, slots = pair_rows(forest)
    places = row_positions(rows, hidden, forest, response_logit_rows(forest))
    index = to_device(np.stack([places, targets, slots]), hidden.device)  # [3, n]
    logps = linear_logprob(hidden.index_select(0, index[0]), head_weight, index[1])  # [n]
    sums = logps.new_zeros(3 * len(forest.trees)).index_add(0, index[2], logps).view(-1, 3)  # [P, 3]
    return sums[:, 0] + sums[:, 1], sums[:, 0] + sums[:, 2]


@pause_full_collections()
def preference_trees(model: Any, preferences: Sequence[Preference]) -> list[Tree]:
    """One tree a preference; `model` is an `LVLM`. Raises as `preference_tree` does."""
    prompt = PromptEncoder(model)
    return [
        preference_tree(
            prompt(preference, preference.prompt, preference.sample_id),
            model.encode_response(preference.chosen),
            model.encode_response(preference.rejected),
            image_keys(preference),
            key=preference.sample_id,
        )
        for preference in preferences
    ]
