"""Rows for the commands to read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "the red green blue circle square is left of right how many what color two three yes no see think answer"


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(WORDS.split(), k=length)).capitalize() + "."


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def set_settings(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """Settings of the data set that `write_rows` has written into `folder / NAME.jsonl`."""
    return {"name": name, "format": "jsonl", "path": str(folder / f"{name}.jsonl")} | more


def preference_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "sample_id": f"p{index}",
            "images": [rng.choice(("a.png", "b.png", "c.png"))],
            "prompt": sentence(rng, rng.randint(3, 9)),
            "chosen": f"<see> {sentence(rng, rng.randint(2, 12))} </see> <answer> two </answer>",
            "rejected": f"<see> {sentence(rng, rng.randint(2, 12))} </see> <answer> three </answer>",
            "confidence": rng.uniform(0.2, 1.0),
        }
        for index in range(count)
    ]
