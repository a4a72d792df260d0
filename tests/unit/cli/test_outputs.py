"""Outputs that are among the inputs, or that can't be written, are refused by name before anything is read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from srcfast.cli.inputs import check_output
from srcfast.data import jsonl
from srcfast.data.jsonl import check_writable
from srcfast.errors import ConfigError

Srcfast = Callable[..., Result]
# command -> its options that name inputs, and settings that do
INPUTS: dict[str, tuple[str, ...]] = {
    "rationale": ("--data", "--model", "rationale.teacher"),
    "candidates": ("--data", "--model", "--adapter"),
    "score": ("--data", "--candidates", "--scorer"),
    "curate": ("--data", "--candidates", "--scores"),
    "dpo": ("--data", "--model", "--adapter"),
    "evaluate": ("--data", "--model", "--adapter"),
    "logprob": ("--data", "--model", "--adapter"),
    "scorer": ("--data", "--scorer", "scorer_training.vocabulary"),
    "merge": ("--model", "--adapter"),
}
CASES = [(command, option) for command, options in INPUTS.items() for option in options]


def words_of(command: str, folder: Path, output: Path, **replaced: Path) -> list[Any]:
    """The command line, each of whose inputs is a name in `folder` that nothing bears, but for those replaced."""
    words: list[Any] = [command]
    for option in INPUTS[command]:
        path = replaced.get(option.strip("-"), folder / f"no-such-{option.strip('-')}")
        words += [option, path] if option.startswith("--") else [f"{option}={path}"]
    return [*words, "--output", output]


def all_files(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("relation", ["is", "writes to", "is by a link", "is by another name"])
@pytest.mark.parametrize(("command", "option"), CASES)
def test_an_output_among_the_inputs_is_refused(
    srcfast: Srcfast, tmp_path: Path, command: str, option: str, relation: str
) -> None:
    (tmp_path / "a" / "predictions").mkdir(parents=True)
    (tmp_path / "a" / "predictions" / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "predictions")
    there, output = {
        "is": ("a/predictions", "a/predictions"),
        "writes to": ("a/predictions", "a"),
        "is by a link": ("a/predictions", "link"),
        "is by another name": ("a/predictions", "a/../a/predictions/."),
    }[relation]
    if command == "logprob":
        (tmp_path / "link").unlink()
        there, output = "data.jsonl", "data.jsonl"
    before = all_files(tmp_path)
    words = words_of(command, tmp_path / "elsewhere", tmp_path / output, **{option.strip("-"): tmp_path / there})
    done = srcfast(*words)
    assert done.exit_code == 2, done.output
    assert (
        "--output: expected a path apart from the inputs, found" in done.output and "Fix: name another" in done.output
    )
    assert str(tmp_path / there) in done.output and "no-such" not in done.output.replace(f"no-such-{option}", "")
    assert all_files(tmp_path) == before


@pytest.mark.parametrize(
    ("there", "output"),
    [
        ("work/train.jsonl", "work"),
        ("runs/x/adapter", "runs/x"),
        ("runs/x", "runs/x/evaluation"),
        ("runs/x/00000.json", "runs/x"),
        ("runs/xy", "runs/x"),
    ],
)
def test_an_output_beside_an_input_or_in_its_folder_replaces_nothing(tmp_path: Path, there: str, output: str) -> None:
    (tmp_path / there).mkdir(parents=True)
    check_output(None, tmp_path / output, tmp_path / there)


def test_a_file_of_an_input_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    check_output(None, tmp_path / "base" / "logprobs.jsonl", tmp_path / "base", is_file=True)
    with pytest.raises(ConfigError, match="which is a file of"):
        check_output(None, tmp_path / "base" / "config.json", tmp_path / "base", is_file=True)


@pytest.mark.parametrize(("target", "refused"), [("a.jsonl", True), ("b/../a.jsonl", True), ("b.jsonl", False)])
def test_convert_leaves_its_source_alone(srcfast: Srcfast, tmp_path: Path, target: str, refused: bool) -> None:
    (tmp_path / "b").mkdir()
    text = '{"id": "1", "images": [], "question": "q", "answer": "a"}\n'
    (tmp_path / "a.jsonl").write_text(text)
    done = srcfast("convert", tmp_path / "a.jsonl", tmp_path / target)
    assert (done.exit_code == 2 and "expected a path apart" in done.output) is refused, done.output
    assert (tmp_path / "a.jsonl").read_text() == text and (tmp_path / "b.jsonl").exists() is not refused


def test_convert_does_not_replace_its_source_by_what_it_rejects(srcfast: Srcfast, tmp_path: Path) -> None:
    (tmp_path / "rejected.jsonl").write_text('{"id": "1"}\n{"id": "2", "question": "q", "answer": "a"}\n')
    before = all_files(tmp_path)
    done = srcfast("convert", tmp_path / "rejected.jsonl", tmp_path / "out.json")
    assert done.exit_code == 2 and "rejected.jsonl" in done.output
    assert all_files(tmp_path) == before


@pytest.mark.parametrize("where", ["is", "writes to"])
def test_a_run_is_apart_from_what_its_settings_name(srcfast: Srcfast, tmp_path: Path, where: str) -> None:
    path = {"is": "runs/a", "writes to": "runs/a/iteration-2/adapter"}[where]
    (tmp_path / path).mkdir(parents=True)
    dataset = f"{{name: d, format: jsonl, path: {tmp_path / path}}}"
    for words in ([f"model.path={tmp_path / path}"], [f"data.train=[{dataset}]"], [f"data.evaluation=[{dataset}]"]):
        before = all_files(tmp_path)
        done = srcfast("calibrate", f"output={tmp_path / 'runs'}", "name=a", *words)
        assert done.exit_code == 2 and "output and name: expected a path apart" in done.output, done.output
        assert all_files(tmp_path) == before


def in_the_way(folder: Path, what: str) -> tuple[Path, int]:
    """Put something in the way of an output; return the output, and the error that writing there has."""
    (folder / "file").write_text("precious")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    os.mkfifo(folder / "pipe")
    return {
        "a file": (folder / "file", errno.ENOTDIR),
        "below a file": (folder / "file" / "a" / "b", errno.ENOTDIR),
        "a pipe": (folder / "pipe", errno.ENOTDIR),
        "below a device": (Path("/dev/full/a"), errno.ENOTDIR),
        "300 letters": (folder / ("a" * 300), errno.ENAMETOOLONG),
        "300 letters deep down": (folder / "a" / ("b" * 300) / "c", errno.ENAMETOOLONG),
        "a loop of links": (folder / "loop", errno.ELOOP),
        "below a loop of links": (folder / "loop" / "a", errno.ELOOP),
        "a link to nothing": (folder / "dangling", errno.ENOTDIR),
    }[what]


WAYS = ["a file", "below a file", "a pipe", "below a device", "300 letters", "300 letters deep down"]
WAYS += ["a loop of links", "below a loop of links", "a link to nothing"]


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (command, what)
        for command in (*INPUTS, "calibrate", "convert", "world")
        for what in WAYS
        # The output of these is a file, and replaces what is there.
        if command not in ("logprob", "convert") or what[:5] in ("below", "300 l")
    ],
)
def test_an_output_that_cannot_be_written_is_named_before_anything_is_read(
    srcfast: Srcfast, tmp_path: Path, command: str, what: str
) -> None:
    (tmp_path / "place").mkdir()
    output, number = in_the_way(tmp_path / "place", what)
    before = {path: path.lstat().st_mode for path in (tmp_path / "place").rglob("*")}
    if command == "calibrate":
        done = srcfast("calibrate", f"output={output}", "name=a", "model.path=no-such", "quiet=true")
    elif command == "convert":
        done = srcfast("convert", tmp_path / "no-such.jsonl", output, "--to", "jsonl")
    elif command == "world":
        done = srcfast("world", "--output", output)
    else:
        done = srcfast(*words_of(command, tmp_path / "elsewhere", output))
    assert done.exit_code == 1, (done.output, done.exception)
    assert os.strerror(number) in done.output, done.output
    assert str(output)[:200] in done.output.replace("\n", "") and "Fix: " in done.output
    assert "no-such" not in done.output and "Traceback" not in done.output
    assert {path: path.lstat().st_mode for path in (tmp_path / "place").rglob("*")} == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_place_that_takes_no_file_is_named_by_the_output(
    srcfast: Srcfast, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "x" in mode:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *args, **options)  # noqa: SIM115

    monkeypatch.setattr(jsonl, "open", refuse, raising=False)
    for output in (tmp_path, tmp_path / "a" / "b"):
        done = srcfast("candidates", "--model", "no-such", "--data", "none/no-such.jsonl", "--output", output)
        assert done.exit_code == 1 and f"{output}: {os.strerror(number)}" in done.output, done.output


WAYS_OF_A_RUN = [
    "predictions",
    "predictions/base",
    "checkpoint",
    "rationale",
    "rationale/adapter",
    "iteration-1",
    "report",
]
WAYS_OF_A_RUN += ["iteration-1/candidates", "iteration-2/adapter", "predictions/iteration-2"]


@pytest.mark.parametrize("name", WAYS_OF_A_RUN)
def test_a_file_in_a_run_s_way_is_named_before_the_first_stage(srcfast: Srcfast, tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / "a" / name).parent.mkdir(parents=True)
    (tmp_path / "runs" / "a" / name).write_text("precious")
    words = ["calibrate", f"output={tmp_path / 'runs'}", "name=a", "iterations=2", "model.path=no-such", "quiet=true"]
    done = srcfast(*words)
    assert done.exit_code == 1 and os.strerror(errno.ENOTDIR) in done.output, done.output
    assert str(tmp_path / "runs" / "a" / name) in done.output.replace("\n", "") and "no-such" not in done.output


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "summary.json", "config.yaml", "report/index.html"])
def test_a_folder_in_a_run_s_file_s_way_is_named_before_the_first_stage(
    srcfast: Srcfast, tmp_path: Path, name: str
) -> None:
    (tmp_path / "runs" / "a" / name).mkdir(parents=True)
    done = srcfast("calibrate", f"output={tmp_path / 'runs'}", "name=a", "model.path=no-such", "quiet=true")
    assert done.exit_code == 2 and f"{name}: expected a file to write, or nothing, found a directory" in done.output


def test_what_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    before = all_files(tmp_path)
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "er", tmp_path / ("a" * 200)):
        check_writable(path)
        check_writable(path / "file", is_file=True)
    assert all_files(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [("dpo", "adapter_model.safetensors"), ("rationale", "metrics.jsonl"), ("candidates", "COMPLETE")]
    + [
        ("merge", "model.safetensors"),
        ("evaluate", "summary.json"),
        ("score", "00000.jsonl"),
        ("scorer", "config.json"),
    ],
)
def test_a_folder_in_the_way_of_a_command_s_file_is_named_before_anything_is_read(
    srcfast: Srcfast, tmp_path: Path, command: str, name: str
) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    done = srcfast(*words_of(command, tmp_path / "elsewhere", tmp_path / "out"))
    assert done.exit_code == 2 and f"{name}: expected a file to write, or nothing, found a directory" in done.output
    assert "no-such" not in done.output


@pytest.mark.parametrize("command", ["dpo", "rationale", "scorer", "candidates"])
def test_a_file_in_the_way_of_a_command_s_checkpoints_is_named_before_anything_is_read(
    srcfast: Srcfast, tmp_path: Path, command: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint").write_text("precious")
    done = srcfast(*words_of(command, tmp_path / "elsewhere", tmp_path / "out"))
    assert done.exit_code == 1 and f"{tmp_path / 'out' / 'checkpoint'}: {os.strerror(errno.ENOTDIR)}" in done.output
    assert "no-such" not in done.output
