"""A run is stopped, something that it has read is changed, and the same command continues it: what has changed is named.

One small run with a set of samples for each use is the truth. Each case puts it back, as it stood after one of its stages, makes
one change, and continues it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.made_rows import set_settings, write_rows
from helpers.small_run import STAGES
from PIL import Image

from srcfast.calibrate import calibrate
from srcfast.config.settings import Config
from srcfast.errors import SrcfastError
from srcfast.models.embedded import checkpoint_directory
from srcfast.world.samples import world_samples

Change = Callable[[Path], None]
Row = dict[str, Any]


def settings(folder: Path) -> Config:
    of = partial(set_settings, folder)
    values = {
        "name": "run",
        "output": str(folder),
        "quiet": True,
        "threads": 1,
        "iterations": 1,
        "model": {"path": str(folder / "base")},
        "scorer": {"path": str(folder / "scorer")},
        "data": {
            "train": [of("lessons", use=["rationale"]), of("questions", use=["calibration"])],
            "evaluation": [of("held-out", split="test")],
        },
        "lora": {"r": 8, "alpha": 16},
        "rationale": {
            "epochs": 6,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "teacher": str(folder / "teacher.jsonl"),
        },
        "candidates": {"num_candidates": 3, "max_sentence_tokens": 24, "max_new_tokens": 96, "batch_size": 6},
        "curation": {"min_margin": 0.0, "min_confidence": 0.0, "min_rating": 0.0},
        "dpo": {
            "epochs": 1,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "rehearsal_weight": 0.5,
        },
        "evaluation": {"max_new_tokens": 24, "batch_size": 3, "bootstrap_resamples": 100, "headroom_samples": 2},
    }
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of the run, and a copy of it when the run had ended."""
    folder = tmp_path_factory.mktemp("truth") / "work"
    folder.mkdir()
    for kind in ("base", "scorer"):
        shutil.copytree(checkpoint_directory("embedded", kind), folder / kind)
    rows: dict[str, list[Row]] = {}
    for seed, (name, split, count) in enumerate(
        [("lessons", "train", 24), ("questions", "train", 6), ("held-out", "test", 3)]
    ):
        samples = world_samples(split, count, seed, image_dir=folder / "pictures")
        rows[name] = [
            sample.to_json() | {"images": [f"pictures/{image}" for image in sample.images]} for sample in samples
        ]
        write_rows(folder / f"{name}.jsonl", rows[name])
    write_rows(
        folder / "teacher.jsonl", [{"id": row["id"], "rationale": row["facts"][0]} for row in rows["lessons"][:3]]
    )
    calibrate(settings(folder))
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    return folder, copy


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def put_back(truth: tuple[Path, Path], after: str) -> Path:
    """Put the run back as it stood after a stage; return its folder."""
    folder, copy = truth
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    manifest = folder / "run" / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    finished = STAGES[: STAGES.index(after) + 1]
    manifest.write_text(json.dumps({name: entries[name] for name in finished}), encoding="utf-8")
    return folder


# Changes --------------------------------------------------------------------------------------------------------------


def field_of(name: str, field: str, value: Any, number: int = 1) -> Change:
    """Set a field of a set's sample, by default of its second."""

    def change(folder: Path) -> None:
        rows = read(folder / f"{name}.jsonl")
        assert rows[number].get(field) != value
        rows[number][field] = value
        write_rows(folder / f"{name}.jsonl", rows)

    return change


def rows_of(name: str, edit: Callable[[list[Row]], list[Row]]) -> Change:
    return lambda folder: write_rows(folder / f"{name}.jsonl", edit(read(folder / f"{name}.jsonl")))


def picture_of(name: str, edit: Callable[[Path], None]) -> Change:
    """Change the file of the picture of a set's second sample."""
    return lambda folder: edit(folder / read(folder / f"{name}.jsonl")[1]["images"][0])


def repaint(file: Path) -> None:
    image = Image.open(file).convert("RGB")
    image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    image.save(file)


def save_again(file: Path) -> None:
    """Write the same pixels in other bytes."""
    before = file.read_bytes()
    Image.open(file).convert("RGB").save(file, compress_level=0)
    assert file.read_bytes() != before


