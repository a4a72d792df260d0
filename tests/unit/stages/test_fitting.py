"""Every record is encoded once before training; what the models can't take is set aside then, and the run goes on without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.made_rows import set_settings, write_rows
from transformers import AutoTokenizer

from srcfast.calibrate import calibrate
from srcfast.config.settings import Config
from srcfast.data.jsonl import read_shards, write_shards
from srcfast.data.records import Preference
from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.models.embedded import checkpoint_directory
from srcfast.stages import calibration_run
from srcfast.stages.fitting import pair_fits
from srcfast.world.samples import world_samples

Srcfast = Callable[..., Result]
Row = dict[str, Any]

FACT = "It is red. " * 9 + "It is round."
# Fields of a sample of each training set that no model takes, and words of the reason.
UNFIT: dict[str, tuple[str, Row, str]] = {
    "a control token in the question": ("lessons", {"question": "What is </s> this?"}, "</s>"),
    "a control token in an earlier turn": (
        "questions",
        {"turns": [{"role": "user", "content": "</s>?"}, {"role": "assistant", "content": "Yes."}]},
        "</s>",
    ),
    "a question without end": ("questions", {"question": "Is it red or blue? " * 800}, "2048"),
    "a rationale without end": (
        "lessons",
        {"rationale": " ".join(f"Circle {n} is red." for n in range(140))},
        "rationale.token_budget",
    ),
    "facts without end": ("questions", {"facts": [f"Circle {n} is red." for n in range(100)]}, "scorer.token_budget"),
    "a held-out question without end": ("held-out", {"question": "Is it red or blue? " * 800}, "2048"),
}


def settings(folder: Path) -> Config:
    of = partial(set_settings, folder)
    values = {
        "name": "run",
        "output": str(folder),
        "quiet": True,
        "iterations": 1,
        "data": {
            "train": [of("lessons", use=["rationale"]), of("questions", use=["calibration"])],
            "evaluation": [of("held-out", split="test")],
        },
        "rationale": {"token_budget": 1200},
        "scorer": {"token_budget": 1200},
    }
    return Config.model_validate(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("lessons", "questions", "held-out")):
        samples = world_samples("train", 3, seed, image_dir=tmp_path / "pictures")
        rows = [sample.to_json() | {"images": [f"pictures/{image}" for image in sample.images]} for sample in samples]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def spoil(folder: Path, case: str, number: int = 1) -> str:
    """Give a sample of a set the fields of a case; return its id."""
    name, fields, _ = UNFIT[case]
    file = folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[number] |= fields
    write_rows(file, rows)
    return rows[number]["id"]


class StopHere(Exception):
    """Raised in place of the first stage."""


@pytest.mark.parametrize("case", UNFIT)
def test_a_sample_that_does_not_fit_is_set_aside_before_the_first_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    bad = spoil(folder, case)
    left: list[str] = []

    def stop(run: calibration_run.CalibrationRun, *_: Any, **__: Any) -> None:
        sets = (run.rationale_samples, run.calibration_samples, *(each.samples for each in run.evaluation_sets))
        left.extend(sample.id for samples in sets for sample in samples)
        raise StopHere

    monkeypatch.setattr(calibration_run.CalibrationRun, "stage", stop)
    with pytest.raises(StopHere):
        calibrate(settings(folder))
    (row,) = (json.loads(line) for line in (folder / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["sample_id"] == bad and UNFIT[case][2] in row["reason"] and "Fix:" in row["reason"]
    file = str(folder / f"{UNFIT[case][0]}.jsonl")
    assert (row["file"], row["line"]) == (file, 2) and row["reason"].startswith(f"{file}, line 2, sample ")
    assert bad not in left and len(left) == 8


def test_a_set_of_which_nothing_fits_ends_the_run_by_name(folder: Path) -> None:
    for number in range(3):
        spoil(folder, "a question without end", number)
    with pytest.raises(InputError, match="bad records of 3") as error:
        calibrate(settings(folder))
    assert "2048" in str(error.value)
    assert not (folder / "run" / "manifest.json").exists()


def test_more_than_max_rejected_end_the_run(folder: Path) -> None:
    spoil(folder, "a question without end")
    with pytest.raises(InputError, match="max_rejected = 0"):
        calibrate(settings(folder).replace(max_rejected=0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scorer": {"path": "nowhere"}}, "nowhere"),
        ({"lora": {"target_modules": ["q_proj", "wq"]}}, "found wq"),
        ({"rationale": {"teacher": "nowhere.jsonl"}}, "nowhere.jsonl"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(folder: Path, changes: Row, words: str) -> None:
    config = Config.model_validate(settings(folder).model_dump() | changes)
    with pytest.raises(InputError) as error:
        calibrate(config)
    assert words in str(error.value) and not (folder / "run" / "manifest.json").exists()


def test_without_rounds_no_r_scorer_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: calibration_run.CalibrationRun, *_: Any, **__: Any) -> None:
        raise StopHere

    spoil(folder, "facts without end")
    monkeypatch.setattr(calibration_run.CalibrationRun, "stage", stop)
    config = Config.model_validate(settings(folder).model_dump() | {"iterations": 0, "scorer": {"path": "nowhere"}})
    with pytest.raises(StopHere):
        calibrate(config)
    assert (folder / "run" / "rejected.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("command", "case"), [("rationale", "a rationale without end"), ("candidates", "a question without end")]
)
def test_a_command_sets_it_aside_too(srcfast: Srcfast, folder: Path, command: str, case: str) -> None:
    bad, data = spoil(folder, case), UNFIT[case][0]
    words = [command, "--data", folder / f"{data}.jsonl", "--output", folder / "output", "--quiet"]
    words += ["token_budget=1200", "epochs=1"] if command == "rationale" else ["num_candidates=2", "max_new_tokens=8"]
    result = srcfast(*words)
    assert result.exit_code == 0, result.output
    (row,) = (
        json.loads(line) for line in (folder / "output" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert row["sample_id"] == bad and UNFIT[case][2] in row["reason"]
    assert (row["file"], row["line"]) == (str(folder / f"{data}.jsonl"), 2)


def test_a_pair_that_does_not_fit_is_named_by_its_file_and_line(srcfast: Srcfast, tmp_path: Path) -> None:
    rows = [{"prompt": "What is it?", "chosen": "A circle. " * count, "rejected": "A square."} for count in (1, 1, 200)]
    data, output = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "output"
    result = srcfast("dpo", "--data", data, "--output", output, "--quiet", "token_budget=600", "epochs=1")
    assert result.exit_code == 0, result.output
    (row,) = (json.loads(line) for line in (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    assert (row["file"], row["line"], row["sample_id"], row["field"]) == (str(data), 3, "line-3", "chosen")
    assert row["reason"].startswith(
        f"{data}, line 3, sample 'line-3', field 'chosen': expected at most dpo.token_budget"
    )


@pytest.mark.parametrize("mode", ["pairwise", "independent"])
def test_scores_of_known_candidates_need_room_for_these_alone(srcfast: Srcfast, tmp_path: Path, mode: str) -> None:
    """The budget is what the first sample takes; the second's candidates are a word longer, the third has one text."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_directory("embedded", "scorer"))
    said = {
        "a": ["red.", "It is a red circle.", "It is all blue."],
        "b": ["It is a big red circle.", "It is all red."],
        "c": ["red."] * 2,
    }
    samples = [{"id": key, "question": "What is it?", "answer": "red", "facts": [FACT]} for key in said]
    names = ("It is a red circle.", "It is all blue." if mode == "pairwise" else "none")
    parts = [
        f"Question: What is it?\nFacts: {FACT}\nAnswer: red\n",
        f"First: {names[0]}\n",
        f"Second: {names[1]}\nBetter:",
    ]
    budget = sum(len(tokenizer(part, add_special_tokens=False).input_ids) for part in parts)
    candidates = [
        {"id": f"{key}{number}", "sample_id": key, "text": text, "logprob": -1.0}
        for key, texts in said.items()
        for number, text in enumerate(texts)
    ]
    write_shards(tmp_path / "candidates", candidates)
    data, output = write_rows(tmp_path / "samples.jsonl", samples), tmp_path / "output"
    words = ["--data", data, "--candidates", tmp_path / "candidates", "--output", output, "--quiet", f"mode={mode}"]
    for limit, bad in ((budget, ["b"]), (budget - 1, ["a", "b"])):
        result = srcfast("score", *words, f"token_budget={limit}")
        assert result.exit_code == 0, result.output
        assert [row["sample_id"] for _, _, row in read_shards(output)] == [key for key in said if key not in bad]
        rows = [json.loads(line) for line in (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(row["sample_id"], row["line"], row["field"]) for row in rows] == [
            (key, [*said].index(key) + 1, "candidates") for key in bad
        ]


def test_log_probabilities_are_of_all_rows_or_of_none(srcfast: Srcfast, tmp_path: Path) -> None:
    """The output has a row for each line, so a line that does not fit ends the command, before anything is computed."""
    rows = [{"prompt": "What is it?", "response": "A circle. " * count} for count in (1, 200)]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "logprobs.jsonl"
    result = srcfast("logprob", "--data", data, "--output", output, "token_budget=600")
    assert result.exit_code == 2 and "token_budget" in result.output
    assert f"{data}, line 2, sample 'request 2', field 'response'" in result.output.replace("\n", " ")
    assert not output.exists() and not (tmp_path / "logprobs.jsonl.checkpoint").exists()


def test_pairs_fit_up_to_the_token_budget_and_differ_in_tokens() -> None:
    model = load_lvlm("embedded")
    pair = Preference("p", (), "What is it?", "It is a red circle.", "It is a blue square.")
    prompt = model.encode_prompt("What is it?", [])
    chosen, rejected = (model.encode_response(text) for text in (pair.chosen, pair.rejected))
    shared = next(n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    tokens = len(prompt) + len(chosen) + len(rejected) - shared  # what both begin with is in the tree once
    assert pair_fits(model, tokens, pair) and not pair_fits(model, tokens - 1, pair)
    assert not pair_fits(model, 10_000, Preference("p", (), "What is it?", "A circle.", "A circle."))
