"""Predictions as VLMEvalKit reads them back."""

import csv
from pathlib import Path

from srcfast.data.records import Sample
from srcfast.data.vlmeval import QUESTION_KEY
from srcfast.stages.evaluation import predict, write_predictions


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
