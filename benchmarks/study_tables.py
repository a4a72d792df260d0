"""Write the study's result as text: two short tables for the README, and those of docs/results.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from srcfast.study.results import FIGURES, markdown, percent
from srcfast.study.settings import JUDGED
from srcfast_benchmarks.harness import RESULTS

STUDY = RESULTS / "study" / "summary.json"  # of `srcfast study benchmarks/study/main.yaml`
EXAMPLES = RESULTS / "study" / "examples.json"  # of `benchmarks/study_examples.py`
BLIND = RESULTS / "study" / "blind.json"  # of `benchmarks/blind_guess.py`
ARMS = {
    "direct_answer": "gold answers alone, all of the questions",
    "rationale": "260 rationales, no round",
    "dpo": "DPO alone, right over wrong answers",
    "gold_sft": "fine-tuning on the likeliest right candidate",
    "judged_sft": "fine-tuning on the candidate of the highest score, by confidence",
    "src": "the same with DPO, highest over lowest score",
    "src_improved": "fine-tuning on the best right candidate, by score and likelihood",
    "src_independent": "as src, candidates rated one by one",
    "src_answer_pairs": "as src, right over wrong answers",
    "src_random_pairs": "as src, random pairs",
    "src_unweighted": "as src, without confidence as weight",
    "true_rationales": "fine-tuning on true rationales of the same questions",
}
SHORT = ("direct_answer", "rationale", "dpo", "gold_sft", "judged_sft", "src", "src_improved", "true_rationales")
SHORT_DIFFERENCES = (
    "src_improved - rationale",
    "src_improved - gold_sft",
    "src_improved - judged_sft",
    "src - judged_sft",
    "src - src_independent",
)
CONTROLS = ("blank", "shuffled")


def readme_tables() -> str:
    """The README's two tables: right and aligned by arm, over all sets; differences of arms."""
    summary, blind = read()
    rows = [["arm", "what the base is trained on", "right, %", "aligned, %"]]
    rows.append(["blind", "nothing: the commonest answer by kind of question", percent(blind["accuracy"]), "0.0"])
    rows += [[arm, ARMS[arm], *figures(summary["arms"][arm])] for arm in SHORT]
    differences = [["difference, points", "right", "aligned"]]
    differences += [[name, *figures(summary["differences"][name], signed=True)] for name in SHORT_DIFFERENCES]
    return f"{markdown(rows)}\n\n{markdown(differences)}\n"


def results_tables() -> str:
    """The tables of docs/results.md: arms, arms by set, differences by set, controls, R-Scorers."""
    summary, blind = read()
    arms, differences = summary["arms"], summary["differences"]
    sets = list(arms["rationale"]["sets"])
    with_pictures, controls = ([name for name in sets if is_control(name) == wanted] for wanted in (False, True))
    parts = [
        "Over all sets with their own pictures, each counting alike; updates and seconds are of a seed, as if the arm ran alone:",
        markdown([["arm", "round", "right, %", "aligned, %", "updates", "seconds"], *arm_rows(arms)]),
        "Right / aligned by set, percent; the last row is a blind guess:",
        markdown(
            [["arm", *with_pictures], *by_set(arms, with_pictures), ["blind", *blind_cells(blind, with_pictures)]]
        ),
        "Differences in points, paired by seed and sample:",
        markdown(
            [["difference", "right", "aligned"], *([each, *figures(differences[each], True)] for each in differences)]
        ),
        "The same by set, aligned:",
        markdown(
            [
                ["difference", *with_pictures],
                *([each, *aligned(differences[each], with_pictures)] for each in differences),
            ]
        ),
        "Without their own pictures, right / aligned in percent:",
        markdown([["arm", *controls], *by_set(arms, controls)]),
    ]
    if summary["judges"]:
        parts += [
            "How often the R-Scorer prefers the aligned one of two candidates, by what its references have, percent of pairs:",
            judges(summary["judges"]),
        ]
    return "\n\n".join([*parts, *examples()]) + "\n"


def examples() -> list[str]:
    """Return a paragraph for each example: the picture, the question, and both responses."""
    parts = []
    for name, example in json.loads(EXAMPLES.read_text(encoding="utf-8")).items():
        if not isinstance(example, dict):
            continue
        before, after = (key for key in example if key in ARMS)
        counts = f"so are {example['gained']} of {example['samples']}, and the other way round {example['lost']}"
        parts.append(
            f"*{name}*, first seed, the first sample that `{after}` aligns and `{before}` does not ({counts}): "
            f'"{example["question"]}" Gold answer: {example["answer"]}.'
        )
        parts.append(f"![{name}](images/{example['picture']})")
        parts.append("\n".join(f"- `{arm}`: `{example[arm]}`" for arm in (before, after)))
    return parts


def read() -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the study's summary and the blind guess."""
    summary, blind = (json.loads(file.read_text(encoding="utf-8")) for file in (STUDY, BLIND))
    return summary, blind


def is_control(name: str) -> bool:
    """Whether an evaluation set of the study is without its own pictures."""
    return any(f"-{control}-" in name for control in CONTROLS)


def figures(of: Mapping[str, Any], signed: bool = False) -> list[str]:
    """Accuracy and alignment, each with its interval."""
    return [percent(of[figure], signed) for figure in FIGURES]


def arm_rows(arms: Mapping[str, Any]) -> list[list[str]]:
    """A row an arm: what it is, its figures, its cost."""
    return [
        [name, ARMS[name], *figures(arm), str(arm["updates"]), f"{arm['seconds']:.0f}"] for name, arm in arms.items()
    ]


def by_set(arms: Mapping[str, Any], sets: Sequence[str]) -> list[list[str]]:
    """A row an arm: right / aligned on each set, without intervals."""
    rows = []
    for name, arm in arms.items():
        means = [[100 * arm["sets"][each][figure][0] for figure in FIGURES] for each in sets]
        rows.append([name, *(f"{right:.1f} / {of_aligned:.1f}" for right, of_aligned in means)])
    return rows


def blind_cells(blind: Mapping[str, Any], sets: Sequence[str]) -> list[str]:
    """The blind guess's accuracy on each set."""
    return [f"{100 * blind['sets'][each]['accuracy'][0]:.1f}" for each in sets]


def aligned(of: Mapping[str, Any], sets: Sequence[str]) -> list[str]:
    """A difference's alignment on each set, with its interval."""
    return [percent(of["sets"][each]["alignment"], True) for each in sets]


def judges(of: Mapping[str, Any]) -> str:
    """A row an R-Scorer and quality: pairwise and independent."""
    rows = [["R-Scorer", "reference", *JUDGED]]
    for size, qualities in of.items():
        rows += [[size, quality, *(percent(modes[mode]) for mode in JUDGED)] for quality, modes in qualities.items()]
    return markdown(rows)
