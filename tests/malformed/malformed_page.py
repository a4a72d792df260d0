"""docs/malformed.md, written from the corpus: `python tests/malformed/malformed_page.py` writes it anew."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from malformed_corpus import CORPUS

PAGE = Path(__file__).parents[2] / "docs" / "malformed.md"
HEAD = """# Malformed input

What is read can be wrong in any way: data sets, images, settings, checkpoints, adapters, and the files that an earlier
stage, or the run itself, has left. Each ends in one of three ways, and never in a trace from the depths, a hang, or a
training on what nobody meant:

- **an error by name**: file, line, field, what was expected, what was found, how to mend it;
- **set aside**: a bad record goes to `rejected.jsonl` with its reason, the others go on, and `max_rejected` stops the
  run where there are too many; or
- **done again**: a training's damaged checkpoint, or a stage's damaged part, is passed over with a warning that says
  what is wrong with it.

`tests/malformed` holds the corpus: bytes that plain functions write, each named below, and for each the words
that its error must say. **{count} of {count} end cleanly.** The tests also give each parser some hundred mutated
inputs, the same ones each time (`make fuzz`: thousands); only errors by name may come out. This page is written from
the corpus (`python tests/malformed/malformed_page.py`), and a test holds the two equal.

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
