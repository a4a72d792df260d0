"""Every write of the product names its file where it fails, and is one that a test knows of.

What writes in a stream (open, save_file, copyfile, ...) raises errors of the disk without a file's name: it stands within
`naming` or `replacing`, which give it one. What makes, moves or removes one file raises errors that have its name.
"""

from __future__ import annotations

import ast
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "srcfast").rglob("*.py"))
# Calls whose errors have no name of a file, or a temporary one.
STREAMS = {
    "os.fdopen",
    "os.fsync",
    "os.write",
    "os.open",
    "shutil.copy",
    "shutil.copy2",
    "shutil.copyfile",
    "shutil.copyfileobj",
    "shutil.copytree",
    "shutil.move",
    "save_file",
    "np.save",
    "np.savez",
    "np.savetxt",
    "torch.save",
}
METHODS = {
    "write_bytes",
    "write_text",
    "savefig",
    "save_pretrained",
    "export_chrome_trace",
    "tofile",
    "touch",
    "to_csv",
}
FUNCTIONS_OF_OURS = {"write_text"}  # of srcfast.data.jsonl, called by its bare name
NAMING = {"naming", "naming_tensors", "replacing"}
# Functions that hold a stream without naming it, and why.
KNOWN = {
    ("endpoint/client.py", "_post", "open"): "a request to a server, no file",
    ("run/lock.py", "_lock", "os.open"): "an error of its own names the directory",
    ("run/lock.py", "_lock", "open"): "an error of its own names the directory",
    ("recipes/base_checkpoint.py", "new_lvlm", "save_pretrained"): "a recipe, which no command runs",
    ("recipes/base_checkpoint.py", "decoder_as_text_model", "save_pretrained"): "a recipe, which no command runs",
    ("recipes/smollm_base.py", "new_checkpoint", "save_pretrained"): "a recipe, which no command runs",
    ("report/plots.py", "_svg", "savefig"): "into memory",
    ("training/checkpoint.py", "_sync_directory", "os.open"): "opened for reading",
    ("training/checkpoint.py", "_sync_directory", "os.fsync"): "save_training names the checkpoint",
    ("world/samples.py", "_lock", "os.open"): "opened for reading",
}


def stream(call: ast.Call) -> str | None:
    """Return the name of a call that writes a stream, None for any other."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if last == "open" and name != "os.open":
        modes = [*call.args[(0 if "." in name else 1) :][:1], *(k.value for k in call.keywords if k.arg == "mode")]
        texts = [mode.value if isinstance(mode, ast.Constant) else "w" for mode in modes]
        return "open" if name != "Image.open" and any(set(str(text)) & set("wax+") for text in texts) else None
    if name in STREAMS:
        return name
    return last if "." in name and last in METHODS and not name.startswith(("jsonl.",)) else None


def streams(tree: ast.AST, function: str = "", named: bool = False) -> Iterator[tuple[str, str, int, bool]]:
    """Yield (function, call, line, whether it is within `naming`) of each stream that is written."""
    for node in ast.iter_child_nodes(tree):
        inside, here = named, function
        if isinstance(node, ast.FunctionDef):
            here = node.name
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            inside = named or any(ast.unparse(call.func) in NAMING for call in calls)
        if isinstance(node, ast.Call) and (name := stream(node)):
            yield here, name, node.lineno, inside
        yield from streams(node, here, inside)


def unnamed(file: Path) -> list[tuple[str, str, str, int]]:
    short = str(file.relative_to(ROOT / "srcfast"))
    found = streams(ast.parse(file.read_text(encoding="utf-8")))
    return [(short, function, name, line) for function, name, line, named in found if not named]


def test_every_stream_is_written_where_its_file_is_named() -> None:
    found = [each for file in SOURCES for each in unnamed(file)]
    assert [each for each in found if each[:3] not in KNOWN] == []
    assert {each[:3] for each in found} == KNOWN.keys(), "an exception that is no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('x')",
        "path.open(mode)",
        "open(path, mode)",
        "os.open(path, os.O_WRONLY)",
        "path.write_text('')",
        "self.folder.write_bytes(b'')",
        "save_file(tensors, path)",
        "np.save(path, values)",
        "figure.savefig(path)",
        "shutil.copyfile(a, b)",
        "model.save_pretrained(path)",
        "def f():\n    with suppress(OSError):\n        path.touch()",
    ],
)
def test_the_finder_sees_what_writes(source: str) -> None:
    assert [named for *_, named in streams(ast.parse(source))] == [False]
    inside = "with lock(), naming(path):\n" + "".join(f"    {line}\n" for line in source.splitlines())
    assert [named for *_, named in streams(ast.parse(inside))] == [True]


@pytest.mark.parametrize(
    "source", ["open(path)", "open(path, 'rb')", "path.open()", "write_text(path, '')", "Image.open(path)", "x.save()"]
)
def test_the_finder_leaves_what_reads_alone(source: str) -> None:
    assert list(streams(ast.parse(source))) == []


# Files that may have 2 KiB at most: a real error of the disk, of each kind of writer.
COMMANDS = {
    "world": ["world", "--output", "OUT/w", "--samples", "40"],
    "convert": ["convert", "IN/samples.jsonl", "OUT/c.json"],
    "convert to a table": ["convert", "IN/samples.jsonl", "OUT/c.tsv"],
    "rejected records": ["convert", "IN/bad.jsonl", "OUT/b.json"],
    "report": ["report", "OUT/run"],
    "merge": ["merge", "--model", "embedded", "--adapter", "IN/adapter", "--output", "OUT/m"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_larger_than_the_limit_is_named(command: str, tmp_path: Path) -> None:
    from helpers.made_up_run import make_run

    (tmp_path / "in").mkdir()
    row = '{"id": "%d", "images": ["a.png"], "question": "What color is it?", "answer": "red"}\n'
    (tmp_path / "in" / "samples.jsonl").write_text("".join(row % number for number in range(100)))
    (tmp_path / "in" / "bad.jsonl").write_text(row.replace("images", "image") % 1 + '{"id": "x"}\n' * 100)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    make_run(tmp_path / "out" / "run", gallery=1)
    if command == "merge":
        from srcfast.config.settings import LoRAConfig
        from srcfast.models.lora import lora_parameters, save_adapter
        from srcfast.models.lvlm import load_lvlm

        model = load_lvlm("embedded", lora=LoRAConfig(r=2, alpha=4.0))
        for parameter in lora_parameters(model):
            parameter.data.fill_(0.1)
        save_adapter(model, tmp_path / "in" / "adapter")
    before = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    words = [
        word.replace("IN", str(tmp_path / "in")).replace("OUT", str(tmp_path / "out")) for word in COMMANDS[command]
    ]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "srcfast", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=limit,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert f"{tmp_path / 'out'}/" in done.stderr.replace("\n", ""), done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr and "Fix: see to `ulimit -f`" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and ".tmp" not in done.stderr
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()} - before
    assert all(path.stat().st_size < 2048 for path in written) and not [p for p in written if p.name.endswith(".tmp")]


def test_an_error_of_the_last_rename_names_the_file_and_not_a_temporary_one(tmp_path: Path) -> None:
    import torch

    from srcfast.cli.disk_errors import report_disk_errors
    from srcfast.errors import SrcfastError
    from srcfast.models.checkpoint import save_tensors

    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(SrcfastError) as caught, report_disk_errors():
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert str(caught.value).startswith(f"{tmp_path / 'a.safetensors'}: {os.strerror(errno.EISDIR)}. Finished")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
