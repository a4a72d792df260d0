"""Memory as work grows: a stage holds what its result is made of, a sample at a time of the rest, and nothing of a broken file.

`srcfast bench growth` measures the same stages up to 100,000 samples.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import write_jsonl, write_shards
from srcfast.data.readers import read_samples
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.run.chunks import ChunkFiles
from srcfast.stages.evaluation import predictions_of, summarise, write_predictions
from srcfast.stages.headroom import measure_headroom
from srcfast.stages.references import reuse_candidate_logprobs
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
    Stages.sum_up_answers: 0,
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


# Evaluation, headroom, references: a response is long, and what is kept of it is not -----------------------------------

A_RESPONSE = 4 * KiB
PER_PREDICTION = 64  # bytes: none is needed
PER_PAIR = KiB // 2  # beside the pair: its copy with a reference, which shares its texts


def long_text(number: int) -> str:
    words = f"It is number {number}. " * (A_RESPONSE // 20)
    return f"<see> {words}</see> <answer> {number} </answer>"


def samples_of(size: int) -> list[Sample]:
    return [Sample(f"s{number}", (), "How many?", str(number)) for number in range(size)]


def candidates_of(size: int) -> Iterator[tuple[str, list[Candidate]]]:
    for number in range(size):
        name = f"s{number}"
        yield name, [Candidate(f"{name}/{k}", name, long_text(k), "", "", -2.0, (k,)) for k in (number, number + 1)]


def score_rows(size: int) -> Iterator[dict[str, Any]]:
    for number in range(size):
        filler = {"raw": [0.5] * (A_RESPONSE // 8), "verdicts": 2}
        wins = [[0.5, 0.6], [0.4, 0.5]]
        yield {"sample_id": f"s{number}", "scores": [0.6, 0.4], "win_probability": wins, **filler}


def growth_of(work: Callable[[int], Callable[[], Any]]) -> int:
    """How many more bytes the work takes at its peak for LARGE than for SMALL; `work` prepares what is held anyhow."""
    found = []
    for size in (20, SMALL, LARGE):  # the first for what is made once
        prepared = work(size)
        tracemalloc.start()
        try:
            kept = prepared()
            found.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        del kept
    return found[2] - found[1]


def test_predictions_are_written_and_summed_up_without_being_held(tmp_path: Path) -> None:
    def work(size: int) -> Callable[[], Any]:
        samples, file = samples_of(size), tmp_path / f"{size}.jsonl"
        rows = ({"id": f"s{number}", "text": long_text(number + number % 2)} for number in range(size))
        write_jsonl(file, ({} if row is None else row for row in (None, *rows)))  # a piece's head comes first

        def run() -> None:
            counts = write_predictions(tmp_path / f"p{size}", samples, predictions_of(samples, ChunkFiles((file,))))
            entry = summarise(counts, model="base", dataset="d", split="test", resamples=10, seed=0)
            assert entry["n"] == size and entry["accuracy"] == 0.5

        return run

    assert growth_of(work) <= PER_PREDICTION * (LARGE - SMALL) + SLACK


def test_headroom_holds_one_sample_s_candidates_and_scores() -> None:
    def work(size: int) -> Callable[[], Any]:
        samples = samples_of(size)

        def run() -> None:
            entry = measure_headroom(samples, [True] * size, InOrder(candidates_of(size)), score_rows(size))
            assert entry["n"] == size and entry["n_candidates"] == 2.0

        return run

    assert growth_of(work) <= PER_PREDICTION * (LARGE - SMALL) + SLACK


def test_references_hold_a_copy_of_each_pair_and_no_candidates() -> None:
    model = SimpleNamespace(
        decoder=SimpleNamespace(head_weight=torch.zeros(1)),
        encode_response=lambda text: np.array([int(text.split()[-2])]),  # the token of `candidates_of`
    )

    def exact(model: Any, pairs: list[Preference], **_: Any) -> list[Preference]:
        return [replace(pair, reference_chosen_logprob=-2.0, reference_rejected_logprob=-2.0) for pair in pairs]

    def work(size: int) -> Callable[[], Any]:
        samples = {sample.id: sample for sample in samples_of(size)}
        pairs = [
            Preference(name, (), "How many?", a.text, b.text, extra={"chosen_id": a.id, "rejected_id": b.id})
            for name, (a, b) in candidates_of(size)
        ]

        def run() -> Any:
            known = InOrder(candidates_of(size))
            done, takeover = reuse_candidate_logprobs(
                model, pairs, samples, known, reference_hash="abc", token_budget=1, logprobs=exact
            )
            assert takeover.rechecked + takeover.reused == size
            return done

        return run

    assert growth_of(work) <= PER_PAIR * (LARGE - SMALL) + SLACK
