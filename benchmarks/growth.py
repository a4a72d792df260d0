"""What all stages cost but their models, as work grows: do time and memory grow in step with the samples, or faster?

    python -m srcfast_benchmarks.growth [--samples 1000,10000,100000] [--output DIR]

One process a size runs the stages in turn on made-up records (seeded): samples are read from JSON lines with every image
checked, and from easy-VQA as far as it goes; trees are built and packed; candidates and scores are written and read in
shards; pairs are curated and written; answers are summed up, and the report is drawn. What judging and searching add beside
the model is done block by block, a sample at a time. Writes `growth_cpu.csv`: seconds, the process's own CPU seconds, which
others on the machine don't add to, and peak resident memory beyond what the imports hold. `time_growth` (of CPU seconds) and
`memory_growth` are the factors per tenfold of what the stage works on: 10 is linear.
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from srcfast.config.settings import CurationConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.in_order import samples_in_order
from srcfast.data.jsonl import read_shards, write_json, write_jsonl, write_shards
from srcfast.data.rationale_format import format_response, parse_response
from srcfast.data.readers import read_preferences, read_samples
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.report.gallery import MAX_CARDS as GALLERY
from srcfast.report.page import write_report
from srcfast.stages.curation import curate
from srcfast.stages.evaluation import Counts, Prediction, summarise
from srcfast.world.easy_vqa import read_easy_vqa
from srcfast_benchmarks.harness import RESULTS, resident, write_csv

SIZES = (1_000, 10_000, 100_000)
CANDIDATES = 8
IMAGES = 16
PROMPT, RESPONSE = (600, 660), (20, 60)  # tokens of the trees: the least, and one more than the most
TOKEN_BUDGET = 16_384
WORDS = "red green blue circle square left right above below small large one two three there is a so the".split()


# Made-up records, each from its own number ---------------------------------------------------------------------


def sample_row(number: int) -> dict[str, Any]:
    rng = np.random.default_rng((0, number))
    facts = [f"There is a {' '.join(rng.choice(WORDS, 4))}." for _ in range(3)]
    question = f"What is {' '.join(rng.choice(WORDS, 5))}?"
    return {
        "id": f"s{number}",
        "images": [f"{number % IMAGES}.png"],
        "question": question,
        "answer": "red",
        "facts": facts,
    }


def candidate_rows(size: int) -> Iterator[dict[str, Any]]:
    for number in range(size):
        rng = np.random.default_rng((1, number))
        for k in range(CANDIDATES):
            see, think = (f"{' '.join(rng.choice(WORDS, 8))} {k}.".capitalize() for _ in range(2))
            answer = str(rng.choice(("red", "green")))
            text = format_response([see], [think], answer, "tagged")
            tokens = tuple(rng.integers(0, 32_000, 50).tolist())
            yield Candidate(f"s{number}/{k}", f"s{number}", text, f"{see} {think}", answer, -9.5, tokens).to_json()


def score_rows(size: int) -> Iterator[dict[str, Any]]:
    square = CANDIDATES * (CANDIDATES - 1)
    for number in range(size):
        rng = np.random.default_rng((2, number))
        p = rng.random((CANDIDATES, CANDIDATES))
        q = 0.5 * (p + 1.0 - p.T)
        u = np.abs(2.0 * q - 1.0) * (1.0 - np.abs(p + p.T - 1.0))
        np.fill_diagonal(u, 0.0)
        yield {
            "sample_id": f"s{number}",
            "candidate_ids": [f"s{number}/{k}" for k in range(CANDIDATES)],
            "scores": ((u * q).sum(1) / u.sum(1)).tolist(),
            "win_probability": q.tolist(),
            "confidence": u.tolist(),
            "raw": p.tolist(),
            "alone": rng.random(CANDIDATES).tolist(),
            "flip_rate": 0.1,
            "tie_rate": 0.1,
            "pairs": square // 2,
            "verdicts": square,
        }


# The stages ----------------------------------------------------------------------------------------------------


class Stages:
    """The stages in order; each gives how many items it worked on."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.samples: list[Sample] = []
        self.pairs: list[Preference] = []
        self.funnel: dict[str, Any] = {}
        (folder / "images").mkdir()
        for number in range(IMAGES):
            Image.new("RGB", (64, 64), (16 * number, 0, 0)).save(folder / "images" / f"{number}.png")
        write_jsonl(folder / "samples.jsonl", (sample_row(number) for number in range(size)))

    def read_json_lines(self) -> int:
        rejected: list[dict[str, Any]] = []
        root = self.folder / "images"
        self.samples = read_samples(self.folder / "samples.jsonl", format="jsonl", image_root=root, rejected=rejected)
        assert not rejected
        return len(self.samples)

    def read_easy_vqa(self) -> int:
        return len(read_easy_vqa("train", self.size))

    def build_and_pack_trees(self) -> int:
        """A prompt, chosen and rejected a sample; each forest is let go of, as when a pass runs over them.

        What tokenizing adds is left out. The collector is held as `preference_trees` does.
        """
        rng = np.random.default_rng(3)
        sizes = np.stack([rng.integers(*PROMPT, self.size), *(rng.integers(*RESPONSE, (2, self.size)))], axis=1)
        with pause_full_collections():
            trees = [
                Tree(tuple(Segment(np.zeros(n, dtype=np.int64), min(0, k - 1)) for k, n in enumerate(row)), key=number)
                for number, row in enumerate(sizes.tolist())
            ]
        packed = sum(len(forest.trees) for forest in Forest.packed(trees, TOKEN_BUDGET))
        assert packed == self.size
        return packed

    def write_candidates(self) -> int:
        return write_shards(self.folder / "candidates", candidate_rows(self.size))

    def read_candidates(self) -> int:
        return sum(len(own) for _, own in self._candidates().rest())

    def write_scores(self) -> int:
        return write_shards(self.folder / "scores", score_rows(self.size))

    def curate(self) -> int:
        rows = (row for *_, row in read_shards(self.folder / "scores"))
        self.pairs, self.funnel = curate(self.samples, self._candidates(), rows, CurationConfig())
        assert self.funnel["samples"] == self.size
        return self.size

    def write_preferences(self) -> int:
        return write_shards(self.folder / "preferences", (pair.to_json() for pair in self.pairs))

    def read_preferences(self) -> int:
        rejected: list[dict[str, Any]] = []
        count, root = 0, self.folder / "images"
        for shard in sorted((self.folder / "preferences").glob("[0-9]*.jsonl")):
            count += len(read_preferences(shard, format="jsonl", image_root=root, rejected=rejected))
        assert not rejected
        return count

    def sum_up_answers(self) -> int:
        """Accuracy and its interval from one answer a sample, counted as `write_predictions` does."""
        parsed = parse_response(format_response(["There is a red circle."], ["So it is red."], "red", "tagged"))
        counts = Counts()
        for number, sample in enumerate(self.samples):
            counts.add(Prediction(sample, "", "", parsed.answer, number % 3 > 0, None))
        self.entry = summarise(counts, model="base", dataset="made up", split="test", resamples=1000, seed=0)
        return self.size

    def draw_report(self) -> int:
        """With a training step for each 16 samples, the funnel, and a gallery as long as a run's."""
        steps = self.size // 16
        rng = np.random.default_rng(4)
        rows = (
            {"stage": "iteration-1/dpo", "step": step, "loss": value, "margin": value, "reward_accuracy": value}
            for step, value in enumerate(rng.random(steps).tolist())
        )
        write_jsonl(self.folder / "metrics.jsonl", rows)
        summary = {"evaluations": [self.entry], "funnel": {"iteration-1": self.funnel}, "seconds": 1.0}
        write_json(self.folder / "summary.json", summary)
        write_json(self.folder / "gallery.json", [self._card(pair) for pair in self.pairs[:GALLERY]])
        (self.folder / "config.yaml").write_text(yaml.safe_dump({"name": "growth"}), encoding="utf-8")
        write_report(self.folder)
        return self.size

    def _card(self, pair: Preference) -> dict[str, Any]:
        texts, keys = (pair.chosen, pair.rejected), ("chosen_score", "rejected_score")
        return {
            "sample_id": pair.sample_id,
            "image": str(pair.image_root / pair.images[0]),
            "question": pair.prompt,
            "gold": "red",
            "candidates": [{"text": text, "score": pair.extra[key]} for text, key in zip(texts, keys, strict=True)],
            "chosen": 0,
            "rejected": 1,
            "confidence": pair.confidence,
        }

    def _candidates(self) -> Any:
        found = read_shards(self.folder / "candidates")
        return samples_in_order(Candidate.from_json(row, file=file, line=line) for file, line, row in found)


