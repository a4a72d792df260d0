"""Predictions as VLMEvalKit reads them back."""

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from srcfast.config.settings import Config
from srcfast.data.records import Sample
from srcfast.data.vlmeval import QUESTION_KEY
from srcfast.errors import ConfigError
from srcfast.stages.datasets import EvaluationSet, read_evaluation_sets
from srcfast.stages.evaluation import predict, predict_judged, summarise, write_predictions


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
    assert set(first) == {"index", "question", "A", "B", "answer", "prediction", "rationale", "split", "category"}


def read_table(
    folder: Path, rows: list[dict[str, str]], evaluation: dict[str, str] | None = None, **more: str
) -> EvaluationSet:
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
    config = Config(data={"evaluation": [dataset]}, output=str(folder / "out"), evaluation=evaluation or {})
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


def test_mmstar_s_abilities_have_samples_scores_and_intervals(tmp_path: Path) -> None:
    """Its six abilities (Chen et al. 2024), each with one or two axes in `l2_category`."""
    abilities = ["coarse perception", "fine-grained perception", "instance reasoning", "logical reasoning", "math"]
    abilities += ["science & technology"]
    rows, texts, right = [], [], {}
    for n in range(60):
        ability = abilities[n % 6]
        rows.append(
            {"index": str(n), "question": "Which?", "answer": "B", **dict.fromkeys("ABCD", ""), "category": ability}
        )
        rows[-1] |= {
            "A": "red",
            "B": "blue",
            "C": "green",
            "D": "gray" if n % 6 else "",
            "l2_category": f"axis {n % 12}",
        }
        texts.append("B" if n % (2 + n % 6) == 0 else "A")
        right.setdefault(ability, []).append(texts[-1] == "B")
    entry = entry_of(tmp_path, rows, texts)
    assert list(entry["by_category"]) == ["category", "l2_category"] and len(entry["by_category"]["l2_category"]) == 12
    for ability in abilities:
        of, hits = entry["by_category"]["category"][ability], right[ability]
        assert (of["n"], of["accuracy"]) == (10, sum(hits) / 10)
        assert of["scores"] == {"chance": pytest.approx(1 / 3 if ability == abilities[0] else 1 / 4)}
        low, high = of["accuracy_ci95"]
        assert low <= of["accuracy"] <= high and (low < high) == (0 < sum(hits) < 10)
    assert entry["scores"]["chance"] == pytest.approx((10 / 3 + 50 / 4) / 60)
    axes = entry["by_category"]["l2_category"].values()
    assert sum(of["n"] * of["accuracy"] for of in axes) == pytest.approx(60 * entry["accuracy"])


def test_pope_s_categories_have_figures_each(tmp_path: Path) -> None:
    rows = [
        {"index": str(n), "question": "Is there?", "answer": gold, "category": category}
        for n, (gold, category) in enumerate([("Yes", "random,popular"), ("No", "popular"), ("No", "random")])
    ]
    entry = entry_of(tmp_path, rows, ["yes", "yes", "no"])
    random, popular = (entry["by_category"]["category"][name] for name in ("random", "popular"))
    assert (random["n"], random["accuracy"], random["scores"]["f1"]) == (2, 1.0, 1.0)
    assert (popular["n"], popular["accuracy"], popular["scores"]["f1"]) == (2, 0.5, pytest.approx(2 / 3))
    assert entry["accuracy"] == pytest.approx(2 / 3) and entry["scores"]["accuracy_over_categories"] == 0.75
    assert entry["scores"]["f1"] == pytest.approx(
        2 * (2 / 3) / (2 / 3 + 1)
    )  # 2 of 3 said yes are right, none is missed


def test_a_column_with_one_value_or_too_many_has_no_categories(tmp_path: Path) -> None:
    rows = [
        {
            "index": str(n),
            "question": "What?",
            "answer": "x",
            "category": str(n),
            "split": "dev",
            "l2-category": str(n % 256),
        }
        for n in range(257)
    ]
    assert list(entry_of(tmp_path, rows, ["x"] * 257)["by_category"]) == ["l2-category"]


def test_predictions_have_the_columns_of_their_table(tmp_path: Path) -> None:
    """Its evaluators read l2-category and the like there, and take a column that is there for filled in."""
    rows = [
        {
            "index": "VD_ocr_1_0_0_0",
            "question": "Is it?",
            "answer": "['12 May', 'May 12']",
            "category": "VD",
            "l2-category": "ocr",
        }
    ]
    entry_of(tmp_path, rows, ["12 May"])
    with open(tmp_path / "p.tsv", encoding="utf-8", newline="") as file:
        [row] = csv.DictReader(file, delimiter="\t")
    assert row == rows[0] | {"prediction": "12 May", "rationale": ""}


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


def test_llava_bench_s_table_calls_for_a_judge(tmp_path: Path) -> None:
    """Its columns (VLMEvalKit's LLaVABench.tsv): the reference's answers are in gpt4_ans, and no other answer is there."""
    rows = [
        {
            "index": "1",
            "question": "What?",
            "caption": "A dog.",
            "gpt4_ans": "[A dog, seen from above]",
            "category": "conv",
        }
    ]
    with pytest.raises(ConfigError, match="evaluation.judge_endpoint: expected a judge"):
        read_table(tmp_path, rows)
    dataset = read_table(tmp_path, rows, {"judge_endpoint": "http://localhost:1/v1", "judge_model": "m"})
    [sample] = dataset.samples
    assert (
        dataset.rule == "judge" and sample.answer == "[A dog, seen from above]" and sample.extra["caption"] == "A dog."
    )
    made = [predict_judged(sample, "It is a dog, which somebody has photographed.", "unreadable")]
    write_predictions(tmp_path / "p", dataset.samples, iter(made), dataset.rule)
    with open(tmp_path / "p.tsv", encoding="utf-8", newline="") as file:
        [row] = csv.DictReader(file, delimiter="\t")
    answer = {"answer": sample.answer, "prediction": "It is a dog, which somebody has photographed.", "rationale": ""}
    assert row == rows[0] | answer
