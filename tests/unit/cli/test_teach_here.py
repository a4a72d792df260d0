"""The command `teach` with a model that is loaded here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image

from srcfast.cli import commands
from srcfast.config.settings import Config
from srcfast.generation.generate import Generated, Prompt
from srcfast.models import load_lvlm
from srcfast.models.lora import save_adapter
from srcfast.models.protocols import VisionLanguageModel
from srcfast.stages import local_teaching
from srcfast.stages.teaching import INSTRUCTIONS

Srcfast = Callable[..., Result]


def write_samples(folder: Path, count: int = 5) -> Path:
    rows = []
    for number in range(count):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"{number}.png")
        rows.append(
            {"id": str(number), "image": f"{number}.png", "question": f"Number {number}", "answer": str(number)}
        )
    rows.append({"id": "known", "image": "0.png", "question": "Number 0", "answer": "0", "rationale": "It is said."})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def words(model_dir: Path, data: Path, *more: object) -> list[object]:
    output = data.parent / "taught.jsonl"
    return ["teach", "--model", model_dir, "--data", data, "--output", output, "--quiet", "model.dtype=float32", *more]


def response(answer: int) -> str:
    return f"A sign is there. It says {answer}. Answer: {answer}"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace sampling: a sample's draws are wrong, then right; of sample 3 none is. Return the prompts."""
    prompts_seen: list[str] = []

    def sample(
        model: VisionLanguageModel, prompts: Sequence[Prompt], features: Any, **options: Any
    ) -> list[list[Generated]]:
        assert (options["count"], options["max_new_tokens"], options["temperature"]) == (3, 50, 0.9)
        of_all = []
        for prompt in prompts:
            prompts_seen.append(model.decode(prompt.token_ids))
            number = int(prompt.key)
            texts = [response(9), response(9 if number == 3 else number), response(number if number != 3 else 8)]
            tokens = [tuple(model.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
            of_all.append([Generated(each, -1.0, True) for each in tokens])
        options["on_done"](len(prompts), 10)
        return of_all

    monkeypatch.setattr(local_teaching, "sample_responses", sample)
    return prompts_seen


@pytest.fixture
def adapter(model_dir: Path, tmp_path: Path) -> Path:
    """A saved adapter of random weights."""
    model = load_lvlm(str(model_dir), lora=Config().lora.seeded(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_first_draw_that_reaches_the_answer_is_written(
    srcfast: Srcfast, model_dir: Path, tmp_path: Path, scripted: list[str]
) -> None:
    data = write_samples(tmp_path)
    done = srcfast(*words(model_dir, data, "--draws", 3, "--max-tokens", 50, "--temperature", 0.9))
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "taught.jsonl").read_text().splitlines()]
    assert rows == [
        {"id": str(n), "rationale": f"A sign is there. It says {n}.", "answer": str(n)} for n in (0, 1, 2, 4)
    ]
    assert json.loads((tmp_path / "taught.jsonl.asked" / "funnel.json").read_text()) == {
        "samples": 6,
        "taught": 4,
        "dropped": {"has_rationale": 1, "wrong_answer": 1},
        "not_asked": 0,
        "draws": {"taken": 4, "wrong_answer": 7},
        "rejected": 0,
        "tokens": 10,
    }
    # The tokenizer decodes without some spaces.
    wanted = "".join(INSTRUCTIONS.split())
    assert len(scripted) == 5 and all(wanted in "".join(prompt.split()) for prompt in scripted)


def test_a_model_with_an_adapter_gets_the_question_alone(
    srcfast: Srcfast, model_dir: Path, tmp_path: Path, scripted: list[str], adapter: Path
) -> None:
    data = write_samples(tmp_path)
    more = ["--adapter", adapter, "--draws", 3, "--max-tokens", 50, "--temperature", 0.9]
    done = srcfast(*words(model_dir, data, *more))
    assert done.exit_code == 0, done.output
    assert len(scripted) == 5 and not any("Reply in this form" in prompt for prompt in scripted)


def test_draws_depend_on_the_sample_and_not_on_the_batch(
    srcfast: Srcfast, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = write_samples(tmp_path), []

    def record(samples: Any, rows: Any) -> Any:
        seen.append(list(rows))
        return local_teaching.taught_by(samples, seen[-1])

    monkeypatch.setattr(commands, "taught_by", record)
    for batch_size in (1, 4):
        done = srcfast(*words(model_dir, data, "--draws", 2, "--max-tokens", 5, f"candidates.batch_size={batch_size}"))
        assert done.exit_code == 0, done.output
    assert seen[0] == seen[1] and [row["id"] for row in seen[0]] == list("01234")
    assert all(len(row["draws"]) == 2 for row in seen[0])


def test_options_of_an_endpoint_without_one_are_refused(srcfast: Srcfast, model_dir: Path, tmp_path: Path) -> None:
    done = srcfast(*words(model_dir, write_samples(tmp_path), "--max-tokens-total", 5))
    assert done.exit_code == 2 and "--endpoint" in done.output
