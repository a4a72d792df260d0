"""Commands over several datasets: each set's bad records count for that set, and no two samples share an id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from srcfast.data.jsonl import write_shards

Srcfast = Callable[..., Result]


def dataset(folder: Path, name: str, good: int, bad: int, image_root: Path, first_id: int = 0) -> str:
    """Write a file of records and return the words that name it as a dataset."""
    rows = [
        {"id": str(first_id + k), "image": "a.png", "question": "what color", "answer": "red", "facts": ["It is red."]}
        for k in range(good)
    ]
    rows += [{"id": f"{name}-bad-{k}", "image": "missing.png", "question": "what", "answer": "red"} for k in range(bad)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{{name: {name}, format: jsonl, path: {file}, image_root: {image_root}}}"


def test_a_share_of_bad_records_is_one_of_each_evaluation_set(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    sets = [
        dataset(tmp_path, "first", good=3, bad=2, image_root=image_root),
        dataset(tmp_path, "second", good=1, bad=0, image_root=image_root),
    ]
    words = [f"data.evaluation=[{', '.join(sets)}]", "evaluation.max_new_tokens=3", f"output={tmp_path / 'runs'}"]
    result = srcfast(
        "evaluate", "--model", model_dir, "--output", tmp_path / "out", "--quiet", "max_rejected=0.5", *words
    )
    assert result.exit_code == 0, result.output  # 2 of 5, and 0 of 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rejected"] == 2
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 2


def test_a_list_of_rejected_records_is_that_of_the_last_command(
    srcfast: Srcfast, image_root: Path, tmp_path: Path
) -> None:
    write_shards(tmp_path / "none", [])

    def curate(bad: int, *words: str) -> Result:
        named = dataset(tmp_path, "set", good=3, bad=bad, image_root=image_root)
        options = ["--candidates", tmp_path / "none", "--output", tmp_path / "out", "--quiet", "pairing=random"]
        return srcfast("curate", *options, f"data.train=[{named}]", f"output={tmp_path / 'runs'}", *words)

    rejected = tmp_path / "out" / "rejected.jsonl"
    assert curate(2, "max_rejected=1").exit_code == 2 and len(rejected.read_text().splitlines()) == 2
    assert curate(1, "max_rejected=1").exit_code == 0 and len(rejected.read_text().splitlines()) == 1
    assert curate(0).exit_code == 0 and not rejected.exists()


def test_options_are_checked_before_any_data_are_read(srcfast: Srcfast, tmp_path: Path) -> None:
    missing = ["--data", tmp_path / "missing.jsonl", "--output", tmp_path / "out"]
    assert "--candidates" in srcfast("curate", *missing).output
    assert "--scores" in srcfast("curate", *missing, "--candidates", tmp_path).output
    assert "--candidates" in srcfast("score", *missing).output


def test_two_training_sets_that_share_an_id_are_refused(srcfast: Srcfast, image_root: Path, tmp_path: Path) -> None:
    sets = [dataset(tmp_path, name, good=2, bad=0, image_root=image_root, first_id=k) for k, name in enumerate("ab")]
    words = [f"data.train=[{', '.join(sets)}]", f"output={tmp_path / 'runs'}"]
    result = srcfast("candidates", "--output", tmp_path / "out", "--quiet", *words)
    assert result.exit_code == 2 and "an id that no other" in result.output, result.output


@pytest.mark.parametrize("name", ["nul.jsonl", "a..jsonl", "a\nb.jsonl", f"{'a' * 220}.jsonl", ".jsonl"])
def test_a_file_of_data_that_is_to_name_predictions_must_have_a_name_for_them(
    srcfast: Srcfast, image_root: Path, tmp_path: Path, name: str
) -> None:
    """Its name without the ending is that of the evaluation set; where nothing is named by it, any is taken."""
    rows = [{"id": "a", "images": ["a.png"], "question": "What?", "answer": "red"}, {"id": "b"}]
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    options = [
        "--model",
        "no-such",
        "--data",
        tmp_path / name,
        "--image-root",
        image_root,
        "--output",
        tmp_path / "out",
    ]
    result = srcfast("evaluate", *options)
    assert result.exit_code == 2 and "they name files" in result.output, result.output
    assert not (tmp_path / "out").exists()
    result = srcfast("candidates", *options)
    assert result.exit_code == 2 and "no-such" in result.output, result.output
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["sample_id"] == "b"
