"""A run's directory with candidates and scores alone, as far as what judges its candidates reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from srcfast.data.jsonl import write_shards

TEXTS = ("<see> It is {0}. </see> <think> So it is. </think> <answer> {0} </answer>", "It is blue.", "It is green.")


def score_row(sample_id: str, count: int, confidence: Sequence[float], win: float = 0.75) -> dict[str, Any]:
    """The row of `count` candidates; `confidence` of the pairs (0, 1), (0, 2), ..., (1, 2), ...; of each the former wins."""
    u = [[0.0] * count for _ in range(count)]
    q = [[0.5] * count for _ in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    for (i, j), value in zip(pairs, confidence, strict=True):
        u[i][j] = u[j][i] = value
        if value:
            q[i][j], q[j][i] = win, 1 - win
    return {
        "sample_id": sample_id,
        "candidate_ids": [f"{sample_id}#{i}" for i in range(count)],
        "scores": [0.5] * count,
        "win_probability": q,
        "confidence": u,
        "raw": q,
        "alone": [0.5] * count,
        "flip_rate": 0.0,
        "tie_rate": 0.0,
        "pairs": len(pairs),
        "verdicts": 2 * len(pairs),
    }


def write_judged_run(
    folder: Path,
    count: int = 6,
    texts: Sequence[str] = TEXTS,
    scores: Mapping[str, Sequence[float]] | None = None,
    **sample: Any,
) -> Path:
    """Write a run of samples `s0`, `s1`, ..., each with a picture and the texts as candidates; return its directory.

    Args:
        scores: by sample the confidences of its pairs, as of `score_row`; None: no scores were written.
        sample: fields of all samples.
    """
    colours = ("red", "orange", "yellow", "white", "black", "gray", "brown", "pink")
    run = folder / "run"
    (run / "iteration-1").mkdir(parents=True)
    rows, candidates = [], []
    for n in range(count):
        colour = colours[n % len(colours)]
        Image.new("RGB", (8, 8), (n, 0, 0)).save(folder / f"{n}.png")
        row = {"id": f"s{n}", "image": f"{n}.png", "question": f"Which colour {n}?", "answer": colour}
        rows.append(row | {"facts": [f"It is {colour}."]} | sample)
        for i, text in enumerate(texts):
            candidates.append(
                {
                    "id": f"s{n}#{i}",
                    "sample_id": f"s{n}",
                    "text": text.format(colour),
                    "logprob": -1.0,
                    "answer": colour,
                }
            )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "data", "format": "jsonl", "path": str(folder / "data.jsonl"), "use": ["calibration"]}
    settings = {"name": "run", "output": str(folder), "iterations": 1, "data": {"train": [data]}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    write_shards(run / "iteration-1" / "candidates", candidates)
    if scores is not None:
        score_rows = [score_row(name, len(texts), confidence) for name, confidence in scores.items()]
        write_shards(run / "iteration-1" / "scores", score_rows)
    return run
