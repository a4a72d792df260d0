"""A whole calibration on 1, 2 and 4 ranks, continued with another number; under `torchrun -m srcfast`, stops and errors, too."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.rank_runs import RankServer
from safetensors.numpy import load_file

from srcfast.data.jsonl import read_shards

# Pieces of 8 batches of one: two of the candidates, two of each evaluation.
SETTINGS = """
name: small
quiet: true
threads: 1
model: {path: embedded}
scorer: {path: embedded}
data:
  train:
    - {name: world, format: world, split: train, limit: 32, use: [rationale]}
    - {name: world-fresh, format: world, split: train, seed: 1, limit: 16, use: [calibration]}
  evaluation:
    - {name: world, format: world, split: test, limit: 12}
lora: {r: 8, alpha: 16}
rationale: {samples: 32, epochs: 6, micro_batch_size: 5, gradient_accumulation_steps: 1, learning_rate: 2.0e-3}
candidates: {samples: 16, num_candidates: 3, max_sentence_tokens: 24, max_new_tokens: 96, batch_size: 1}
curation: {min_margin: 0.0, min_confidence: 0.0, min_rating: 0.0}
dpo: {epochs: 1, micro_batch_size: 6, gradient_accumulation_steps: 1, rehearsal_weight: 1.0}
evaluation: {max_new_tokens: 96, batch_size: 1, bootstrap_resamples: 100, headroom_samples: 3}
"""
KEPT = ("base/evaluation", "rationale", "rationale/evaluation")
FILES = ("candidates", "scores", "preferences")
LIMIT = 600.0  # seconds, on a busy machine


def launcher(ranks: int) -> list[str]:
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *torchrun]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def by_hand(ranks: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line on so many ranks, as it is started by hand."""
    command = [*launcher(ranks), "srcfast", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=LIMIT, check=False)


def run(server: RankServer, ranks: int, logs: Path, *words: str | Path) -> None:
    """The same by forks of one process; fails where a rank does."""
    attempt = server.srcfast(ranks, logs, [*map(str, words)])
    assert attempt.statuses == [0] * ranks, "\n".join(attempt.said)[-4000:]


def calibrate(server: RankServer, ranks: int, config: Path, output: Path) -> Path:
    run(server, ranks, output, "calibrate", config, f"output={output}")
    return output / "small"


