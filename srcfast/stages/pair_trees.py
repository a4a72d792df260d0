"""Turn a preference pair into a tree (the prompt, what both responses share at their beginning, the two ends) and sum its
log-probabilities.

The layout of trees in a forest is that of `srcfast.data.forest`; the kernel below `pair_logprobs` is
`srcfast_kernels.linear_logprob`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.logit_rows import response_logit_rows, row_positions
from srcfast.data.records import Preference
from srcfast.errors import InputError
from srcfast.models.head import Head
from srcfast.models.protocols import VisionLanguageModel
from srcfast.stages.prompts import PromptEncoder, image_keys
from srcfast_kernels.transfers import to_device
from srcfast_kernels.weighted_dpo import sum_pairs


def preference_tree(
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    images: tuple[str, ...] = (),
    key: Any = None,
) -> Tree:
    """Build prompt -> {chosen, rejected}, or prompt -> shared beginning -> {chosen, rejected}.

    Args:
        prompt, chosen, rejected: token ids `[n]`; responses with their end token.
        images: keys of the prompt's images.
        key: names the tree in error messages: the sample's id.

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
    # A segment is never empty: each response keeps its last token, even where one begins with the whole other.
    max_shared = min(len(chosen), len(rejected)) - 1
    differs = np.flatnonzero(chosen[:max_shared] != rejected[:max_shared])
    shared = int(differs[0]) if differs.size else max_shared
    middle = (Segment(chosen[:shared], 0),) if shared else ()
    parent = len(middle)  # index of the segment that both ends follow: 1, or 0 (the prompt) where nothing is shared
    leaves = (Segment(chosen[shared:], parent), Segment(rejected[shared:], parent))
    return Tree((Segment(prompt), *middle, *leaves), images, key)


def pair_rows(forest: Forest) -> np.ndarray:
    """Return [3, n] int64: the row that predicts each token of a response, the token, its sequence.

    Sequences of P trees are numbered as `linear_weighted_dpo` takes them: 2k the chosen and 2k + 1 the rejected response of tree
    k, 2P + k what both begin with. Stored in the cache of the forest on the host.
    """
    host = forest.host or forest
    if "pair rows" not in host.cache:
        predictor, tokens = host.predictor.numpy(), host.token_ids.numpy()
        rows, targets, sequences = [], [], []
        for k, (tree, starts) in enumerate(zip(host.trees, host.segment_start, strict=True)):
            last = len(tree.segments) - 1
            for segment in range(1, last + 1):
                span = slice(starts[segment], starts[segment] + tree.segments[segment].tokens.size)
                if last == 1 or segment == last - 1:  # a response alone is chosen
                    sequence = 2 * k
                elif segment == last:
                    sequence = 2 * k + 1
                else:
                    sequence = 2 * len(host.trees) + k
                rows.append(predictor[span])
                targets.append(tokens[span])
                sequences.append(np.full(span.stop - span.start, sequence))
        host.cache["pair rows"] = np.stack([np.concatenate(parts) for parts in (rows, targets, sequences)])
    return host.cache["pair rows"]


def pair_logit_rows(forest: Forest) -> Tensor:
    """Return the rows that the head reads, [M] int64 (`response_logit_rows`), and fill the cache of `pair_rows`.

    A worker process of the loader calls this ahead of the step, so that the step itself finds both in the forest's cache.
    """
    pair_rows(forest)
    return response_logit_rows(forest)


class PairTokens(NamedTuple):
    """The n tokens of a forest's responses, on the hidden states' device, as `linear_weighted_dpo` takes them.

    hidden: [n, D] of the row that predicts each. targets: [n] the tokens. sequence_ids: [n].
    """

    hidden: Tensor
    targets: Tensor
    sequence_ids: Tensor


def pair_tokens(hidden: Tensor, forest: Forest) -> PairTokens:
    """Gather what the loss needs of each response token; `hidden` as for `pair_logprobs`."""
    rows, targets, sequences = pair_rows(forest)
    positions = row_positions(rows, hidden, forest, response_logit_rows(forest))
    index = to_device(np.stack([positions, targets, sequences]), hidden.device)  # [3, n]
    return PairTokens(hidden.index_select(0, index[0]), index[1], index[2])


def pair_logprobs(hidden: Tensor, forest: Forest, head: Head, credited: np.ndarray | None = None) -> tuple[Tensor, ...]:
    """Sum the log-probabilities of the chosen and the rejected response of each preference tree over their whole paths.

    Args:
        hidden: `[T, D]`, or `[M, D]` of the forest's `response_logit_rows`.
        forest: of P trees of preferences, or of prompt and response alone: of these it is the response's, and 0.
        head: the model's.
        credited: indices of tokens (`credit.credited_tokens`) whose sums are returned as well.

    Returns:
        (chosen `[P]`, rejected `[P]`), differentiable, and the same two of the credited tokens. Shared tokens pass through the
        head once.
    """
    tokens = pair_tokens(hidden, forest)
    logps = head.logprobs(tokens.hidden, tokens.targets)  # [n]
    sums = sum_pairs(logps, tokens.sequence_ids, len(forest.trees))
    if credited is None:
        return sums
    index = to_device(credited, logps.device)  # [C]
    ids = tokens.sequence_ids.index_select(0, index)
    return *sums, *sum_pairs(logps.index_select(0, index), ids, len(forest.trees))


@pause_full_collections()
def preference_trees(model: VisionLanguageModel, preferences: Sequence[Preference]) -> list[Tree]:
    """Build one tree a preference; `model` is an `LVLM`. Raises as `preference_tree` does."""
    encode_prompt = PromptEncoder(model)
    return [
        preference_tree(
            encode_prompt(preference),
            model.encode_response(preference.chosen),
            model.encode_response(preference.rejected),
            image_keys(preference),
            key=preference.sample_id,
        )
        for preference in preferences
    ]
