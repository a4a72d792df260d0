"""Say which keys of its path a query sees, and how scores are formed, where that is not plain causal attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from srcfast.data.forest import Forest


@dataclass(frozen=True)
class AttentionOptions:
    """What differs from causal attention over the whole path.

    Attributes:
        window: a query sees the last `window` tokens of its path, itself included; None: all.
        softcap: scores s become c tanh(s / c); None for none.
        two_way: ranges (start, end) of rows, ascending, with a gap or a segment's end between them, each within one segment. A
            query in a range sees those behind it as well, as in Gemma's images and PaliGemma's prompts.
        beyond_window: whether it sees the rows of its range before its window, too.
    """

    window: int | None = None
    softcap: float | None = None
    two_way: tuple[tuple[int, int], ...] = ()
    beyond_window: bool = False

    def within(self, forest: Forest) -> AttentionOptions:
        """Return these options without a window that covers every path of a forest."""
        return replace(self, window=None) if self.window and self.window >= forest.max_seqlen_k else self

    @property
    def left(self) -> int:
        """Return how many tokens before itself a query sees, -1 for all, as variable-length calls take it."""
        return -1 if self.window is None else self.window - 1

    @property
    def longest_range(self) -> int:
        """Return the number of rows of the longest two-way range, 0 without any."""
        return max((end - start for start, end in self.two_way), default=0)

    @property
    def two_way_rows(self) -> np.ndarray:
        """Return the rows [n] int64 in two-way ranges, ascending."""
        return np.concatenate([np.arange(*bounds) for bounds in self.two_way] or [np.zeros(0, np.int64)])

    def touches(self, rows: np.ndarray) -> bool:
        """Return whether one of these rows [M] is in a two-way range."""
        return bool(np.isin(rows, self.two_way_rows).any())

    def reach(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute how many tokens of its path before and behind itself each row's query sees, [T] int64 each."""
        before = np.full(num_rows, np.iinfo(np.int32).max if self.window is None else self.window - 1, dtype=np.int64)
        behind = np.zeros(num_rows, dtype=np.int64)
        for start, end in self.two_way:
            if self.beyond_window:
                before[start:end] = np.maximum(before[start:end], np.arange(end - start))
            behind[start:end] = np.arange(end - start)[::-1]
        return before, behind


CAUSAL = AttentionOptions()
