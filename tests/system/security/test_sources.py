"""What no source of srcfast may say: that data is run, that a check is switched off. Beside what the rules of the house forbid.

One place lets Python pickle by itself: worker processes of the loader (`srcfast/training/loader.py`) get what the program itself
holds, over a pipe that nobody else can open. No byte of a file or of the network is ever unpickled.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted(file for room in ("srcfast", "kernels", "benchmarks") for file in (ROOT / room).rglob("*.py"))
PRODUCT = [file for file in SOURCES if file.is_relative_to(ROOT / "srcfast")]

RUNS_DATA = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "np.fromregex",
    "joblib.load",
    "tempfile.mktemp",
    "dist.all_gather_object",
    "dist.broadcast_object_list",
    "dist.gather_object",
    "dist.scatter_object_list",
    "torch.distributed.all_gather_object",
    "torch.distributed.broadcast_object_list",
}
SWITCHED = {
    "allow_pickle": "True",
    "trust_remote_code": "True",
    "shell": "True",
    "verify": "False",
    "weights_only": "False",
}
TRANSFORMERS = {
    "AutoConfig",
    "AutoTokenizer",
    "AutoImageProcessor",
    "AutoProcessor",
    "AutoModel",
    "AutoModelForCausalLM",
}


def offences(source: str) -> list[str]:
    """Calls that run data, and arguments that switch a check off or leave it to be asked for."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            found += [
                name for name in modules if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib")
            ]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        found += [name] if name in RUNS_DATA else []
        found += [f"{key}={given[key]}" for key, value in SWITCHED.items() if given.get(key) == value]
        if name.endswith(".from_pretrained") and name.split(".")[0] in TRANSFORMERS:
            found += [] if given.get("trust_remote_code") == "False" else [f"{name} without trust_remote_code=False"]
        if name in ("np.load", "numpy.load"):
            found += [] if given.get("allow_pickle") == "False" else [f"{name} without allow_pickle=False"]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "os.system(command)",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "dist.all_gather_object(found, value)",
    ],
)
def test_what_is_looked_for_is_found(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_of_the_product_runs_data_or_switches_a_check_off(file: Path) -> None:
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", [file for file in SOURCES if file not in PRODUCT], ids=lambda file: file.name)
def test_no_other_source_does_either(file: Path) -> None:
    """Benchmarks read with `from_pretrained` what they wrote themselves a moment before."""
    assert [one for one in offences(file.read_text(encoding="utf-8")) if "without" not in one] == []
