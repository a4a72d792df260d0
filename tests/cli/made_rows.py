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
