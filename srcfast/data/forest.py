"""The packed prefix forest: sequences with shared prefixes, packed without padding.

A segment is a run of tokens. Segments form trees: a segment attends to all of its ancestors and, causally, to itself,
never to a sibling; its positions start where its parent's end. A forest is many trees in one row of `T` tokens.
Its invariant: every root-to-leaf path, run alone as an ordinary sequence, gives the same result.

    prompt -> {chosen, rejected}                    tokens   p p p p c c c r r
                                                    position 0 1 2 3 4 5 6 4 5

Attention over it is one variable-length call (see `srcfast.attention.forest_attention`): queries are one block a
segment, keys are gathered through `kv_index` (the ancestors, then the segment itself), causal and aligned
bottom-right. `srcfast.attention.varlen_plan` joins blocks, so that fewer keys are gathered.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.errors import InputError
from srcfast_kernels import native
from srcfast_kernels.transfers import indexed, to_device_together

NATIVE_FROM = 1024  # items: for fewer, filling the native packer's tables takes longer than packing in Python
NATIVE_BUDGET = 1 << 22  # its tables have an entry for each number of free tokens, up to the budget


@dataclass(frozen=True)
class Segment:
    """A run of tokens that continues its parent.

    Args:
        tokens: `[n]` int64 token ids, n >= 1. Image placeholders are ordinary ids here.
        parent: index of the parent segment within the tree; -1 for the root.
    """

    tokens: np.ndarray
    parent: int = -1

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise InputError(
                field="tokens", expected="a flat, non-empty row of token ids", found=f"shape {tokens.shape}"
            )
        object.__setattr__(self, "tokens", tokens)


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments, parents before their children; the first is the root.

    Args:
        segments: at least one.
        images: keys of the images whose placeholders the segments hold, in order of appearance.
        key: identifies the tree for the caller, as a sample's id does; shown in error messages.
    """

    segments: tuple[Segment, ...]
    images: tuple[str, ...] = ()
    key: Any = None

    def __post_init__(self) -> None:
        parents = [segment.parent for segment in self.segments]
        if not parents or parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(parents) if i > 0):
            raise InputError(
                field="parent",
                sample_id=None if self.key is None else str(self.key),
                expected="one root (parent -1) first, and every other segment after its parent",
                found=parents,
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(segment.tokens.size for segment in self.segments)


@dataclass
class Forest:
    """Trees packed end to end; `T` tokens, `S` segments, `K` gathered keys.

    `token_ids` and `positions` are `[T]` int64. `cu_seqlens_q` and `cu_seqlens_k` are `[S + 1]` int32:
    segment s has the queries `cu_seqlens_q[s]:cu_seqlens_q[s + 1]` and the keys
    `kv_index[cu_seqlens_k[s]:cu_seqlens_k[s + 1]]`, which are the rows of its whole root-to-itself path.
    `predictor` is `[T]` int64: the row whose hidden state predicts each token (the one before it; the
    parent's last row for a segment's first token; -1 for the root's first). `segment_start[tree][segment]` is
    the row where a segment begins. `indices` are the positions of `trees` in the sequence that was packed. `host` is
    the forest on the CPU that this one is a copy of: index maps are made from it without waiting for the device.
    """

    token_ids: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_index: Tensor
    predictor: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    trees: tuple[Tree, ...]
    indices: tuple[int, ...]
    images: tuple[str, ...]
    segment_start: list[list[int]]
    num_tokens: int
    token_budget: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # attention's index maps and masks
    host: Forest | None = field(default=None, repr=False)

    @property
    def wasted_tokens(self) -> int:
        """Tokens of the budget that are not used."""
        return self.token_budget - self.num_tokens

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Forest:
        """Build one forest with exactly these trees, in this order."""
        return cls._build(trees, range(len(trees)), token_budget=sum(tree.num_tokens for tree in trees))

    @classmethod
    def pack(cls, trees: Sequence[Tree], token_budget: int, max_trees: int | None = None) -> list[Forest]:
        """Pack trees, best-fit decreasing, into few forests of at most `token_budget` tokens and `max_trees` trees each.

        Deterministic. Trees within a forest have the order of `trees`; `indices` are their positions in it.

        Raises:
            InputError: a tree is larger than the budget; it is named by its key.
        """
        return list(cls.packed(trees, token_budget, max_trees))

    @classmethod
    def packed(cls, trees: Sequence[Tree], token_budget: int, max_trees: int | None = None) -> Iterator[Forest]:
        """Yield the forests of `pack`, built one by one, so that a caller can release each, with its cache, before the next."""
        sizes = [tree.num_tokens for tree in trees]
        for members in pack_sizes(sizes, token_budget, max_trees, keys=[tree.key for tree in trees]):
            yield cls._build([trees[i] for i in members], members, token_budget)

    @classmethod
    def _build(cls, trees: Sequence[Tree], indices: Sequence[int], token_budget: int) -> Forest:
        if not trees:
            raise InputError(field="trees", expected="at least one tree", found="none")
        segments = [segment for tree in trees for segment in tree.segments]
        counts = [len(tree.segments) for tree in trees]
        lengths = np.array([segment.tokens.size for segment in segments], dtype=np.int64)  # [S]
        first = np.repeat(np.cumsum(counts) - counts, counts)  # [S] index of the first segment of each segment's tree
        parents = np.array([segment.parent for segment in segments], dtype=np.int64)  # [S]
        parents = np.where(parents < 0, -1, parents + first)
        starts = np.cumsum(lengths) - lengths  # [S]

        # Ancestor lists, root first: column by column, each segment's parent, its parent's parent, ...
        chain = [np.arange(len(segments))]
        while (chain[-1] >= 0).any():
            chain.append(np.where(chain[-1] >= 0, parents[chain[-1]], -1))
        ancestors = np.stack(chain[-2::-1], axis=1)  # [S, depth], -1 where the path is shorter
        present = ancestors >= 0
        path_lengths = np.where(present, lengths[ancestors], 0).sum(axis=1)  # [S] keys that a segment attends to
        flat = ancestors[present]
        kv_index = _ranges(starts[flat], lengths[flat])  # [K]

        within = _ranges(np.zeros_like(lengths), lengths)  # [T] offset of each token within its segment
        rows = np.arange(within.size)
        parent_last = np.where(parents < 0, -1, starts[parents] + lengths[parents] - 1)  # [S]
        predictor = np.where(within > 0, rows - 1, np.repeat(parent_last, lengths))
        offsets = np.cumsum(counts)[:-1]
        return cls(
            token_ids=torch.from_numpy(np.concatenate([segment.tokens for segment in segments])),  # [T]
            positions=torch.from_numpy(within + np.repeat(path_lengths - lengths, lengths)),  # [T]
            cu_seqlens_q=torch.from_numpy(_cumulative(lengths)),  # [S + 1]
            cu_seqlens_k=torch.from_numpy(_cumulative(path_lengths)),  # [S + 1]
            kv_index=torch.from_numpy(kv_index),  # [K]
            predictor=torch.from_numpy(predictor),  # [T]
            max_seqlen_q=int(lengths.max()),
            max_seqlen_k=int(path_lengths.max()),
            trees=tuple(trees),
            indices=tuple(indices),
            images=tuple(image for tree in trees for image in tree.images),
            segment_start=[tree_starts.tolist() for tree_starts in np.split(starts, offsets)],
            num_tokens=int(within.size),
            token_budget=token_budget,
        )

    def paths(self) -> list[Tensor]:
        """Return for each leaf, tree by tree, the rows `[n]` int64 of its root-to-leaf path."""
        paths, first = [], 0
        bounds = self.cu_seqlens_k.tolist()
        for tree in self.trees:
            parents = {segment.parent for segment in tree.segments}
            for local in range(len(tree.segments)):
                if local not in parents:
                    paths.append(self.kv_index[bounds[first + local] : bounds[first + local + 1]])
            first += len(tree.segments)
        return paths

    def target_rows(self, tree: int, segments: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows that predict each token of some segments, and those tokens.

        A segment's first token is predicted by its parent's last row, which siblings therefore share: several calls
        may return the same row, and its gradients add up. The root's first token has no
        predictor and is left out.

        Returns:
            `(rows [n], targets [n])`, both int64, in the order of `segments`.
        """
        rows, targets = [], []
        for segment in segments:
            start = self.segment_start[tree][segment]
            end = start + self.trees[tree].segments[segment].tokens.size
            start += segment == 0
            rows.append(self.predictor[start:end])
            targets.append(self.token_ids[start:end])
        return torch.cat(rows), torch.cat(targets)

    def to(self, device: torch.device | str) -> Forest:
        """Copy the forest's tensors to `device`; to a GPU in one asynchronous copy."""
        device = indexed(device)
        if device == self.token_ids.device:
            return self
        names = ("token_ids", "positions", "cu_seqlens_q", "cu_seqlens_k", "kv_index", "predictor")
        host = self.host or self
        tensors = to_device_together([getattr(host, name) for name in names], device)
        return replace(self, **dict(zip(names, tensors, strict=True)), cache={}, host=host)


def pack_sizes(
    sizes: Sequence[int], budget: int, max_items: int | None = None, keys: Sequence[Any] | None = None
) -> list[list[int]]:
    """Pack items into bins, best-fit decreasing; each bin lists its items in ascending order.

    Args:
        sizes: of each item.
        budget: capacity of a bin.
        max_items: maximal items in a bin; None: no limit.
        keys: names of the items for the error message.

    Raises:
        InputError: an item is larger than the budget.
    """
    if len(sizes) >= NATIVE_FROM and budget <= NATIVE_BUDGET and max(sizes) <= budget and native.available():
        return _pack_sizes_native(sizes, budget, max_items or 0)
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), ascending: the first that is large enough fits best
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[item] > budget:
            raise InputError(
                sample_id=str(keys[item]) if keys is not None else f"number {item}",
                field="token_budget",
                expected=f"at most {budget} tokens in one tree",
                found=f"{sizes[item]} tokens",
                fix="raise token_budget or leave this sample out",
            )
        position = bisect_left(free, (sizes[item], -1))
        if position < len(free):
            capacity, bin_index = free.pop(position)
        else:
            capacity, bin_index = budget, len(bins)
            bins.append([])
        bins[bin_index].append(item)
        if max_items is None or len(bins[bin_index]) < max_items:
            insort(free, (capacity - sizes[item], bin_index))
    return [sorted(members) for members in bins]


def _pack_sizes_native(sizes: Sequence[int], budget: int, max_items: int) -> list[list[int]]:
    """Do the same as `pack_sizes` in C++; `max_items` 0: no limit."""
    counts = torch.as_tensor(sizes, dtype=torch.int64)
    items, offsets = torch.empty(len(counts), dtype=torch.int64), torch.empty(len(counts) + 1, dtype=torch.int64)
    bins = torch.ops.srcfast.pack_sizes(counts, budget, max_items, items, offsets)
    order, bounds = items.tolist(), offsets[: bins + 1].tolist()
    return [order[start:end] for start, end in pairwise(bounds)]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges start, start + 1, ..., start + length - 1."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    """Return 0 and the cumulative sums of lengths, int32, as variable-length attention takes them."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