STAGES: tuple[Callable[[Stages], int], ...] = (
    Stages.read_json_lines,
    Stages.read_easy_vqa,
    Stages.build_and_pack_trees,
    Stages.write_candidates,
    Stages.read_candidates,
    Stages.write_scores,
    Stages.curate,
    Stages.write_preferences,
    Stages.read_preferences,
    Stages.sum_up_answers,
    Stages.draw_report,
)


def measure(size: int) -> list[dict[str, Any]]:
    """All stages of one size in this process: a row each."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(Path(folder), size)
        give_back()
        imports = resident("VmRSS")
        for stage in STAGES:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
            start, started = time.perf_counter(), time.process_time()
            items = stage(stages)
            taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - started}
            name = stage.__name__.replace("_", " ")
            peak = max(0, resident("VmHWM") - imports) / 2**20
            rows.append({"samples": size, "stage": name, "items": items, **taken, "peak_mebibytes": peak})
            give_back()
    return rows


def give_back() -> None:
    """What was freed goes back to the system, so that a stage is not charged for the one before."""
    ctypes.CDLL(None).malloc_trim(0)


def with_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with growth per tenfold of items over the next smaller size; memory's where it is more than a few pages."""
    before: dict[str, dict[str, Any]] = {}
    grown = []
    for row in rows:
        last, extra = before.get(row["stage"]), {}
        if last is not None and row["items"] > last["items"]:
            tenfolds = math.log10(row["items"] / last["items"])
            extra["time_growth"] = (row["cpu_seconds"] / last["cpu_seconds"]) ** (1.0 / tenfolds)
            if last["peak_mebibytes"] >= 1.0:
                extra["memory_growth"] = (row["peak_mebibytes"] / last["peak_mebibytes"]) ** (1.0 / tenfolds)
        before[row["stage"]] = row
        grown.append(row | extra)
    return grown


