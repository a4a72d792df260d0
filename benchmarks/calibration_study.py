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

from srcfast.calibrate import calibrate, evaluate, rationale
from srcfast.config.load import load_config
from srcfast.data.jsonl import read_jsonl, write_json
from srcfast.run.environment import environment
from srcfast.stages.calibration_run import CalibrationRun
from srcfast.stages.evaluation import bootstrap_interval
from srcfast.stages.headroom import recovered

ROOT = Path(__file__).parents[1]
FIGURES = (("accuracy", "right"), ("alignment", "aligned"))  # and what a prediction calls them
ALL = ("all", "held out")  # every test set's samples together


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
        control = CalibrationRun(load_config(config, longer))
        rationale(control)
        evaluate(control, "rationale", control.directory.adapter(0))
        controls.append(control.config.run_path)
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    sets = list(dict.fromkeys((e["dataset"], e["split"]) for e in summaries[0]["evaluations"]))
    sets.append(ALL)
    models = list(dict.fromkeys(e["model"] for e in summaries[0]["evaluations"]))
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/calibration_study.py", f"--seeds {seeds}", *overrides]),
        "device": environment() | {"platform": platform.platform()},
        "seeds": seeds,
        "evaluations": [pooled(model, dataset, runs) for model in models for dataset in sets],
        "control": {
            "what": "rationale tuning alone for as many epochs as tuning and rehearsal take together",
            "evaluations": [pooled("rationale", dataset, controls) for dataset in sets],
        },
        "gains": [
            gain(before, after, dataset, runs, controls) for before, after in compared(models) for dataset in sets
        ],
        "headroom": pooled_headroom([summary["headroom"] for summary in summaries]),
        "headroom_by_seed": [summary["headroom"] for summary in summaries],
        "funnel": [summary["funnel"] for summary in summaries],
    }
    write_json(ROOT / "benchmarks" / "results" / f"{name}.json", result)
    print(short_table(result), table(result), gains_table(result), headroom_table(result), sep="\n\n")


def values(model: str, dataset: tuple[str, str], key: str, runs: list[Path]) -> np.ndarray:
    """Return [seeds, samples]: whether each prediction of a model on one test set (or all of them) is right, or aligned."""
    name = "*" if dataset == ALL else f"{dataset[0]}-{dataset[1]}"
    files = [sorted((run / "predictions" / model).glob(f"{name}.jsonl")) for run in runs]
    return np.array([[float(bool(row[key])) for file in of_run for _, row in read_jsonl(file)] for of_run in files])


def pooled(model: str, dataset: tuple[str, str], runs: list[Path]) -> dict[str, Any]:
    """Compute a model's figures on one test set over all seeds."""
    result: dict[str, Any] = {"model": model, "dataset": dataset[0], "split": dataset[1]}
    for figure, key in FIGURES:
        outcomes = values(model, dataset, key, runs)
        result["n"] = outcomes.shape[1]
        result[figure] = float(outcomes.mean())
        result[f"{figure}_ci95"] = bootstrap_interval(outcomes.mean(axis=0), 2000, 0)
        result[f"{figure}_by_seed"] = outcomes.mean(axis=1).tolist()
    return result


def compared(models: list[str]) -> list[tuple[str, str]]:
    """Each model with the one before it, and the last with the rationale-tuned one and with the control."""
    return list(dict.fromkeys([*itertools.pairwise(models), ("rationale", models[-1]), ("control", models[-1])]))


def gain(before: str, after: str, dataset: tuple[str, str], runs: list[Path], controls: list[Path]) -> dict[str, Any]:
    """Compute how much better one model is than another on the same samples, with an interval that is paired by sample."""
    result: dict[str, Any] = {"from": before, "to": after, "dataset": dataset[0], "split": dataset[1]}
    for figure, key in FIGURES:
        start = (
            values("rationale", dataset, key, controls) if before == "control" else values(before, dataset, key, runs)
        )
        difference = (values(after, dataset, key, runs) - start).mean(axis=0)  # [samples]
        result[figure] = float(difference.mean())
        result[f"{figure}_ci95"] = bootstrap_interval(difference, 2000, 0)
    return result


