"""docs/malformed.md tells of the corpus as it is."""

from __future__ import annotations

from malformed_page import PAGE, page


def test_the_page_is_what_the_corpus_says() -> None:
    mend = "write it anew: python tests/malformed/malformed_page.py"
    assert PAGE.read_text(encoding="utf-8") == page(), mend
