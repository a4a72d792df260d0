"""The command `chat`: which parts of a response it shows as what, and what it asks the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from srcfast.cli import chat as command
from srcfast.data.records import Sample
from srcfast.stages.evaluation import predict

Srcfast = Callable[..., Result]


def shown(text: str) -> list[list[str]]:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(command.shown_response(text))
    return [line.split(maxsplit=1) for line in captured.get().splitlines()]


def test_what_was_seen_concluded_and_answered_is_told_apart() -> None:
    text = "<see> A cup. A red cup. </see> <think> So it is red. </think> <answer> red </answer>"
    assert [[word.strip() for word in line] for line in shown(text)] == [
        ["seen", "A cup."],
        ["A", "red cup."],
        ["concluded", "So it is red."],
        ["answer", "red"],
    ]
    assert [line[0] for line in shown("red")] == ["answer"]
    assert [line[0] for line in shown("<see> A cup. </see> <see>")] == ["response"]


def test_a_response_does_not_command_the_terminal() -> None:
    assert "\x1b[2J" not in str(shown("\x1b[2J red [bold]x[/bold]")) and "[bold]x" in str(shown("red [bold]x[/bold]"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Replace the model's answers by "red"; return the samples that it was asked."""
    samples: list[Sample] = []

    def answer(model: Any, of: list[Sample], *rest: Any, **more: Any) -> list[Any]:
        samples.extend(of)
        return [predict(sample, "red") for sample in of]

    monkeypatch.setattr(command, "answer_greedily", answer)
    return samples


def test_a_question_about_images_of_several_folders(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path, asked: list[Sample]
) -> None:
    other = tmp_path / "d.png"
    other.write_bytes((image_root / "a.png").read_bytes())
    done = srcfast(
        "chat", model_dir, "--image", image_root / "b.png", "--image", other, "--question", "Is <image> red?"
    )
    assert done.exit_code == 0, done.output
    assert done.output.split()[-2:] == ["answer", "red"]
    [sample] = asked
    assert sample.question == "Is  red?" and sample.turns == ()
    assert [(sample.image_root / name).read_bytes() for name in sample.images] == [
        (image_root / "b.png").read_bytes(),
        other.read_bytes(),
    ]


def test_questions_of_the_standard_input_are_asked_alone_until_an_empty_line(
    model_dir: Path, image_root: Path, asked: list[Sample]
) -> None:
    from typer.testing import CliRunner

    from srcfast.cli.app import app

    words = ["chat", str(model_dir), "--image", str(image_root / "a.png")]
    done = CliRunner().invoke(app, words, input="One?\n  Two?\n\nThree?\n")
    assert done.exit_code == 0, done.output
    assert [sample.question for sample in asked] == ["One?", "Two?"] and all(sample.images for sample in asked)
    asked.clear()
    assert CliRunner().invoke(app, words, input="One?").exit_code == 0 and len(asked) == 1


def test_a_model_answers(srcfast: Srcfast, model_dir: Path, image_root: Path) -> None:
    words = (
        "chat",
        model_dir,
        "evaluation.max_new_tokens=3",
        "--image",
        image_root / "c.png",
        "--question",
        "what color",
    )
    done = srcfast(*words)
    assert done.exit_code == 0 and done.output.split(), done.output


def test_a_missing_or_broken_image_is_named_before_a_model_is_loaded(srcfast: Srcfast, tmp_path: Path) -> None:
    done = srcfast("chat", tmp_path / "none", "--image", tmp_path / "x.png", "--question", "a")
    assert done.exit_code == 2 and "x.png" in done.output
    (tmp_path / "x.png").write_bytes(b"no image")
    done = srcfast("chat", tmp_path / "none", "--image", tmp_path / "x.png", "--question", "a")
    assert done.exit_code == 2 and "x.png" in done.output
