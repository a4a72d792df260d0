"""CORPUS.md lists the corpus as it is."""

from __future__ import annotations

from malformed_page import PAGE, page


def test_the_page_is_what_the_corpus_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run malformed_page.py beside this test to write it again"
