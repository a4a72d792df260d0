"""The benchmark suite: its list is whole, a run ends in tables and files, and the page is what the committed results say."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from srcfast_benchmarks import BENCHMARKS, harness, summary

FOLDER = Path(summary.__file__).parent


def test_every_benchmark_is_listed_and_names_its_file() -> None:
    files = {file.stem for file in FOLDER.glob("*.py") if "BENCHMARK = Benchmark(" in file.read_text(encoding="utf-8")}
    assert files == set(BENCHMARKS)
    for name in BENCHMARKS:
        benchmark = importlib.import_module(f"srcfast_benchmarks.{name}").BENCHMARK
        assert benchmark.name == name and set(benchmark.shapes) == {"cpu", "cuda"}
        assert set(benchmark.limits) <= set(benchmark.implementations)


def test_what_is_measured_runs_with_the_allocator_of_the_commands() -> None:
    code = (
        "import json, os; print(json.dumps({name: os.environ.get(name) for name in ('PYTORCH_ALLOC_CONF', 'OTHER')}))"
    )
    found = harness.run_process(["-c", code], {"OTHER": "kept"})
    assert found == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OTHER": "kept"}
    found = harness.run_process(["-c", code], {"OTHER": "kept", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    assert found == {"PYTORCH_ALLOC_CONF": None, "OTHER": "kept"}


SMALL: dict[str, dict[str, Any]] = {
    "linear_logprob": {"rows": 5, "hidden_size": 8, "vocabulary": 33, "dtype": "float32"},
    "weighted_dpo": {"pairs": 2, "tokens": 3, "hidden_size": 8, "vocabulary": 33, "dtype": "float32"},
    "pairwise_verdict": {"samples": 2, "candidates": 3, "hidden_size": 8, "dtype": "float32"},
    "nf4": {"out": 8, "in": 64, "dtype": "float32"},
    "nf4_linear": {"rows": 3, "in": 64, "out": 8, "dtype": "float32"},
    "lora_linear": {"tokens": 5, "hidden_size": 16, "rank": 2, "dtype": "float32"},
    "lora_mlp": {"tokens": 5, "hidden_size": 16, "intermediate_size": 24, "rank": 2, "dtype": "float32"},
    "rms_norm": {"tokens": 5, "hidden_size": 16, "dtype": "float32"},
    "rope": {"tokens": 5, "heads": 2, "head_size": 8, "dtype": "float32"},
    "swiglu": {"tokens": 5, "intermediate_size": 16, "dtype": "float32"},
    "forest_attention": {
        "trees": 2, "prompt": 7, "children": 2, "response": 3, "heads": 2, "head_size": 8, "dtype": "float32"
    },
    "packing": {"sequences": 6, "tokens": "3 to 9"},
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_ways_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is compared fairly: each way that runs here gives the first one's values, and gradients."""
    benchmark = importlib.import_module(f"srcfast_benchmarks.{name}").BENCHMARK
    monkeypatch.setattr(sys.modules[f"srcfast_benchmarks.{name}"], "VOCABULARY", 50, raising=False)
    expected: list[torch.Tensor] = []
    compared = 0
    for impl, prepare in benchmark.implementations.items():
        if impl in benchmark.limits or impl == "cut_cross_entropy":  # compiles for half a minute
            continue
        inputs = benchmark.inputs(SMALL[name], "cpu")
        leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        try:
            output = prepare(inputs)()
        except ImportError:
            continue
        if name == "forest_attention" and impl == "paths":  # rows of the prompt come once a path
            rows = torch.cat(inputs["forest"].paths())
            whole = torch.empty_like(inputs["q"])
            whole[rows] = output.detach()
            found = [whole]
        else:
            gradients = torch.autograd.grad(output.sum(), leaves) if leaves else ()
            found = [output.detach(), *gradients]
        expected = expected or found
        compared += 1
        for one, other in zip(found, expected, strict=False):
            torch.testing.assert_close(one.float(), other.float(), rtol=1e-3, atol=1e-4)
    assert compared >= 2


def test_a_run_ends_in_tables_a_csv_and_a_plot(tmp_path: Path) -> None:
    code = (
        "import sys; from srcfast_benchmarks import harness, rope\n"
        f"rope.BENCHMARK.shapes['cpu'] = [{SMALL['rope']!r}]\n"
        "rope.BENCHMARK.implementations['broken'] = lambda inputs: (lambda: 1 / 0)\n"
        "harness.main(rope.BENCHMARK)\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    command = [sys.executable, program, "--device", "cpu", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rope_cpu.csv", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["way"], row["mode"]) for row in rows] == [
        (impl, mode) for impl in ("transformers", "srcfast") for mode in ("forward", "backward", "both")
    ] + [("broken", "both")]
    assert "ZeroDivisionError" in rows[-1]["failed"] and rows[0]["torch"] == torch.__version__
    assert all(float(row["low"]) <= float(row["milliseconds"]) <= float(row["high"]) for row in rows[:-1])
    assert "<svg" in (tmp_path / "rope_cpu.svg").read_text(encoding="utf-8")
    assert "srcfast" in done.stdout and "failed" in done.stdout


def test_memory_is_what_a_call_holds_at_its_peak(tmp_path: Path) -> None:
    code = (
        "import json, torch; from srcfast_benchmarks.harness import extra_bytes\n"
        "warm = torch.ones(1 << 22)\n"
        "print(json.dumps(extra_bytes(lambda: (torch.ones(1 << 24) + 1.0).sum(), 'cpu') / 2**20))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(128, abs=8)  # two tensors of 64 MiB


def test_the_page_is_what_the_committed_results_say() -> None:
    assert summary.PAGE.read_text(encoding="utf-8") == summary.page()
    assert summary.README.read_text(encoding="utf-8") == summary.readme()
    assert summary.STUDY_PAGE.read_text(encoding="utf-8") == summary.study_page()
    assert harness.RESULTS.is_dir()
