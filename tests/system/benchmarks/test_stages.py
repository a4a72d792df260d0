"""The benchmarks of whole stages: what they compare is the same work, and a run ends in a table, a file and a plot."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from srcfast_benchmarks import GENERAL_STAGES, STAGES, random_models, stage_harness
from srcfast_benchmarks.random_models import (
    SMALL,
    SMALL_JUDGE,
    SMALL_QWEN3_VL,
    ModelShape,
    words_of,
    write_model,
    write_records,
)
from srcfast_benchmarks.stage_harness import StageBenchmark, Watch

FOLDER = Path(stage_harness.__file__).parent
TINY = {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 2, "vision_layers": 2}
TINY_LVLM: ModelShape = replace(SMALL, **TINY)  # type: ignore[arg-type]
SHAPES: dict[str, dict[str, Any]] = {
    "rationale_step": {"batch": 4, "steps": 3, "r": 4, "quantize": "none"},
    "dpo_step": {"batch": 4, "steps": 3, "r": 4, "quantize": "none"},
    "candidates": {"prompts": 3, "candidates": 4, "most_tokens": 12},
    "judging": {"samples": 2, "candidates": 3},
}


def benchmark_of(name: str) -> StageBenchmark:
    return importlib.import_module(f"srcfast_benchmarks.{name}").BENCHMARK


def test_every_stage_is_listed_and_names_its_file() -> None:
    files = {
        file.stem
        for file in FOLDER.glob("*.py")
        if "\nBENCHMARK = StageBenchmark(\n" in file.read_text(encoding="utf-8")
    }
    assert files == set(STAGES)
    assert {file.stem for file in FOLDER.glob("qwen3_vl_*.py")} == set(GENERAL_STAGES)
    for name in (*STAGES, *GENERAL_STAGES):
        benchmark = benchmark_of(name)
        assert benchmark.name == name and set(benchmark.shapes) == ({"cpu", "cuda"} if name in STAGES else {"cpu"})
        assert benchmark.headline in benchmark.implementations and benchmark.headline.startswith("srcfast")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STAGES, *GENERAL_STAGES])
def test_all_ways_do_the_same_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and verdicts agree with the first implementation's; candidates can't, but as many are asked for."""
    pytest.importorskip("trl")
    stage = name.removeprefix("qwen3_vl_")
    shared = importlib.import_module(f"srcfast_benchmarks.{'dpo_step' if name == 'rationale_step' else stage}")
    tiny: dict[str, ModelShape] = {name: replace(SMALL_QWEN3_VL, **TINY, kv_heads=1) for name in GENERAL_STAGES}  # type: ignore[arg-type]
    small = replace(SMALL_JUDGE, **TINY) if name == "judging" else tiny.get(name, TINY_LVLM)  # type: ignore[arg-type]
    model = benchmark_of(name).shapes["cpu"][0]["model"]
    monkeypatch.setitem(shared.MODELS, model, small)
    shape = {"model": model, "dtype": "float32", **SHAPES[stage]}
    benchmark = benchmark_of(name)
    benchmark.prepare(shape, tmp_path, "cpu")
    found: dict[str, Watch] = {}
    for impl, run in benchmark.implementations.items():
        watch = Watch("cpu")
        try:
            run(shape, tmp_path, "cpu", watch)
        except ImportError:
            continue
        found[impl] = watch
    assert len(found) >= 2
    first = next(iter(found.values()))
    for watch in found.values():
        assert all(one["seconds"] > 0 and one["units"] > 0 and one["samples"] > 0 for one in watch.rounds)
        if benchmark.tolerance is not None:
            values = [one["value"] for one in watch.rounds]
            assert values == pytest.approx([one["value"] for one in first.rounds], abs=benchmark.tolerance)
            assert len(set(values)) > 1  # something is learnt, or judged


