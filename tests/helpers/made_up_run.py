"""A run directory with made-up results in the form that a run writes, and the world's pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from srcfast.data.rationale_format import format_response, parse_response
from srcfast.world.samples import world_samples
from srcfast.world.verification import verify_sample

MODELS = ("base", "rationale", "iteration-1", "iteration-2")
SPLITS = (("world", "validation", 600), ("world", "generalisation", 400), ("easy_vqa", "test", 500))
ABILITIES = (
    "coarse_perception",
    "fine_grained_perception",
    "instance_reasoning",
    "logical_reasoning",
    "counting_and_arithmetic",
    "spatial_relation",
)


def make_run(path: Path, seed: int = 0, gallery: int = 3) -> Path:
    """Write summary, metrics, settings and gallery of a run of two iterations."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    write = lambda name, value: (path / name).write_text(json.dumps(value))  # noqa: E731
    write("summary.json", summary(rng))
    write(
        "environment.json",
        {"python": "3.12.1", "torch": "2.13.0", "cpu": "A CPU <of 2 cores>", "gpu": None, "threads": 2},
    )
    settings = {
        "name": path.name,
        "seed": seed,
        "model": {"path": "embedded"},
        "candidates": {"num_candidates": 8},
        "evaluation": {"max_new_tokens": 160, "bootstrap_resamples": 1000},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [{"stage": stage, "step": step} | values for stage, step, values in metrics(rng)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("gallery.json", gallery_entries(path, gallery, seed))
    return path


def summary(rng: np.random.Generator) -> dict[str, Any]:
    evaluations = [
        evaluation(rng, model, place, dataset, split, n)
        for place, model in enumerate(MODELS)
        for dataset, split, n in SPLITS
    ]
    stages = [("rationale", 62.0), ("evaluate rationale", 11.4)]
    for k in (1, 2):
        for name, seconds in (
            ("candidates", 48.0),
            ("score", 21.0),
            ("curate", 0.4),
            ("dpo", 35.0),
            ("evaluate", 12.0),
        ):
            stages.append((f"iteration-{k}/{name}", seconds * float(rng.uniform(0.8, 1.2))))
    timings = [{"name": name, "seconds": s, "tokens_per_second": float(rng.uniform(4e3, 2e4))} for name, s in stages]
    return {
        "evaluations": evaluations,
        "funnel": {f"iteration-{k}": funnel(rng) for k in (1, 2)},
        "diversity": {
            f"iteration-{k}": {"distinct_texts": 1.0, "distinct_answers": 0.31, "bigram_overlap": 0.42} for k in (1, 2)
        },
        "rejected": 3,
        "headroom": [headroom(rng, k, dataset, split, n) for k in (1, 2) for dataset, split, n in SPLITS[:2]],
        "stages": timings,
        "peak_rss_bytes": 1_730_000_000,
        "seconds": sum(s for _, s in stages),
    }


def evaluation(rng: np.random.Generator, model: str, place: int, dataset: str, split: str, n: int) -> dict[str, Any]:
    accuracy = min(0.97, 0.58 + 0.05 * place + float(rng.normal(0, 0.01)))
    aligned = (0.0, 0.42, 0.55, 0.62)[place]
    both, right = round(aligned * n), round(accuracy * n)
    cases = {
        "both_right": both,
        "right_answer_wrong_rationale": right - both,
        "right_rationale_wrong_answer": n // 60,
    }
    cases["both_wrong"] = n - sum(cases.values())
    half = lambda share: 1.96 * (share * (1 - share) / n) ** 0.5  # noqa: E731
    interval = lambda share: [share - half(share), share + half(share)]  # noqa: E731
    names = ABILITIES if dataset == "world" else ABILITIES[1:2]
    return {
        "model": model,
        "dataset": dataset,
        "split": split,
        "n": n,
        "accuracy": accuracy,
        "accuracy_ci95": interval(accuracy),
        "unparsed": int(rng.integers(0, 9)),
        "by_ability": {
            name: {
                "n": n // len(names),
                "accuracy": float(rng.uniform(0.4, 0.9)),
                "alignment": float(rng.uniform(0.2, 0.7)),
            }
            for name in names
        },
        "rationale_accuracy": aligned + 0.02,
        "rationale_accuracy_ci95": interval(aligned + 0.02),
        "right_answer_wrong_rationale": cases["right_answer_wrong_rationale"] / n,
        "alignment": aligned,
        "alignment_ci95": interval(aligned),
        "cases": cases,
    }


def funnel(rng: np.random.Generator) -> dict[str, Any]:
    histogram = lambda values: dict(  # noqa: E731
        zip(("counts", "edges"), (part.tolist() for part in np.histogram(values, 20, (0, 1))), strict=True)
    )
    kinds = {
        "right_over_wrong": 0.51,
        "right_over_right": 0.34,
        "wrong_over_wrong": 0.12,
        "wrong_over_right": 0.03,
    }
    return {
        "samples": 1000,
        "with_two_parsed_distinct": 964,
        "with_pair": 964,
        "pairs_proposed": 1866,
        "within_margin": 1410,
        "within_confidence": 1302,
        "kept": 1247,
        "dropped": {
            "fewer_than_two_candidates": 30,
            "fewer_than_two_parsed": 6,
            "margin": 456,
            "confidence": 108,
            "length": 55,
        },
        "mean_kept_confidence": 0.71,
        "pair_correctness": kinds,
        "order_flip_rate": 0.043,
        "tie_rate": 0.21,
        "length_correlation": 0.08,
        "mean_confidence": 0.48,
        "score_histogram": histogram(rng.beta(0.6, 0.7, 7000)),
        "confidence_histogram": histogram(rng.beta(0.7, 0.8, 20000)),
    }


def headroom(rng: np.random.Generator, k: int, dataset: str, split: str, n: int) -> dict[str, Any]:
    first = 0.3 + 0.12 * k + float(rng.normal(0, 0.01))
    return {
        "iteration": k,
        "dataset": dataset,
        "split": split,
        "n": n,
        "pass_at_1": first,
        "pass_at_n": first + 0.33,
        "n_candidates": 7.9375,
        "best_of_n": first + 0.21,
        "scorer_oracle_agreement": 0.87,
        "next_pass_at_1": first + 0.55 * 0.21,
        "recovered": 0.55,
    }


def metrics(rng: np.random.Generator) -> list[tuple[str, int, dict[str, float]]]:
    rows: list[tuple[str, int, dict[str, float]]] = []
    for step in range(150):
        loss = 0.35 + 2.5 * np.exp(-step / 18) + float(rng.normal(0, 0.02))
        rows.append(("rationale", step, {"loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0}))
    for k in (1, 2):
        for step in range(80):
            margin = (1.6 - 0.4 * k) * (1 - np.exp(-step / 30)) + float(rng.normal(0, 0.08)) * (step > 0)
            values = {
                "loss": float(np.log1p(np.exp(-margin))),
                "margin": margin,
                "reward_accuracy": min(1.0, 0.5 + 0.3 * margin),
                "chosen_reward": -0.25 * margin,
                "rejected_reward": -1.25 * margin,
                "learning_rate": 2e-4,
                "grad_norm": 0.7,
            }
            rows.append((f"iteration-{k}/dpo", step, {name: float(value) for name, value in values.items()}))
    return rows


def gallery_entries(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """True rationales, retellings with a word swapped, and one text that does not parse."""
    rng = random.Random(seed)
    entries = []
    for sample in world_samples("validation", count, seed, image_dir=path / "images"):
        see, think = sample.extra["see"], sample.extra["think"]
        swap = lambda text: text.replace("red", "blue").replace("large", "small").replace("circle", "star")  # noqa: E731
        texts = [
            format_response(see, think, sample.answer, "tagged"),
            format_response(
                [swap(s) + ("" if s != swap(s) else " There is a pink star.") for s in see],
                think,
                "7",
                "tagged",
            ),
            format_response(see[:1], think, sample.answer, "plain"),
            "<see> There is a <script>alert(1)</script>",
        ]
        candidates = []
        for text in texts:
            parsed = parse_response(text)
            verdict = verify_sample(sample, parsed)
            assert verdict is not None
            score = 0.9 if verdict.aligned else rng.uniform(0.05, 0.6)
            candidates.append(
                {
                    "text": text,
                    "score": score,
                    "answer": parsed.answer,
                    "case": verdict.case,
                    "claims": list(verdict.claims),
                }
            )
        entries.append(
            {
                "image": f"images/{sample.images[0]}",
                "question": sample.question,
                "gold": sample.answer,
                "sample_id": sample.id,
                "candidates": candidates,
                "chosen": 0,
                "rejected": 1,
                "confidence": rng.uniform(0.4, 1.0),
            }
        )
    return entries