def text_of(path: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        file = folder / path
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def json_of(path: str, edit: Callable[[Row], None]) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / path).read_text(encoding="utf-8"))
        edit(values)
        (folder / path).write_text(json.dumps(values), encoding="utf-8")

    return change


def flip_weight(kind: str) -> Change:
    """Flip the lowest bit of a number amid a checkpoint's weights."""

    def change(folder: Path) -> None:
        (file,) = (folder / kind).glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[len(data) // 2 & ~3] ^= 1
        file.write_bytes(bytes(data))

    return change


def remove(path: str) -> Change:
    return lambda folder: (folder / path).unlink()


def cut_metrics(rows: int) -> Change:
    """Leave the first rows alone, or without the last, if negative."""

    def change(folder: Path) -> None:
        file = folder / "run" / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        assert len(lines) > abs(rows)
        file.write_text("".join(lines[:rows]), encoding="utf-8")

    return change


def forget(stage: str) -> Change:
    """Take a stage that others follow out of the manifest, and change what it had read, so that it gives other files."""

    def change(folder: Path) -> None:
        manifest = folder / "run" / "manifest.json"
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        del entries[stage]
        manifest.write_text(json.dumps(entries), encoding="utf-8")

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


@dataclass(frozen=True)
class Case:
    """A change after a stage, and words that the error must have."""

    name: str
    after: str
    change: Change
    words: tuple[str, ...]


def reordered(rows: list[Row]) -> list[Row]:
    return rows[1:] + rows[:1]


def renamed(rows: list[Row]) -> list[Row]:
    return [*rows[:-1], rows[-1] | {"id": "another"}]


def swapped_ids(rows: list[Row]) -> list[Row]:
    first, second, *rest = rows
    return [first | {"id": second["id"]}, second | {"id": first["id"]}, *rest]


TURNS = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
FIRST = "iteration-1"
# The sets, and after which stages their fields were read.
OF_A_SAMPLE: dict[str, tuple[str, Any]] = {
    "question": ("question", "How many things are there?"),
    "a question's last letter": ("question", "How many things are there"),
    "turns": ("turns", TURNS),
    "answer": ("answer", "ultramarine"),
}
CASES = [
    *(
        Case(f"{kind} of {name}", after, field_of(name, field, value), (use, field, "sample "))
        for name, use, after in (
            ("lessons", "data.train, use rationale", "rationale"),
            ("lessons", "data.train, use rationale", f"{FIRST}/dpo"),
            ("questions", "data.train, use calibration", f"{FIRST}/preferences"),
            ("held-out", "data.evaluation, held-out-test", "base/evaluation"),
            ("held-out", "data.evaluation, held-out-test", f"{FIRST}/evaluation"),
        )
        for kind, (field, value) in OF_A_SAMPLE.items()
    ),
    *(
        Case(f"{field} of {name}", after, field_of(name, field, value), (use, field))
        for name, use, after in (
            ("lessons", "use rationale", "rationale/evaluation"),
            ("questions", "use calibration", f"{FIRST}/scores"),
            ("held-out", "held-out-test", f"{FIRST}/headroom"),
        )
        for field, value in (("rationale", "Another one."), ("facts", ["There is a boat."]))
    ),
    Case(
        "another key", "base/evaluation", field_of("held-out", "ability", "sailing"), ("other fields", "held-out-test")
    ),
    *(
        Case(f"{kind}: {name}", after, rows_of(name, edit), (use, words))
        for name, use, after in (
            ("lessons", "use rationale", "rationale"),
            ("questions", "use calibration", f"{FIRST}/candidates"),
            ("held-out", "held-out-test", "base/evaluation"),
        )
        for kind, edit, words in (
            ("a sample removed", lambda rows: rows[1:], "is missing"),
            ("a sample added", lambda rows: [*rows, rows[0] | {"id": "further"}], "'further' is new"),
            ("a sample renamed", renamed, "is missing"),
            ("the order", reordered, "order of the samples"),
            ("two ids swapped", swapped_ids, "sample "),
        )
    ),
    *(
        Case(f"{kind}: {name}", after, picture_of(name, edit), (use, "images of sample"))
        for name, use, after in (
            ("lessons", "use rationale", "rationale"),
            ("questions", "use calibration", f"{FIRST}/candidates"),
            ("questions", "use calibration", f"{FIRST}/dpo"),
            ("held-out", "held-out-test", "rationale/evaluation"),
        )
        for kind, edit in (("a pixel", repaint), ("the same pixels in other bytes", save_again))
    ),
    Case(
        "a picture removed",
        f"{FIRST}/candidates",
        picture_of("questions", Path.unlink),
        ("is missing", "use calibration"),
    ),
    Case(
        "another picture",
        f"{FIRST}/candidates",
        both(
            lambda folder: repaint(
                Path(shutil.copy(folder / read(folder / "questions.jsonl")[1]["images"][0], folder / "b.png"))
            ),
            field_of("questions", "images", ["b.png"]),
        ),
        ("images of sample", "use calibration"),
    ),
    Case(
        "a teacher's rationale",
        "rationale",
        text_of("teacher.jsonl", '"rationale": "', '"rationale": "So: '),
        ("rationale.teacher",),
    ),
    Case("a teacher's line removed", f"{FIRST}/dpo", rows_of("teacher", lambda rows: rows[1:]), ("rationale.teacher",)),
    Case("a weight of the base", "base/evaluation", flip_weight("base"), ("model.path",)),
    Case("a weight of the base, late", f"{FIRST}/dpo", flip_weight("base"), ("model.path",)),
    Case("a weight of the R-Scorer", f"{FIRST}/scores", flip_weight("scorer"), ("scorer.path",)),
    Case(
        "the tokenizer's settings",
        "base/evaluation",
        json_of("base/tokenizer_config.json", lambda values: values.update(note=1)),
        ("model.path",),
    ),
    Case(
        "generation's settings",
        "rationale",
        lambda folder: (folder / "base" / "generation_config.json").write_text('{"eos_token_id": 3}'),
        ("model.path",),
    ),
    Case(
        "the R-Scorer's tokenizer",
        f"{FIRST}/headroom",
        json_of("scorer/tokenizer_config.json", lambda values: values.update(note=1)),
        ("scorer.path",),
    ),
    Case(
        "an adapter's settings",
        "rationale",
        json_of("run/rationale/adapter/adapter_config.json", lambda values: values.update(lora_alpha=9)),
        ("adapter_config.json", "SHA-256"),
    ),
    Case(
        "a candidate",
        f"{FIRST}/candidates",
        text_of(f"run/{FIRST}/candidates/00000.jsonl", '"text": "', '"text": "No. '),
        ("00000.jsonl", "SHA-256"),
    ),
    Case(
        "a score",
        f"{FIRST}/scores",
        text_of(f"run/{FIRST}/scores/00000.jsonl", '"scores": [', '"scores": [ '),
        ("00000.jsonl", "SHA-256"),
    ),
    Case(
        "a pair",
        f"{FIRST}/preferences",
        text_of(f"run/{FIRST}/preferences/00000.jsonl", '"chosen": "', '"chosen": "No. '),
        ("00000.jsonl", "SHA-256"),
    ),
    Case(
        "a prediction",
        "base/evaluation",
        text_of("run/predictions/base/held-out-test.jsonl", '"answer": "', '"answer": "no '),
        ("held-out-test.jsonl", "SHA-256"),
    ),
    Case(
        "an adapter trained anew",
        f"{FIRST}/candidates",
        both(
            field_of("lessons", "answer", "ultramarine"),
            forget("rationale"),
            forget("rationale/evaluation"),
        ),
        ("files of rationale", f"{FIRST}/candidates"),
    ),
    Case(
        "candidates searched anew",
        f"{FIRST}/scores",
        both(
            field_of("questions", "question", "What is to be seen?"),
            forget(f"{FIRST}/candidates"),
        ),
        ("data.train, use calibration", f"{FIRST}/scores"),
    ),
]


# No result depends on metrics, so the run goes on, with a warning.
METRICS = [
    Case("metrics cut", "rationale", cut_metrics(3), ("metrics.jsonl", "rows that stage")),
    Case("metrics cut, late", f"{FIRST}/dpo", cut_metrics(-1), ("metrics.jsonl", f"{FIRST}/dpo")),
    Case("metrics removed", f"{FIRST}/evaluation", remove("run/metrics.jsonl"), ("metrics.jsonl", "found 0 rows")),
    Case(
        "a metric changed",
        "rationale",
        text_of("run/metrics.jsonl", '"step": 0', '"step": 7'),
        ("metrics.jsonl", "others"),
    ),
]


def test_there_are_sixty_changes() -> None:
    assert len({case.name + case.after for case in (*CASES, *METRICS)}) == len(CASES) + len(METRICS) >= 60


@pytest.mark.parametrize("case", METRICS, ids=lambda case: f"{case.name} after {case.after}")
def test_changed_metrics_are_named_and_the_run_goes_on(truth: tuple[Path, Path], case: Case) -> None:
    folder = put_back(truth, case.after)
    case.change(folder)
    with pytest.warns(RuntimeWarning, match="rows that stage") as warnings:
        calibrate(settings(folder))
    text = " ".join(str(warning.message) for warning in warnings)
    assert all(word in text for word in case.words) and "Fix: " in text, text
    assert [*json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))] == [*STAGES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} after {case.after}")