def tuned(run: Path, adapter: str) -> np.ndarray:
    tensors = load_file(run / adapter / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def rounds_off(run: Path, copy: Path) -> Path:
    """The run as it was before its first round."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "iteration-1")
    (copy / "summary.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({name: manifest[name] for name in KEPT}))
    return copy


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(server: RankServer, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(server, 1, config, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_continued_on_other_ranks_gives_the_same_files(
    server: RankServer, config: Path, alone: Path, tmp_path: Path, ranks: int
) -> None:
    output = tmp_path / "output"
    rounds_off(alone, output / "small")
    run = calibrate(server, ranks, config, output)
    for kind in FILES:
        shards = sorted((alone / "iteration-1" / kind).glob("*.jsonl"))
        assert shards
        for shard in shards:
            assert (run / "iteration-1" / kind / shard.name).read_bytes() == shard.read_bytes(), shard
    adapter = "iteration-1/adapter"
    np.testing.assert_allclose(tuned(run, adapter), tuned(alone, adapter), rtol=1e-3, atol=2e-6)
    summary, own = (json.loads((one / "summary.json").read_text()) for one in (run, alone))
    assert summary["funnel"] == own["funnel"] and summary["diversity"] == own["diversity"]
    assert (run / "report" / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_whole_run_on_ranks_gives_what_one_gives(
    server: RankServer, config: Path, alone: Path, tmp_path: Path, ranks: int
) -> None:
    run = calibrate(server, ranks, config, tmp_path)
    # AdamW divides by the gradient's size, which enlarges rounding in fp32.
    np.testing.assert_allclose(tuned(run, "rationale/adapter"), tuned(alone, "rationale/adapter"), rtol=1e-3, atol=1e-5)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["stage"] == "rationale"] == list(range(42))  # written once, in order
    base = "predictions/base/world-test.jsonl"
    assert (run / base).read_bytes() == (alone / base).read_bytes()
    for kind, names in (
        ("candidates", ("id", "text", "token_ids")),
        ("scores", ("sample_id", "scores")),
        ("preferences", ("sample_id", "chosen", "rejected", "confidence")),
    ):
        rows, own = ([row for *_, row in read_shards(one / "iteration-1" / kind)] for one in (run, alone))
        assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in own]


@pytest.mark.slow
def test_commands_on_ranks_write_what_one_rank_writes(server: RankServer, config: Path, tmp_path: Path) -> None:
    data, logs = tmp_path / "requests.jsonl", tmp_path / "logs"
    red, blue = "There is a red circle.", "There is no blue square."
    asked = [
        {
            "id": f"{n}",
            "images": [],
            "prompt": f"Is it {n}?",
            "chosen": f"{red} Answer: {n}",
            "rejected": f"{blue} Answer: no",
        }
        for n in range(300)  # more than one part
    ]
    data.write_text("".join(json.dumps(row | {"response": row["chosen"]}) + "\n" for row in asked))
    tuning = ("learning_rate=1e-3", "epochs=1", "micro_batch_size=100", "lora.r=2", "rehearsal_weight=0")
    for ranks in (1, 2):
        for command, *words in (
            ("candidates", "--output=candidates"),
            ("score", "--candidates=candidates", "--output=scores"),
            ("evaluate", "--output=evaluation"),
        ):
            options = [word.replace("=", f"={tmp_path}/{ranks}/") for word in words]
            run(server, ranks, logs, command, config, f"output={tmp_path}/{ranks}", *options)
        run(server, ranks, logs, "logprob", config, f"--data={data}", f"--output={tmp_path}/{ranks}/logprobs.jsonl")
        run(server, ranks, logs, "dpo", config, f"--data={data}", f"--output={tmp_path}/dpo-{ranks}", *tuning)
        summary = json.loads((tmp_path / f"dpo-{ranks}" / "summary.json").read_text())
        assert summary["references_computed"] == 300
    files = [path.relative_to(tmp_path / "1") for path in sorted((tmp_path / "1").rglob("*.json*"))]
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "2" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file
    # AdamW divides by the gradient's size, which enlarges rounding in fp32.
    np.testing.assert_allclose(tuned(tmp_path, "dpo-2"), tuned(tmp_path, "dpo-1"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_error_on_the_ranks_is_shown_and_the_status_is_not_0(tmp_path: Path) -> None:
    done = by_hand(2, "rationale", f"--data={tmp_path / 'none.jsonl'}", f"--output={tmp_path / 'adapter'}")
    assert done.returncode != 0
    assert "none.jsonl: expected a readable file" in done.stderr  # the rank's words
    assert "InputError" in done.stderr  # torchrun's account of the first failure


def children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for torchrun's processes in /proc")
@pytest.mark.parametrize("how", ["one rank is killed", "torchrun is asked to stop"])
def test_a_run_that_is_stopped_ends_and_the_same_command_continues_it(
    server: RankServer, config: Path, alone: Path, tmp_path: Path, how: str
) -> None:
    command = [*launcher(2), "srcfast", "calibrate", str(config), f"output={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment())
    metrics = tmp_path / "small" / "metrics.jsonl"
    end = time.monotonic() + LIMIT
    while not (metrics.is_file() and metrics.read_text()):  # until the first step of training is done
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    if how == "one rank is killed":
        os.kill(children(process.pid)[1], signal.SIGKILL)
    else:
        process.terminate()
    errors = process.communicate(timeout=LIMIT)[1]
    assert process.returncode != 0, errors
    if how == "one rank is killed":
        assert "SIGKILL" in errors
    else:  # nothing is done again
        assert list((tmp_path / "small" / "checkpoint" / "rationale").glob("step-*/COMPLETE")), errors
    run = calibrate(server, 1, config, tmp_path)
    np.testing.assert_allclose(tuned(run, "rationale/adapter"), tuned(alone, "rationale/adapter"), rtol=1e-3, atol=1e-5)
    assert (run / "report" / "index.html").is_file()
