"""Memory as work grows: a stage holds what its result is made of, a sample at a time of the rest, and nothing of a broken file.

`srcfast bench growth` measures the same stages up to 100,000 samples.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srcfast.data.jsonl import write_shards
from srcfast.data.readers import read_samples
from srcfast_benchmarks import growth
from srcfast_benchmarks.growth import Stages

KiB, MiB = 1 << 10, 1 << 20
SMALL, LARGE, SHARD = 100, 400, 50  # samples, and rows of the shards that are written
# Most bytes that each further sample may add to a stage's peak: what its result keeps of it. 0: it is read past.
KEPT = {
    Stages.read_json_lines: 2 * KiB,
    Stages.build_and_pack_trees: 8 * KiB,  # 700 tokens of 8 bytes each, and the objects that hold them
    Stages.write_candidates: 0,
    Stages.read_candidates: 0,
    Stages.write_scores: 0,
    Stages.curate: 2 * KiB,
    Stages.write_preferences: 0,
    Stages.read_preferences: 0,
    Stages.sum_up_answers: 1 * KiB,
    Stages.draw_report: 3 * KiB,  # matplotlib keeps more of one picture than of another, whatever their size
}
SLACK = MiB // 8  # of every stage: caches, buffers


def peaks(folder: Path, size: int) -> dict[Callable[[Stages], int], int]:
    """Bytes that each stage takes at its most, beyond those that were there when it began."""
    folder.mkdir()
    stages, found = Stages(folder, size), {}
    tracemalloc.start()
    try:
        for stage in KEPT:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            assert stage(stages) > 0
            found[stage] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return found


def test_each_further_sample_costs_what_is_kept_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "CANDIDATES", 2)
    monkeypatch.setattr(growth, "write_shards", partial(write_shards, shard_size=SHARD))
    (tmp_path / "first").mkdir()
    first = Stages(tmp_path / "first", 20)
    for stage in KEPT:  # imports, and whatever else is made once
        stage(first)
    small, large = peaks(tmp_path / "small", SMALL), peaks(tmp_path / "large", LARGE)
    for stage, kept in KEPT.items():
        allowed = kept * (LARGE - SMALL) + SLACK
        assert large[stage] - small[stage] <= allowed, (stage.__name__, small[stage], large[stage], allowed)


def test_broken_images_leave_nothing_in_memory(tmp_path: Path) -> None:
    """100 of 2 MiB each are set aside, their reasons kept; of their bytes there is one file's at a time."""
    noise = np.random.default_rng(1).integers(0, 256, (800, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.bmp")
    broken = (tmp_path / "whole.bmp").read_bytes()[:-100]
    for number in range(100):
        (tmp_path / f"{number}.bmp").write_bytes(broken)
    names = ["whole.bmp", *(f"{number}.bmp" for number in range(100))]
    rows = [{"id": name, "image": name, "question": "q", "answer": "a"} for name in names]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rejected: list[dict] = []
    tracemalloc.start()
    try:
        samples = read_samples(tmp_path / "rows.jsonl", format="jsonl", image_root=tmp_path, rejected=rejected)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 1 and len(rejected) == 100
    assert current < 2 * MiB and peak < 5 * len(broken)