def test_a_change_is_named_with_the_way_out(truth: tuple[Path, Path], case: Case) -> None:
    folder = put_back(truth, case.after)
    case.change(folder)
    with pytest.raises(SrcfastError) as error:
        calibrate(settings(folder))
    text = str(error.value)
    assert all(word in text for word in case.words), text
    assert "Fix: " in text


@pytest.mark.parametrize("after", STAGES)
def test_an_unchanged_run_goes_on_to_the_same_files(truth: tuple[Path, Path], after: str) -> None:
    folder = put_back(truth, after)
    calibrate(settings(folder))
    entries = [json.loads((of / "run" / "manifest.json").read_text(encoding="utf-8")) for of in (folder, truth[1])]
    for stage in STAGES:
        assert entries[0][stage]["files"] == entries[1][stage]["files"]
        assert entries[0][stage]["inputs"] == entries[1][stage]["inputs"]


NOT_READ_YET = {
    "an answer before curation": ("questions", "answer", "ultramarine", f"{FIRST}/candidates"),
    "a question before its round": ("questions", "question", "Which colour is it?", "rationale/evaluation"),
    "a lesson's answer before training": ("lessons", "answer", "ultramarine", "base/evaluation"),
}


@pytest.mark.parametrize("name", NOT_READ_YET)
def test_what_no_finished_stage_has_read_may_change_and_is_read(truth: tuple[Path, Path], name: str) -> None:
    data, field, value, after = NOT_READ_YET[name]
    folder = put_back(truth, after)
    field_of(data, field, value)(folder)
    calibrate(settings(folder))
    before, now = ({row["id"]: row for row in read(of / "run" / "inputs.jsonl")} for of in (truth[1], folder))
    changed = [key for key in now if now[key] != before[key]]
    assert changed == [read(folder / f"{data}.jsonl")[1]["id"]]


def test_what_was_changed_can_be_done_again_from_the_stage_on(truth: tuple[Path, Path]) -> None:
    """The error's own way out: the stages from the first that has read it on are taken out of the manifest."""
    folder = put_back(truth, f"{FIRST}/evaluation")
    field_of("questions", "answer", "ultramarine")(folder)
    with pytest.raises(SrcfastError, match="remove 'iteration-1/scores' and what comes after it"):
        calibrate(settings(folder))
    for stage in STAGES[STAGES.index(f"{FIRST}/scores") :]:
        forget(stage)(folder)
    calibrate(settings(folder))
    entries = json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert [*entries] == [*STAGES]


def test_moving_the_whole_run_changes_nothing(truth: tuple[Path, Path], tmp_path: Path) -> None:
    """Images are known by name within their root and by contents; settings name the old folder, so it is put back as a link."""
    folder = put_back(truth, f"{FIRST}/candidates")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "pictures", elsewhere)
    shutil.copytree(elsewhere, folder / "pictures")
    for file in (folder / "pictures").iterdir():
        file.touch()
    rng = random.Random("touched")
    for name in rng.sample(["base", "scorer"], 2):
        for file in (folder / name).iterdir():
            file.touch()
    calibrate(settings(folder))
