"""The blind guess is the training questions' most frequent answer by kind, of sets with their own pictures alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from srcfast.world.samples import world_samples
from srcfast_benchmarks import blind_guess


def test_guesses_are_the_most_frequent_answer_of_a_kind(tmp_path: Path) -> None:
    world = {"name": "world", "format": "world"}
    training = {**world, "split": "train", "limit": 200}
    sets = [{**world, "split": split, "limit": 60} for split in ("test", "new_questions")]
    sets.append({**world, "name": "world-blank", "split": "test", "limit": 60, "images": "blank"})
    settings = {"data": {"train": [training], "evaluation": sets}, "seed": "{seed}"}
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"name": "trial", "seeds": 2, "settings": settings, "arms": {"one": {}}}))
    blind_guess.main(study, tmp_path / "blind.json")
    result = json.loads((tmp_path / "blind.json").read_text())

    train, test, others = (
        world_samples(split, n, 0, image_dir=tmp_path)
        for split, n in (("train", 200), ("test", 60), ("new_questions", 60))
    )
    guesses = {
        kind: Counter(one.answer for one in train if one.extra["kind"] == kind).most_common(1)[0][0]
        for kind in {one.extra["kind"] for one in train}
    }
    right = [guesses[one.extra["kind"]] == one.answer for one in test if one.extra["kind"] in guesses]
    assert len(right) == len(test)
    assert result["sets"]["world-test"]["accuracy"][0] == pytest.approx(sum(right) / len(right))
    # No training question is of these kinds: the most frequent answer of all.
    assert not {one.extra["kind"] for one in others} & set(guesses)
    commonest = Counter(one.answer for one in train).most_common(1)[0][0]
    expected = sum(one.answer == commonest for one in others) / len(others)
    assert result["sets"]["world-new_questions"]["accuracy"][0] == pytest.approx(expected)
    assert set(result["sets"]) == {"world-test", "world-new_questions"}  # no control
    assert result["accuracy"][0] == pytest.approx(sum(of["accuracy"][0] for of in result["sets"].values()) / 2)


def test_a_set_without_kinds_is_guessed_by_the_most_frequent_answer(tmp_path: Path) -> None:
    rows = [{"id": str(n), "question": "Which?", "answer": "no" if n % 3 else "yes", "facts": ["A."]} for n in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "rows", "format": "jsonl", "path": str(file)}
    settings = {"data": {"train": [data], "evaluation": [{**data, "split": "test"}]}}
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"name": "trial", "settings": settings, "arms": {"one": {}}}))
    blind_guess.main(study, tmp_path / "blind.json")
    assert json.loads((tmp_path / "blind.json").read_text())["accuracy"][0] == pytest.approx(6 / 9)
