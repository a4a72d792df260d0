"""Rules of the house that a reader relies on: which way imports run, how long a file gets, what never occurs."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted([*(ROOT / "srcfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# The rooms from the ground up: each may import those before it, and none behind it.
FLOORS = (
    "errors",
    "srcfast_kernels",
    "units",
    "launch",
    "distributed",
    "data",
    "config",
    "attention",
    "run",
    "trackers",
    "hub",
    "endpoint",
    "world",
    "models",
    "generation",
    "memory",
    "training",
    "stages",
    "report",
    "recipes",
    "calibrate",
    "study",
    "cli",
    "__main__",
)
ALLOWED = {room: set(FLOORS[:floor]) for floor, room in enumerate(FLOORS)} | {
    "__init__": set(),
    "runtime": {"attention"},  # old names
}
# Rooms that need less than all that lies below them.
ALLOWED |= {
    "srcfast_kernels": set(),
    "distributed": {"errors", "launch"},
    "attention": {"errors", "srcfast_kernels", "data"},
    "world": {"errors", "data"},
    "__main__": {"cli"},
}
# Of `data`, the rooms that compute stand on these alone: a forest, its batches, its rows, JSON lines, ends of sentences.
COMPUTING = ("attention", "generation", "memory", "training")
FOUNDATIONS = {f"srcfast.data.{name}" for name in ("batching", "forest", "jsonl", "logit_rows", "sentence_marks")}


def is_module(name: str) -> bool:
    base = "kernels" if name.startswith("srcfast_kernels") else "."
    path = ROOT / base / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported_modules(source: str) -> set[str]:
    """The project's modules that a source imports anywhere: at its top, within functions, for type checkers."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("srcfast", "srcfast_kernels") and is_module(name)}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "srcfast_kernels" or len(parts) == 1 else parts[1]


def crossings(file: Path) -> set[tuple[str, str]]:
    """(file, room) for each import that leaves the rooms allowed to this file."""
    parts = file.relative_to(ROOT).parts
    short = "/".join(parts[1:])
    own = "srcfast_kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")
    rooms = {room_of(module) for module in imported_modules(file.read_text(encoding="utf-8"))} - {own, "srcfast"}
    return {(short, room) for room in rooms - ALLOWED[own]}


def test_imports_run_one_way():
    assert set().union(*(crossings(file) for file in SOURCES)) == set()


@pytest.mark.parametrize("room", COMPUTING)
def test_rooms_that_compute_import_the_foundations_of_data_alone(room):
    for file in (ROOT / "srcfast" / room).glob("*.py"):
        modules = imported_modules(file.read_text(encoding="utf-8"))
        assert {module for module in modules if module.startswith("srcfast.data.")} <= FOUNDATIONS, file


def test_the_import_finder_sees_what_it_is_there_for():
    source = "def late():\n    from srcfast import calibrate\n    import srcfast.stages.curation\n    import torch\n"
    assert imported_modules(source) == {"srcfast", "srcfast.calibrate", "srcfast.stages.curation"}
    assert {room_of(name) for name in ("srcfast_kernels", "srcfast.data.forest")} == {"srcfast_kernels", "data"}


# What never occurs --------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b|NotImplementedError")


def offences(source: str) -> list[str]:
    """What a source holds that none may: code out of data, pickles, remote code, unfinished work."""
    found = UNFINISHED.findall(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & FORBIDDEN_CALLS)
            found += [node.module] if str(node.module).split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            found += [name for name in [ast.unparse(node.func)] if name in FORBIDDEN_CALLS]
            found += [
                "trust_remote_code"
                for keyword in node.keywords
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
            ]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "x = torch.load(path)",
        "torch.save(x, path)",
        "from torch import load",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "x = eval(text)",
        "yaml.load(text)",
        "# TODO: later",
        "raise NotImplementedError",
    ],
)
def test_what_is_forbidden_is_found(source):
    assert offences(source)


@pytest.mark.parametrize("source", ["model.eval()", "yaml.safe_load(text)", "json.load(file)", "save(x)"])
def test_what_is_allowed_is_not(source):
    assert not offences(source)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_long_or_does_what_is_forbidden(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    assert offences(text) == []


def test_no_two_modules_of_the_suite_share_a_name():
    # Tests lie in folders that are no packages, so pytest imports each by its bare name.
    names = Counter(
        file.name for file in (ROOT / "tests").rglob("*.py") if file.name not in ("conftest.py", "__init__.py")
    )
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda file: file.stem)
def test_all_functions_beside_the_kernels_say_their_types(file):
    """The type checker is told to pass over what it can't type, Triton's kernels."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and "triton.jit" not in map(ast.unparse, node.decorator_list):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
            assert not untyped and node.returns is not None, f"{file.name}, {node.name}: {untyped}"
