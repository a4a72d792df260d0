"""Does calibration help? Base against rationale-tuned against calibrated, over several seeds.

    python benchmarks/calibration_study.py --seeds 3

The settings are `calibration_study.yaml`'s. Each seed has its own adapter, order, candidates and rounds; the test samples are
the same. Writes `benchmarks/results/calibration.json`: per model and test set the mean over seeds and a 95 % interval
(bootstrap over samples, each sample's value being its mean over seeds), every seed's own figure, what each model gains on the
one before it (paired by sample), and the headroom of every round. Seeds that run side by side, as
`srcfast calibrate benchmarks/calibration_study.yaml seed=K name=calibration-K`, are finished stages to this command.
"""

from __future__ import annotations

import itertools
import json
import platform
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from srcfast.calibrate import Calibration, calibrate
from srcfast.config import load_config
from srcfast.data.jsonl import read_jsonl, write_json
from srcfast.runtime.run_directory import environment
from srcfast.stages.evaluation import bootstrap_interval

ROOT = Path(__file__).parents[1]
FIGURES = (("accuracy", "right"), ("alignment", "aligned"))  # and what a prediction calls them


def main(
    words: Annotated[list[str] | None, typer.Argument(help="settings that differ from the file's, key=value")] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds, from 0")] = 3,
    name: Annotated[str, typer.Option(help="of the result file and the runs")] = "calibration",
    config: Annotated[Path, typer.Option(help="settings")] = ROOT / "benchmarks" / "calibration_study.yaml",
) -> None:
    """Run the seeds one after the other (finished stages are not run again) and write the result file."""
    overrides = list(words or [])
    runs, controls = [], []
    for seed in range(seeds):
        settings = load_config(config, [*overrides, f"seed={seed}", f"name={name}-{seed}"])
        calibrate(settings)
        runs.append(settings.run_path)
        epochs = settings.rationale.epochs + settings.iterations * settings.dpo.epochs
        longer = [*overrides, f"seed={seed}", f"name={name}-control-{seed}", f"rationale.epochs={epochs}"]
        control = Calibration(load_config(config, longer))
        control.rationale()
        control.evaluate("rationale", control.directory.rationale_adapter)
        controls.append(control.config.run_path)
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    sets = list(dict.fromkeys((e["dataset"], e["split"]) for e in summaries[0]["evaluations"]))
    models = list(dict.fromkeys(e["model"] for e in summaries[0]["evaluations"]))
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/calibration_study.py", f"--seeds {seeds}", *overrides]),
        "device": environment() | {"platform": platform.platform()},
        "seeds": seeds,
        "evaluations": [pooled(model, one, runs) for model in models for one in sets],
        "control": {
            "what": "rationale tuning alone for as many epochs as tuning and rehearsal take together",
            "evaluations": [pooled("rationale", one, controls) for one in sets],
        },
        "gains": [
            gain(before, after, one, runs)
            for before, after in [*itertools.pairwise(models), ("rationale", models[-1])]
            for one in sets
        ],
        "headroom": [summary["headroom"] for summary in summaries],
        "funnel": [summary["funnel"] for summary in summaries],
        "seconds": [summary["seconds"] for summary in summaries],
        "peak_rss_bytes": [summary["peak_rss_bytes"] for summary in summaries],
    }
    write_json(ROOT / "benchmarks" / "results" / f"{name}.json", result)
    print(table(result["evaluations"]))


def values(model: str, one: tuple[str, str], key: str, runs: list[Path]) -> np.ndarray:
    """[seeds, samples]: whether each prediction of a model on one test set is right, or aligned."""
    file = Path("predictions") / model / f"{one[0]}-{one[1]}.jsonl"
    return np.array([[float(bool(row[key])) for _, row in read_jsonl(run / file)] for run in runs])


def pooled(model: str, one: tuple[str, str], runs: list[Path]) -> dict[str, Any]:
    """One model's figures on one test set over all seeds."""
    result: dict[str, Any] = {"model": model, "dataset": one[0], "split": one[1]}
    for figure, key in FIGURES:
        found = values(model, one, key, runs)
        result["n"] = found.shape[1]
        result[figure] = float(found.mean())
        result[f"{figure}_ci95"] = bootstrap_interval(found.mean(axis=0), 2000, 0)
        result[f"{figure}_by_seed"] = found.mean(axis=1).tolist()
    return result


def gain(before: str, after: str, one: tuple[str, str], runs: list[Path]) -> dict[str, Any]:
    """How much better one model is than another on the same samples, with an interval that is paired by sample."""
    result: dict[str, Any] = {"from": before, "to": after, "dataset": one[0], "split": one[1]}
    for figure, key in FIGURES:
        difference = (values(after, one, key, runs) - values(before, one, key, runs)).mean(axis=0)  # [samples]
        result[figure] = float(difference.mean())
        result[f"{figure}_ci95"] = bootstrap_interval(difference, 2000, 0)
    return result


def table(evaluations: list[dict[str, Any]]) -> str:
    """Markdown rows: a model's accuracy and alignment on each test set, in percent, with intervals."""
    sets = list(dict.fromkeys((e["dataset"], e["split"]) for e in evaluations))
    lines = ["| model | " + " | ".join(f"{d} {s}: accuracy | aligned" for d, s in sets) + " |"]
    lines.append("|" + " --- |" * (1 + 2 * len(sets)))
    for model in dict.fromkeys(e["model"] for e in evaluations):
        cells = []
        for one in sets:
            entry = next(e for e in evaluations if e["model"] == model and (e["dataset"], e["split"]) == one)
            for figure in ("accuracy", "alignment"):
                low, high = entry[f"{figure}_ci95"]
                cells.append(f"{100 * entry[figure]:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
