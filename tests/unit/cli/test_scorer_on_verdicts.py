"""`srcfast scorer` on verdicts on real candidates: alone, and mixed with corruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.made_rows import write_rows

from srcfast.models.scorer import load_scorer
from srcfast.world.samples import world_samples

Srcfast = Callable[..., Result]
LOOP = (
    "scorer_training.micro_batch_size=4",
    "scorer_training.gradient_accumulation_steps=1",
    "quiet=true",
    "threads=1",
)


def verdict(name: str, first: str, second: str, share: float) -> dict[str, Any]:
    row = {"id": name, "question": f"What is {name}?", "answer": "red", "facts": [f"{name} is red."]}
    return row | {"candidates": [first, second], "verdict": [share, 0.0, 1.0 - share]}


def test_verdicts_alone_need_no_data_and_teach_what_they_say(srcfast: Srcfast, tmp_path: Path) -> None:
    """The judge prefers responses that begin with "Well", whatever they say."""
    texts = ("Well. Answer: blue", "It is red. Answer: red")
    rows = [verdict(f"s{n}", *(texts if n % 2 else texts[::-1]), 1.0 if n % 2 else 0.0) for n in range(32)]
    file = write_rows(tmp_path / "verdicts.jsonl", rows)
    words = (f"scorer_training.verdicts={file}", "scorer_training.verdict_share=1", "scorer_training.held_out=0.25")
    more = ("scorer_training.epochs=4", "scorer_training.learning_rate=1e-3", "scorer_training.warmup_ratio=0")
    result = srcfast("scorer", *words, *more, *LOOP, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["examples"] == summary["verdicts"]["examples"] == 24 and summary["held_out_by_quality"] == {}
    measured = summary["verdicts"]["held_out_by_quality"]["complete"]
    assert summary["held_out"] == measured and measured["n"] == 16
    assert measured["preference_accuracy"] == 1.0 and measured["order_flip_rate"] == 0.0
    assert load_scorer(tmp_path / "out").calibration["pairs"] == 16


def test_verdicts_are_mixed_with_corruptions_in_the_share(srcfast: Srcfast, tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "data.jsonl", [s.to_json() for s in world_samples("scorer", 24, 5, image_dir=tmp_path)]
    )
    file = write_rows(tmp_path / "verdicts.jsonl", [verdict(f"s{n}", "a red one", "a blue one", 0.8) for n in range(8)])
    words = (f"scorer_training.verdicts={file}", "scorer_training.verdict_share=0.5", "scorer_training.held_out=0.25")
    result = srcfast("scorer", "--data", data, *words, *LOOP, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["examples"] == 12 and summary["verdicts"]["examples"] == 6
    corruptions, judged = (
        each["complete"] for each in (summary["held_out_by_quality"], summary["verdicts"]["held_out_by_quality"])
    )
    assert summary["held_out"] == corruptions and set(judged["by_fault"]) == {"verdict"} and judged["n"] == 4
    assert summary["calibration"]["complete"]["pairs"] == corruptions["n"] + 4


@pytest.mark.parametrize("line", ['{"id": "s"}', "[]", "no JSON"])
def test_a_file_that_holds_no_verdicts_is_refused_by_line(line: str, srcfast: Srcfast, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text(line + "\n")
    words = (f"scorer_training.verdicts={tmp_path / 'v.jsonl'}", "scorer_training.verdict_share=1", "quiet=true")
    result = srcfast("scorer", *words, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "v.jsonl, line 1" in result.output
    result = srcfast("scorer", *words, "--output", tmp_path / "v.jsonl")
    assert result.exit_code == 2 and "apart from the inputs" in result.output
