"""Pages of keys: rows that fork, write and leave always find in their pages what they and their ancestors wrote."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srcfast.errors import SrcfastError
from srcfast.generation.kv_pages import KVPages, PagedRow

PAGES = 400


class Oracle:
    """Every row beside the list of what it holds; keys are numbers, each written once."""

    def __init__(self, page_size: int) -> None:
        self.pages = KVPages(range(PAGES), page_size)
        self.store = np.full((PAGES, page_size), -1)
        self.rows: list[tuple[PagedRow, list[int]]] = []
        self.copied = self.written = 0

    def write(self, number: int, count: int) -> None:
        row, held = self.rows[number]
        for copy in self.pages.extend(row, row.length + count):
            assert 0 < copy.length < self.pages.page_size
            self.store[copy.target, : copy.length] = self.store[copy.source, : copy.length]
            self.store[copy.target, copy.length :] = -2  # only what is asked for may be relied on
            self.copied += 1
        for _ in range(count):
            page, offset = divmod(row.length, self.pages.page_size)
            self.store[row.pages[page], offset] = self.written
            held.append(self.written)
            row.length += 1
            self.written += 1

    def check(self) -> None:
        for row, held in self.rows:
            found = self.store[row.pages].ravel()[: row.length]
            assert found.tolist() == held
        listed = {page for row, _ in self.rows for page in row.pages}
        assert self.pages.free == PAGES - len(listed)  # no page is lost, none is handed out twice


steps = st.lists(
    st.tuples(st.sampled_from(["new", "fork", "cut", "write", "release"]), st.integers(0, 99), st.integers(0, 12)),
    max_size=60,
)


@given(steps, st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_every_path_s_keys_are_what_it_wrote(steps: list[tuple[str, int, int]], page_size: int) -> None:
    oracle = Oracle(page_size)
    for action, which, count in steps:
        if action == "new" or not oracle.rows:
            oracle.rows.append((oracle.pages.new_row(), []))
            continue
        number = which % len(oracle.rows)
        row, held = oracle.rows[number]
        if action == "fork" and len(oracle.rows) < 30:
            oracle.rows.append((oracle.pages.fork(row), list(held)))
        elif action == "cut":  # a fork of a beginning
            length = count % (row.length + 1)
            oracle.rows.append((oracle.pages.fork(row, length), held[:length]))
        elif action == "write":
            oracle.write(number, count)
        elif action == "release":
            oracle.pages.release(row)
            oracle.rows.pop(number)
        oracle.check()
    for row, _ in oracle.rows:
        oracle.pages.release(row)
    assert oracle.pages.free == PAGES


def test_only_a_partly_filled_last_page_is_copied_and_only_for_all_writers_but_one() -> None:
    for filled, copies in ((8, 0), (9, 2)):  # pages of 4
        oracle = Oracle(4)
        oracle.rows.append((oracle.pages.new_row(), []))
        oracle.write(0, filled)
        parent = oracle.rows.pop()
        for _ in range(3):
            oracle.rows.append((oracle.pages.fork(parent[0]), list(parent[1])))
        oracle.pages.release(parent[0])
        assert PAGES - oracle.pages.free == -(-filled // 4)  # a fork takes no page
        for number in range(3):
            oracle.write(number, 2)
        oracle.check()
        assert oracle.copied == copies


def test_what_is_reserved_and_not_written_is_not_handed_on() -> None:
    pages = KVPages(range(10), 4)
    row = pages.new_row()
    assert pages.extend(row, 20) == [] and len(row.pages) == 5
    child = pages.fork(row, 6)
    pages.release(row)
    assert len(child.pages) == 2 and pages.free == 8


def test_a_full_cache_says_so() -> None:
    pages = KVPages(range(2), 4)
    with pytest.raises(SrcfastError, match="full.*2 of 4 positions.*batch_size"):
        pages.extend(pages.new_row(), 9)
