"""The commands that evaluate, with free answers that a stand-in server judges."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from helpers.chat_server import Reply, chat_server, question_of
from PIL import Image
from typer.testing import CliRunner

from srcfast.cli.app import app


def write_table(path: Path) -> Path:
    """Write LLaVA-Bench's columns, with a picture for each of three questions."""
    lines = ["index\timage\tquestion\tcaption\tgpt4_ans\tcategory"]
    for number, category in enumerate(("conv", "detail", "complex")):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(buffer, "PNG")
        code = base64.b64encode(buffer.getvalue()).decode()
        lines.append(f"{number}\t{code}\tWhat is {number}?\tA picture.\tIt is red.\t{category}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_evaluate_and_calibrate_ask_the_judge_and_state_who_it_was(tmp_path: Path) -> None:
    table = write_table(tmp_path / "bench.tsv")
    shared = ["evaluation.judge_model=large", "evaluation.max_new_tokens=4", "--quiet"]

    def reply(body: dict[str, Any], before: int) -> Reply:
        is_first = "It is red." in question_of(body).split("[Assistant 2]")[0]
        return Reply("4 8") if is_first else Reply("8 4")

    with chat_server(reply) as server:
        shared.append(f"evaluation.judge_endpoint={server.url}")
        words = ["evaluate", "--data", str(table), "--output", str(tmp_path / "out"), *shared]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        evaluation = f"data.evaluation=[{{name: bench, path: {table}, split: test}}]"
        train = "data.train=[{name: world, format: world, limit: 8}]"
        more = [evaluation, train, f"output={tmp_path}", "iterations=0", "lora.r=2", "rationale.samples=4"]
        result = CliRunner().invoke(app, ["calibrate", *more, *shared])
        assert result.exit_code == 0, result.output
    entries = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluations"]
    entries += json.loads((tmp_path / "srcfast" / "summary.json").read_text())["evaluations"]
    assert [entry["model"] for entry in entries] == ["base", "base", "rationale"]
    for entry in entries:
        assert (entry["rule"], entry["n"], entry["judge"]["model"]) == ("judge", 3, "large")
        assert entry["scores"]["relative"] == 2.0 and entry["scores"]["unscored"] == 0.0
        assert set(entry["by_category"]["category"]) == {"conv", "detail", "complex"}
    page = " ".join((tmp_path / "srcfast" / "report" / "index.html").read_text(encoding="utf-8").split())
    stated = f"judge large, prompt {entries[0]['judge']['prompt_sha256'][:12]}"
    assert page.count(stated) == 1 and "relative 200.0 %" in page


def test_a_set_that_needs_a_judge_is_refused_without_one_before_a_model_answers(tmp_path: Path) -> None:
    table = write_table(tmp_path / "bench.tsv")
    result = CliRunner().invoke(app, ["evaluate", "--data", str(table), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "evaluation.judge_endpoint: expected a judge" in result.output
    assert not (tmp_path / "out" / "predictions").exists()
