"""tests/system/malformed/CORPUS.md, written from the corpus: run this file to write it again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from malformed_corpus import CORPUS

PAGE = Path(__file__).with_name("CORPUS.md")
HEAD = """# Malformed inputs under test

Each input below is written by a plain function of this folder. `test_malformed.py` reads it and checks that the error, or
the reason in `rejected.jsonl`, has the expected words. **{count} of {count} do.** `docs/data.md` describes what malformed
input does. The fuzz tests (`test_fuzz.py`) give each parser some hundred mutated inputs, the same ones each time (`make
fuzz`: thousands); only errors of srcfast may come out.

`malformed_page.py` writes this page from the corpus, and `test_page.py` checks that it is up to date.

| what is read | malformed inputs |
| --- | ---: |
"""


def page() -> str:
    """The page's whole text."""
    counts = Counter(case.kind for case in CORPUS)
    lines = [f"| {kind} | {count} |" for kind, count in counts.items()]
    text = HEAD.format(count=len(CORPUS)) + "\n".join((*lines, f"| all | {len(CORPUS)} |")) + "\n"
    for kind in counts:
        wrong = "; ".join(case.wrong.replace("|", "\\|") for case in CORPUS if case.kind == kind)
        text += f"\n## {kind}\n\n{_wrapped(wrong)}.\n"
    return text


def _wrapped(text: str, width: int = 118) -> str:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