def test_a_random_model_writes_sentences_that_end(tmp_path: Path) -> None:
    from srcfast.config.settings import CandidatesConfig
    from srcfast.models import ImageFeatures, load_lvlm
    from srcfast.stages.candidates import generate_candidates
    from srcfast.stages.prompts import image_loader

    shape = replace(TINY_LVLM, end_probability=1 / 10, stop_probability=1 / 6)
    model = load_lvlm(write_model(tmp_path / "model", shape))
    samples, pairs = write_records(tmp_path, model.tokenizer, 12, image_side=64, response_words=(9, 9))
    assert {len(model.encode_response(pair.chosen)) for pair in pairs} == {10}
    settings = CandidatesConfig(
        num_candidates=4,
        num_beams=2,
        proposals=2,
        max_new_tokens=60,
        top_p=1.0,
        max_sentences=12,
        max_sentence_tokens=48,
    )
    features = ImageFeatures(model, image_loader(samples))
    found = generate_candidates(model, samples, settings, features=features, seed=0, batch_size=12)
    written = [candidate for own in found for candidate in own]
    assert len(written) > 24  # of 48: those that didn't end are left out
    assert 4 < sum(len(candidate.token_ids) for candidate in written) / len(written) < 25
    assert any("." in candidate.text for candidate in written)


def test_words_are_single_tokens_and_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", TINY_LVLM)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    words = words_of(tokenizer)
    assert len(words) > 500 and len(tokenizer) == TINY_LVLM.vocabulary
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words[::50])
    written = (directory / "model.safetensors").stat().st_mtime_ns
    write_model(directory, TINY_LVLM)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    assert random_models.shape_of(directory) == TINY_LVLM


def test_a_way_whose_package_is_missing_is_left_out(tmp_path: Path) -> None:
    def missing(*_: Any) -> None:
        import no_such_package  # noqa: F401

    benchmark = StageBenchmark("made_up", "pairs", {}, lambda *_: None, {"peer": missing}, "srcfast")
    assert (
        "no_such_package" in stage_harness.run_implementation(benchmark, "peer", {}, str(tmp_path), "cpu")["left_out"]
    )


def test_a_run_ends_in_a_table_a_file_and_a_plot(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from srcfast_benchmarks import stage_harness\n"
        "from srcfast_benchmarks.stage_harness import StageBenchmark, main\n"
        "class Clock:\n"
        "    seconds = 0.0\n"
        "    def perf_counter(self): return self.seconds\n"
        "    def sleep(self, seconds): self.seconds += seconds\n"
        "time = stage_harness.time = Clock()  # a busy machine does not make it go faster\n"
        "def implementation(seconds, off):\n"
        "    def run(shape, folder, device, watch):\n"
        "        kept = (folder / 'prepared').read_text()\n"
        "        watch.start()\n"
        "        for step in range(4):\n"
        "            with watch.paused():\n"
        "                time.sleep(0.05)\n"
        "            time.sleep(seconds)\n"
        "            watch.lap(3, tokens=30, value=step + off)\n"
        "    return run\n"
        "def broken(*_): raise ValueError('broken')\n"
        "implementations = {'peer': implementation(0.2, 0.0), 'srcfast': implementation(0.02, 0.5), 'broken': broken}\n"
        "prepare = lambda shape, folder, device: (folder / 'prepared').write_text('yes')\n"
        "main(StageBenchmark('made_up', 'pairs', {'cpu': [{'n': 1}]}, prepare, implementations, 'srcfast', tolerance=1.0))\n"
    )
    command = [sys.executable, program, "--device", "cpu", "--output", tmp_path, "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "made_up_cpu.json").read_text(encoding="utf-8"))
    peer, ours, broken = result["rows"]
    assert (peer["way"], ours["way"], broken["way"]) == ("peer", "srcfast", "broken")
    assert "ValueError" in broken["failed"]
    assert ours["rounds"] == 3 and ours["processes"] == 1  # the first of four warms up
    # A tenth of the sleep; pauses are on nobody's time.
    assert ours["speedup"] == pytest.approx(10.0) and peer["speedup"] == 1.0
    assert peer["per_second"] == pytest.approx(3 / 0.2)
    assert ours["largest_difference"] == 0.5
    assert ours["tokens_per_second"] == pytest.approx(10 * ours["per_second"])
    assert "<svg" in (tmp_path / "made_up_cpu.svg").read_text(encoding="utf-8")
    assert "srcfast" in done.stdout and "failed" in done.stdout
