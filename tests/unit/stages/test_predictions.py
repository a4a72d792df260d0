"""Predictions as VLMEvalKit reads them back."""

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from srcfast.config.settings import Config
from srcfast.data.records import Sample
from srcfast.data.vlmeval import QUESTION_KEY
from srcfast.stages.datasets import EvaluationSet, read_evaluation_sets
from srcfast.stages.evaluation import predict, summarise, write_predictions


def test_a_table_s_question_options_and_split_come_back_with_the_bare_answer(tmp_path: Path) -> None:
    asked = "Question: Which?\nOptions:\nA. red\nB. blue\nPlease select the correct answer from the options above."
    extra = {QUESTION_KEY: "Which?", "options": {"A": "red", "B": "blue"}, "split": "dev", "category": "color"}
    rows = [
        predict(Sample("1", (), asked, "B", extra=extra), "<see> It is blue. </see> <answer> B </answer>"),
        predict(Sample("2", (), "How many?", "2"), "no idea at all about what you may mean"),
    ]
    write_predictions(tmp_path / "p", [row.sample for row in rows], iter(rows))
    with open(tmp_path / "p.tsv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file, delimiter="\t")
    assert (first["question"], first["A"], first["B"], first["split"]) == ("Which?", "red", "blue", "dev")
    assert (first["prediction"], first["category"], first["rationale"]) == ("B", "color", "It is blue.")
    assert (second["question"], second["prediction"], second["A"], second["split"]) == ("How many?", "", "", "")


def read_table(folder: Path, rows: list[dict[str, str]], **more: str) -> EvaluationSet:
    """Write a table as VLMEvalKit's, each row with the same picture, and read it as an evaluation set."""
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    lines = [["image_path", *rows[0]]] + [["a.png", *row.values()] for row in rows]
    (folder / "t.tsv").write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    dataset = {
        "name": "t",
        "format": "vlmeval_tsv",
        "path": str(folder / "t.tsv"),
        "image_root": str(folder),
        "split": "test",
        **more,
    }
    config = Config(data={"evaluation": [dataset]}, output=str(folder / "out"))
    [read] = read_evaluation_sets(config.data.evaluation, config, folder / "images", [])
    return read


def entry_of(folder: Path, rows: list[dict[str, str]], texts: list[str]) -> dict[str, Any]:
    """Return the summary's entry of these responses to a table's rows."""
    dataset = read_table(folder, rows)
    made = [predict(sample, text, dataset.rule) for sample, text in zip(dataset.samples, texts, strict=True)]
    counts = write_predictions(folder / "p", dataset.samples, iter(made), dataset.rule)
    return summarise(counts, model="m", dataset="t", split="test", resamples=100, seed=0)


def test_a_table_of_multiple_choice_has_its_abilities_and_its_chance(tmp_path: Path) -> None:
    rows = [
        {"index": str(n), "question": "Which?", "answer": "B", "A": "red", "B": "blue", "C": c, "category": category}
        for n, (c, category) in enumerate([("green", "colour"), ("", "colour"), ("gray", "math")])
    ]
    entry = entry_of(tmp_path, rows, ["<see> Blue. </see> <answer> B. blue </answer>", "A", "blue"])
    assert (entry["rule"], entry["accuracy"]) == ("choice", pytest.approx(2 / 3))
    assert entry["scores"] == {"chance": pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)}
    assert {name: of["accuracy"] for name, of in entry["by_ability"].items()} == {"colour": 0.5, "math": 1.0}


def test_a_table_of_yes_and_no_has_figures_and_questions(tmp_path: Path) -> None:
    rows = [
        {"index": f"VS_chart_0_{figure}_{question}", "question": "Is it?", "answer": "Yes", "l2-category": "chart"}
        for figure in (0, 1)
        for question in (1, 2)
    ]
    entry = entry_of(tmp_path, rows, ["Yes, it is.", "yes", "Answer: No", "Yes."])
    assert entry["rule"] == "yes_no" and entry["accuracy"] == 0.75
    assert (entry["scores"]["fAcc"], entry["scores"]["qAcc"], entry["scores"]["recall"]) == (0.5, 0.5, 0.75)


def test_a_table_with_several_answers_in_a_cell(tmp_path: Path) -> None:
    cells = ["['12 May', \"May 12\"]", "[red]", "['one']"]
    dataset = read_table(tmp_path, [{"index": str(n), "question": "When?", "answer": a} for n, a in enumerate(cells)])
    assert [(s.answer, s.extra.get("answers")) for s in dataset.samples] == [
        ("12 May", ["May 12"]),
        ("[red]", None),  # a text in brackets
        ("one", None),
    ]
    assert dataset.rule == "exact" and predict(dataset.samples[0], "Answer: may 12").right


def test_a_rule_that_is_named_wins(tmp_path: Path) -> None:
    rows = [{"index": "1", "question": "How much?", "answer": "100"}]
    dataset = read_table(tmp_path, rows, rule="relaxed")
    assert dataset.rule == "relaxed" and predict(dataset.samples[0], "104", dataset.rule).right
