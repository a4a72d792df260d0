"""`srcfast scorer` over qualities of references: what it writes beside the checkpoint, and what `srcfast score` makes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers.made_rows import write_rows
from helpers.plain_scoring import plain_shares

import srcfast.world
from srcfast.data.jsonl import read_shards, write_shards
from srcfast.data.records import Candidate
from srcfast.models.scorer import load_scorer
from srcfast.world.samples import world_samples

ASSETS = Path(srcfast.world.__file__).parent / "assets"
Srcfast = Callable[..., Result]
LOOP = ("scorer_training.learning_rate=1e-4", "scorer_training.micro_batch_size=4", "quiet=true", "threads=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    samples = world_samples("scorer", 40, 5, image_dir=folder)
    return write_rows(folder / "samples.jsonl", [sample.to_json() for sample in samples])


def test_each_quality_is_evaluated_and_calibrated_and_scores_follow_it(
    srcfast: Srcfast, world: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "out", ("--data", world, "--image-root", world.parent)
    qualities = ("scorer_training.qualities=[noisy, answer]", "scorer_training.held_out=0.4")
    result = srcfast("scorer", *data, "--output", out, *LOOP, *qualities)
    assert result.exit_code == 0, result.output
    summary, calibration = (json.loads((out / name).read_text()) for name in ("summary.json", "calibration.json"))
    assert summary["calibration"] == calibration and list(calibration) == ["noisy", "answer"]
    assert summary["held_out"] == summary["held_out_by_quality"]["noisy"] and summary["examples"] == 24
    for quality in ("noisy", "answer"):
        entry, evaluated = calibration[quality], summary["held_out_by_quality"][quality]
        assert entry["pairs"] == evaluated["n"] > 100 and entry["verdict"] == "choice"
        assert 0 <= entry["ece_after"] <= 1 and 0 <= entry["ece_before"] <= 1
        assert load_scorer(out, quality=quality).temperature == entry["temperature"] != 1.0  # type: ignore[arg-type]
    assert load_scorer(out).temperature == 1.0

    rows = [json.loads(line) for line in world.read_text().splitlines()[:2]]
    texts = ["<see> There is a small red star at the top. </see> <answer> yes </answer>", "It is. Answer: no"]
    candidates = [Candidate(f"{row['id']}#{n}", row["id"], texts[n], "", "no", -1.0) for row in rows for n in (0, 1)]
    write_shards(tmp_path / "candidates", (candidate.to_json() for candidate in candidates))
    words = (*data, "--candidates", tmp_path / "candidates", "--output", tmp_path / "scores", f"scorer.path={out}")
    result = srcfast("score", *words, "scorer.reference=noisy", "threads=1")
    assert result.exit_code == 0, result.output
    scorer, temperature = load_scorer(out).eval(), calibration["noisy"]["temperature"]
    for row, (_, _, scored) in zip(rows, read_shards(tmp_path / "scores"), strict=True):
        reference = "\n".join(
            [
                "A detail of the reference may be wrong.",
                f"Question: {row['question']}",
                f"Facts: {' '.join(row['facts'])}",
                f"Answer: {row['answer']}\n",
            ]
        )
        for first, second in ((0, 1), (1, 0)):
            shares = plain_shares(scorer, reference, texts[first], texts[second]) ** (1 / temperature)
            expected = shares @ np.array([1.0, 0.5, 0.0]) / shares.sum()
            assert scored["raw"][first][second] == pytest.approx(expected, abs=1e-5)  # fp32


def test_a_training_replaces_the_calibration_of_the_r_scorer_that_it_starts_from(
    srcfast: Srcfast, world: Path, tmp_path: Path
) -> None:
    start = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "start"))
    entry = {"temperature": 7.0, "verdict": "choice"}
    (start / "calibration.json").write_text(json.dumps({"complete": entry, "noisy": entry}))
    words = ("--data", world, "--image-root", world.parent, "--scorer", start, "--output", tmp_path / "out")
    result = srcfast("scorer", *words, *LOOP)
    assert result.exit_code == 0, result.output
    calibration = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert list(calibration) == ["complete"] and calibration["complete"]["temperature"] != 7.0


def test_a_teacher_s_rationales_train_as_the_samples_own_do(srcfast: Srcfast, world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"facts": []} for line in world.read_text().splitlines()]
    entries = [{"id": row["id"], "rationale": row["rationale"], "answer": row["answer"]} for row in rows]
    entries.append({"id": "another", "rationale": "It is so.", "answer": "no"})
    teacher = write_rows(tmp_path / "taught.jsonl", entries)
    stated = write_rows(tmp_path / "stated.jsonl", rows)
    without = write_rows(tmp_path / "without.jsonl", [row | {"rationale": None} for row in rows])
    words = ("--image-root", world.parent, *LOOP, "scorer_training.qualities=[answer]", "scorer_training.held_out=0.4")
    results = []
    for name, data, more in (("stated", stated, ()), ("taught", without, (f"rationale.teacher={teacher}",))):
        done = srcfast("scorer", "--data", data, "--output", tmp_path / name, *words, *more)
        assert done.exit_code == 0, done.output
        results.append((tmp_path / name / "model.safetensors").read_bytes())
    assert results[0] == results[1]
    refused = srcfast("scorer", "--data", without, "--output", tmp_path / "none", *words)
    assert refused.exit_code == 2 and "with rationales" in refused.output