def table(rows: list[dict[str, Any]]) -> Table:
    """Seconds and memory of each stage and size, with the growth."""
    shown = Table(title="growth: factor per tenfold of items, 10 is linear", title_justify="left")
    for column in ("stage", "items", "seconds", "CPU s", "time", "peak MiB", "memory"):
        shown.add_column(column, justify="left" if column == "stage" else "right")
    for row in sorted(rows, key=lambda row: [stage.__name__.replace("_", " ") for stage in STAGES].index(row["stage"])):
        growth = (f"{row[key]:.1f}" if key in row else "" for key in ("time_growth", "memory_growth"))
        cells = (row["stage"], f"{row['items']:,}", f"{row['seconds']:.3g}", f"{row['cpu_seconds']:.3g}", next(growth))
        shown.add_row(*cells, f"{row['peak_mebibytes']:.0f}", next(growth))
    return shown


def main(
    device: Annotated[str, typer.Option(help="cpu: no model takes part")] = "cpu",
    output: Annotated[Path, typer.Option(help="folder for the CSV")] = RESULTS,
    samples: Annotated[str, typer.Option(help="sizes, with commas")] = ",".join(map(str, SIZES)),
    only: Annotated[int, typer.Option(hidden=True, help="one size, in this process, as JSON")] = 0,
) -> None:
    """Measure every size in a process of its own."""
    if only:
        print(json.dumps(measure(only)))
        return
    if device != "cpu":
        Console(stderr=True).print(f"growth: left out on {device}, since no model takes part", style="dim")
        return
    rows: list[dict[str, Any]] = []
    for size in sorted(int(part) for part in samples.split(",")):
        Console(stderr=True).print(f"growth: {size:,} samples", style="dim")
        command = [sys.executable, "-m", "srcfast_benchmarks.growth", "--only", str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    rows = with_growth(rows)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "growth_cpu.csv", rows)
    Console().print(table(rows))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