def pooled_headroom(by_seed: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Compute each round's headroom, the mean over seeds and test sets by sample; what is recovered is a share of these means."""
    entries = [entry for seed in by_seed for entry in seed]
    pools = []
    for iteration in sorted({entry["iteration"] for entry in entries}):
        of_round = [entry for entry in entries if entry["iteration"] == iteration]
        names = ("n_candidates", "pass_at_1", "pass_at_n", "best_of_n", "scorer_oracle_agreement", "next_pass_at_1")
        sizes = [entry["n"] for entry in of_round]
        pool: dict[str, Any] = {"iteration": iteration, "n": sum(sizes)}
        pool |= {name: float(np.average([entry[name] for entry in of_round], weights=sizes)) for name in names}
        pools.append(pool | {"recovered": recovered(pool, pool["next_pass_at_1"])})
    return pools


def short_table(result: dict[str, Any]) -> str:
    """Markdown for the README: percent right and percent aligned of the base, both baselines and the last model."""
    evaluations = result["evaluations"]
    last = evaluations[-1]["model"]
    rows = [
        ("base", [e for e in evaluations if e["model"] == "base"]),
        ("rationale fine-tuning", [e for e in evaluations if e["model"] == "rationale"]),
        ("control: the same for more epochs", result["control"]["evaluations"]),
        (f"SRC, {last.removeprefix('iteration-')} rounds", [e for e in evaluations if e["model"] == last]),
    ]
    sets = [f"{e['dataset']}, {e['split']} ({e['n']:,})" for e in rows[0][1]]
    lines = ["| right / aligned, % | " + " | ".join(sets) + " |", "|" + " --- |" * (1 + len(sets))]
    for name, entries in rows:
        cells = [f"{100 * entry['accuracy']:.1f} / {100 * entry['alignment']:.1f}" for entry in entries]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Markdown: accuracy and alignment of every model, and of the control, on each test set; percent, 95 % intervals."""
    entries = [*result["evaluations"], *({**e, "model": "control"} for e in result["control"]["evaluations"])]
    sets = list(dict.fromkeys((e["dataset"], e["split"]) for e in entries))
    lines = ["| | " + " | ".join(f"{dataset}, {split}" for dataset, split in sets) + " |"]
    lines.append("|" + " --- |" * (1 + len(sets)))
    for figure, _ in FIGURES:
        for model in dict.fromkeys(e["model"] for e in entries):
            of_model = [
                next(e for e in entries if (e["model"], e["dataset"], e["split"]) == (model, *dataset))
                for dataset in sets
            ]
            cells = [percent(entry[figure], entry[f"{figure}_ci95"]) for entry in of_model]
            lines.append(f"| {figure}, {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains_table(result: dict[str, Any]) -> str:
    """Markdown: what the last model gains on the first and on the rationale-tuned one; points, paired 95 % intervals."""
    gains = result["gains"]
    sets = list(dict.fromkeys((g["dataset"], g["split"]) for g in gains))
    last = gains[-1]["to"]
    lines = ["| | " + " | ".join(f"{dataset}, {split}" for dataset, split in sets) + " |"]
    lines.append("|" + " --- |" * (1 + len(sets)))
    for figure, _ in FIGURES:
        for before, after in (("base", "rationale"), ("rationale", last), ("control", last)):
            of_models = [g for g in gains if (g["from"], g["to"]) == (before, after)]
            cells = [percent(g[figure], g[f"{figure}_ci95"]) for g in of_models]
            lines.append(f"| {figure}, {before} to {after} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headroom_table(result: dict[str, Any]) -> str:
    """Markdown: each round's headroom over all seeds and test sets, in percent."""
    names = ("pass_at_1", "pass_at_n", "best_of_n", "scorer_oracle_agreement", "next_pass_at_1", "recovered")
    lines = ["| round | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + " --- |" * (1 + len(names)))
    for entry in result["headroom"]:
        lines.append(f"| {entry['iteration']} | " + " | ".join(f"{100 * entry[name]:.0f}" for name in names) + " |")
    return "\n".join(lines)


def percent(value: float, interval: list[float]) -> str:
    """As in `73.1 (71.2 to 75.0)`."""
    return f"{100 * value:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


if __name__ == "__main__":
    typer.run(main)
