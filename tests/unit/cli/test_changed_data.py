"""Data that is changed between two commands is named by the second one, where the first has read what was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.made_rows import write_rows
from PIL import Image

from srcfast.data.jsonl import write_shards
from srcfast.data.records import Preference
from srcfast.stages.stage_inputs import COMMAND, InputRecord
from srcfast.world.samples import world_samples

Srcfast = Callable[..., Result]
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples with pictures, their candidates and scores."""
    from typer.testing import CliRunner

    from srcfast.cli.app import app

    folder = tmp_path_factory.mktemp("made")
    samples = world_samples("train", 4, 3, image_dir=folder / "pictures")
    rows = [sample.to_json() | {"images": [f"pictures/{image}" for image in sample.images]} for sample in samples]
    data = write_rows(folder / "samples.jsonl", rows)
    for command in ("candidates", "score"):
        words = [command, "--data", data, "--output", folder / command, "--quiet"]
        if command == "candidates":
            words += ["num_candidates=2", "max_new_tokens=24"]
        else:
            words += ["--candidates", folder / "candidates"]
        assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    return folder


def edit_row(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        rows[2] |= values
        write_rows(folder / "samples.jsonl", rows)

    return edit


def repaint(folder: Path) -> None:
    row = json.loads((folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()[2])
    file = folder / row["images"][0]
    with Image.open(file) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)


TURNS = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "a question before scoring": ("score", edit_row(question="What is it?"), "question of sample"),
    "turns before scoring": ("score", edit_row(turns=TURNS), "turns of sample"),
    "a picture before scoring": ("score", repaint, "images of sample"),
    "a picture before curation": ("curate", repaint, "images of sample"),
    "an answer before curation": ("curate", edit_row(answer="a boat"), "answer of sample"),
    "facts before curation": ("curate", edit_row(facts=["It is a boat."]), "facts of sample"),
}


def words_of(command: str, folder: Path) -> list[Any]:
    words = [command, "--data", folder / "samples.jsonl", "--candidates", folder / "candidates"]
    words += ["--scores", folder / "score"] if command == "curate" else ["--quiet"]
    return [*words, "--output", folder / "output"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_earlier_command_has_read_is_named(srcfast: Srcfast, made: Path, tmp_path: Path, name: str) -> None:
    command, edit, words = REFUSED[name]
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    edit(folder)
    result = srcfast(*words_of(command, folder))
    assert result.exit_code == 2 and words in result.output.replace("\n", " ") and "Fix:" in result.output


@pytest.mark.parametrize("command", ["score", "curate"])
def test_unchanged_data_and_a_part_of_them_are_taken(
    srcfast: Srcfast, made: Path, tmp_path: Path, command: str
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    assert srcfast(*words_of(command, folder)).exit_code == 0
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    shutil.rmtree(folder / "output")
    assert srcfast(*words_of(command, folder)).exit_code == 0


def test_answers_may_be_written_after_the_candidates(srcfast: Srcfast, made: Path, tmp_path: Path) -> None:
    """Candidates are made of prompts alone."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    edit_row(answer="a boat", facts=["It is a boat."], rationale=None)(folder)
    assert srcfast(*words_of("score", folder)).exit_code == 0


def test_pictures_of_pairs_are_those_that_were_curated(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    pairs = [
        Preference(f"p{name}", (f"{name}.png",), f"What is {name}?", f"{name} is red.", "It is blue.", image_root=root)
        for name in "abc"
    ]
    write_shards(tmp_path / "pairs", (pair.to_json() | {"image_root": str(root)} for pair in pairs))
    InputRecord(tmp_path / "pairs", {COMMAND: pairs}).write()
    words = ["dpo", "--model", model_dir, "--data", tmp_path / "pairs", "--quiet", "lora.r=4", "--output"]
    assert srcfast(*words, tmp_path / "first").exit_code == 0
    shutil.copyfile(root / "a.png", root / "b.png")
    result = srcfast(*words, tmp_path / "second")
    assert result.exit_code == 2 and "images of sample 'pb'" in result.output.replace("\n", " ")
