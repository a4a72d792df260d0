"""Does calibration help? The demo's settings over several seeds, base against rationale-tuned against calibrated.

    python benchmarks/calibration_study.py --seeds 3

Each seed draws its own training samples, adapter, candidates and order; the test samples are the same. Writes
`benchmarks/results/calibration.json`: per model and test set the mean over seeds and a 95 % interval (bootstrap over samples,
each sample's value being its mean over seeds), every seed's own figure, and the headroom of every round.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from srcfast.calibrate import calibrate
from srcfast.config import load_config
from srcfast.data.jsonl import read_jsonl, write_json
from srcfast.runtime.run_directory import environment
from srcfast.stages.evaluation import bootstrap_interval

ROOT = Path(__file__).parents[1]


def main(
    words: Annotated[list[str] | None, typer.Argument(help="settings that differ from the demo's, key=value")] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds, from 0")] = 3,
    name: Annotated[str, typer.Option(help="of the result file and the runs")] = "calibration",
    config: Annotated[Path, typer.Option(help="settings")] = ROOT / "srcfast" / "world" / "demo.yaml",
) -> None:
    """Run the seeds one after the other (finished stages are not run again) and write the result file."""
    overrides = list(words or [])
    runs = []
    for seed in range(seeds):
        settings = load_config(config, [*overrides, f"seed={seed}", f"name={name}-{seed}"])
        calibrate(settings)
        runs.append(settings.run_path)
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    result = {
        "command": " ".join(["python benchmarks/calibration_study.py", f"--seeds {seeds}", *overrides]),
        "device": environment() | {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "seeds": seeds,
        "evaluations": [pooled(entry, runs, summaries) for entry in summaries[0]["evaluations"]],
        "headroom": [summary["headroom"] for summary in summaries],
        "seconds": [summary["seconds"] for summary in summaries],
        "peak_rss_bytes": [summary["peak_rss_bytes"] for summary in summaries],
    }
    write_json(ROOT / "benchmarks" / "results" / f"{name}.json", result)
    print(table(result["evaluations"]))


def pooled(entry: dict[str, Any], runs: list[Path], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One model's figures on one test set over all seeds."""
    place = ("model", "dataset", "split")
    own = [next(e for e in s["evaluations"] if all(e[k] == entry[k] for k in place)) for s in summaries]
    file = Path("predictions") / entry["model"] / f"{entry['dataset']}-{entry['split']}.jsonl"
    rows = [[row for _, row in read_jsonl(run / file)] for run in runs]  # [seeds][samples]
    result: dict[str, Any] = {key: entry[key] for key in (*place, "n")}
    for figure, key in (("accuracy", "right"), ("alignment", "aligned")):
        values = np.array([[float(bool(row[key])) for row in seed] for seed in rows]).mean(axis=0)  # [samples]
        result[figure] = float(values.mean())
        result[f"{figure}_ci95"] = bootstrap_interval(values, 2000, 0)
        result[f"{figure}_by_seed"] = [e[figure] for e in own]
    result["unparsed_by_seed"] = [e["unparsed"] for e in own]
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
