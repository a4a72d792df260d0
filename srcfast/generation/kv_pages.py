"""Which pages of a key-value cache hold which row's positions: counted, shared by forks, copied on write.

Bookkeeping alone, on the host: small lists of page numbers, no keys and no values (PagedAttention: Kwon et al., 2023,
arXiv 2309.06180). A fork lists its parent's pages; only a page that is partly filled and that others still list is copied,
when a row is about to write into it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from srcfast.errors import SrcfastError


@dataclass
class PagedRow:
    """The pages of one row in order, and how many of their positions are written."""

    pages: list[int]
    length: int = 0


@dataclass(frozen=True)
class PageCopy:
    """To be copied before the next write: the first `length` positions of page `source` into page `target`."""

    source: int
    target: int
    length: int


class KVPages:
    """A pool of pages with reference counts.

    Args:
        pages: the numbers of the pages in the pool, handed out in this order.
        page_size: positions a page.
    """

    def __init__(self, pages: Iterable[int], page_size: int) -> None:
        self.page_size = page_size
        self._free = list(pages)[::-1]
        self._total = len(self._free)
        self._references: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Pages that no row lists."""
        return len(self._free)

    def new_row(self) -> PagedRow:
        """A row without positions."""
        return PagedRow([])

    def fork(self, row: PagedRow, length: int | None = None) -> PagedRow:
        """A row that begins with the first `length` positions of `row` (None: all of them), in the same pages."""
        length = row.length if length is None else length
        pages = row.pages[: -(-length // self.page_size)]
        for page in pages:
            self._references[page] += 1
        return PagedRow(list(pages), length)

    def extend(self, row: PagedRow, room: int) -> list[PageCopy]:
        """Let the row alone write its positions from `row.length` up to `room`.

        Returns:
            At most one copy, which the caller makes before it writes.

        Raises:
            SrcfastError: no page is free.
        """
        copies = []
        held = row.length % self.page_size
        last = row.length // self.page_size  # the page of the next position
        if room > row.length and last < len(row.pages) and self._references[row.pages[last]] > 1:
            shared, row.pages[last] = row.pages[last], self._take()
            self._references[shared] -= 1
            copies.append(PageCopy(shared, row.pages[last], held))
        while len(row.pages) * self.page_size < room:
            row.pages.append(self._take())
        return copies

    def release(self, row: PagedRow) -> None:
        """Forget the row; pages that no other row lists are free again."""
        for page in row.pages:
            self._references[page] -= 1
            if not self._references[page]:
                del self._references[page]
                self._free.append(page)
        row.pages, row.length = [], 0

    def _take(self) -> int:
        if not self._free:
            raise SrcfastError(
                f"the key-value cache is full: expected a free page among {self._total} of {self.page_size} positions, "
                "found none. Fix: lower the number of samples decoded at once (batch_size) or max_new_tokens"
            )
        page = self._free.pop()
        self._references[page] = 1
        return page
