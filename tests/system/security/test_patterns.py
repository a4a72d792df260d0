"""A tokenizer's regular expressions are foreign code: one that never comes to an end is an error, not a hang or a trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from srcfast.models.embedded import checkpoint_directory

# Patterns that take more steps than there is time, on words; tokenizers' engine gives up after ten million.
PATTERNS = {
    "words in words": r"(\w+\s?)+$",
    "letters in letters": r"([A-Za-z]+\s*)*$",
    "anything twice": "([^?]|[a-z ])+$",
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_pattern_without_end_is_an_error(
    srcfast: Callable[..., Result], tmp_path: Path, part: str, name: str
) -> None:
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(checkpoint_directory("embedded", "base"), model)
    settings = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    pattern = {"pattern": {"Regex": PATTERNS[name]}}
    if part == "normalizer":
        settings["normalizer"] = {"type": "Replace", "content": "", **pattern}
    else:
        split = {"type": "Split", "behavior": "Isolated", "invert": False, **pattern}
        settings[part] = {"type": "Sequence", "pretokenizers": [split, settings[part]]}
    (model / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    question = "What is the color of the circle that stands to the left of all of the squares?"
    data.write_text(json.dumps({"id": "1", "question": question, "answer": "red"}), encoding="utf-8")
    result = srcfast("candidates", "--model", model, "--data", data, "--output", tmp_path / "output", "--quiet")
    assert result.exit_code == 1, result.output
    assert "retry-limit-in-match over. Fix: take another tokenizer.json" in result.output
    assert "Traceback" not in result.output
