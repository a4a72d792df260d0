"""Train the embedded R-Scorer on the world's split "scorer" and easy-VQA's training questions, or one of the study's.

    python -m srcfast.recipes.train_scorer --output srcfast/world/assets/scorer
    python -m srcfast.recipes.train_scorer --output DIR --start BASE [--writer BASE]

Training starts from the embedded base's decoder, which has learned to reason over facts given as text. The data are true
rationales, their corruptions, and candidates that tuned bases generate for these samples, since models make other faults than
the corruptions have; the oracle decides what is a fault. The R-Scorer first learns to check single claims, answers and
candidates, then to compare candidates (see `scorer_lessons`), and last to compare the bases' candidates alone. Some bases are
tuned on few rationales, for more diverse faults. With `--qualities` the reference of each tree of the last two stages has one of
the qualities, which the prompt states, and held-out candidates give each quality a temperature. With `--start` training starts
from the decoder of another base, and samples are those of all data families; `--writer` names the base that is tuned to write
candidates, so that R-Scorers of several sizes have the same ones.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from srcfast.config.settings import CandidatesConfig, LoRAConfig, ScorerTrainingConfig, TrainingConfig
from srcfast.data.corruptions import Parts
from srcfast.data.jsonl import read_jsonl, write_json, write_jsonl
from srcfast.data.rationale_format import ParsedResponse, parse_response
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import ReferenceQuality, Sample
from srcfast.models import LVLM, ImageFeatures, load_lvlm
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.scorer import Scorer, load_scorer
from srcfast.models.text_model import save_text_model
from srcfast.models.verdict_temperature import CALIBRATION
from srcfast.recipes.base_checkpoint import decoder_as_text_model
from srcfast.recipes.families import read_family
from srcfast.recipes.scorer_lessons import KINDS, checking_items, comparing_items, lesson_loss, lesson_weight
from srcfast.recipes.unfinished import check_recipe
from srcfast.run.progress import track
from srcfast.stages.candidates import generate_candidates
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.stages.scorer_calibration import calibrate_confidence
from srcfast.stages.scorer_training import (
    ParsedRationale,
    ScorerExample,
    Variant,
    draw_quality,
    evaluate_scorer,
    in_each_quality,
    scorer_example,
    scorer_examples,
    with_quality,
)
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train
from srcfast.world.easy_vqa import read_easy_vqa
from srcfast.world.samples import world_samples
from srcfast.world.verification import verify_sample

Variants = dict[str, list[Variant]]  # by sample id
TOKEN_BUDGET = 32_768  # of a forward pass


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the embedded R-Scorer, except for the embedded base that it starts from."""

    seed: int = 0
    world_samples: int = 4_400
    easy_vqa_samples: int = 1_200
    held_out_samples: int = 300  # from the world's validation split; from easy-VQA every tenth training image
    tuned: tuple[tuple[int, int], ...] = ((1_000, 2), (100, 8), (50, 12))  # samples and epochs of each tuned base
    searched_samples: int = 3_000  # samples for which each tuned base generates candidates
    tuning_learning_rate: float = 2e-3
    num_candidates: int = 5
    corrupted: int = 3
    drills: int = 5
    claims_per_drill: int = 4
    checked: int = 6  # candidates of a tree in the stage checking
    compared: int = 3  # candidates of a tree in the stages comparing and refining
    learning_rate: float = 4e-4  # at 1.5e-3 the decoder forgets to look claims up in the facts
    checking_epochs: int = 1
    comparing_epochs: int = 2
    refining_draws: int = 2  # draws of `compared` candidates from each tuned base, in the stage refining
    trees_per_step: int = 8
    max_new_tokens: int = 112  # of a candidate
    families: dict[str, int] = field(
        default_factory=dict
    )  # samples of each, in place of world_samples and easy_vqa_samples
    qualities: tuple[ReferenceQuality, ...] = ("complete",)  # of references, which the prompt states

    @classmethod
    def of_families(cls) -> Recipe:
        """Return the recipe of the study's R-Scorers."""
        families = {"world": 1_800, "clips": 1_000, "digits": 1_000, "charts": 1_000, "easy_vqa": 600}
        return cls(families=families, held_out_samples=150, max_new_tokens=176, comparing_epochs=1, refining_draws=1)


def main(
    output: Annotated[Path, typer.Option(help="directory for the checkpoint")],
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    qualities: Annotated[
        str, typer.Option(help="of references: complete, noisy, partial, answer, by commas")
    ] = "complete",
    start: Annotated[
        str, typer.Option(help="directory of the base whose decoder the R-Scorer starts from")
    ] = "embedded",
    writer: Annotated[
        str | None, typer.Option(help="directory of the base that writes candidates; default: start")
    ] = None,
) -> None:
    """Train an R-Scorer, and write it with TRAINING.json, the record of its training.

    Files that exist in `output` are not made again: the candidates, and the model after each stage. A stage that was stopped
    continues.
    """
    torch.set_num_threads(threads)
    recipe = replace(Recipe() if start == "embedded" else Recipe.of_families(), qualities=parse_qualities(qualities))
    train_scorer_of(recipe, output, start, writer or start)


def train_scorer_of(recipe: Recipe, output: Path, start: str, writer: str) -> None:
    """Train an R-Scorer from the decoder of the base `start`, on candidates that the base `writer` writes once tuned.

    Raises:
        SrcfastError: the directory holds the work of another recipe.
    """
    check_recipe(output, {"recipe": asdict(recipe), "start": str(start)})
    with tempfile.TemporaryDirectory() as images:
        samples, held_out = draw_samples(recipe, Path(images))
        by_id = {sample.id: sample for sample in (*samples, *held_out)}
        variants_by_base = [
            verified_variants(by_id, tuned_candidates(samples, held_out, recipe, number, output, writer))
            for number in range(len(recipe.tuned))
        ]
    best_tuned = variants_by_base[0]
    rng = random.Random(f"examples/{recipe.seed}")
    examples = scorer_examples(raps_of(samples), rng, None, variants=recipe.corrupted, is_faulty=is_faulty)

    def stated(example: ScorerExample, key: str) -> ScorerExample:
        quality = draw_quality(recipe.qualities, f"{recipe.seed}/{key}/{example.key}")
        return with_quality(example, by_id[example.key], quality, recipe.seed)

    def mixed(candidates: int, draw: random.Random) -> list[ScorerExample]:
        return [with_generated(example, by_id[example.key], best_tuned, candidates, draw) for example in examples]

    def to_check(scorer: Scorer) -> list[TrainingItem]:
        # Of complete references: what a worse one leaves out would teach not to look claims up.
        return checking_items(scorer, by_id, mixed(recipe.checked, rng), rng, recipe.drills, recipe.claims_per_drill)

    def to_compare(scorer: Scorer) -> list[TrainingItem]:
        chosen = mixed(recipe.compared, random.Random(f"comparing/{recipe.seed}"))
        return comparing_items(scorer, by_id, [stated(example, f"{recipe.compared} candidates") for example in chosen])

    def to_refine(scorer: Scorer) -> list[TrainingItem]:
        draw = random.Random(f"refining/{recipe.seed}")
        generated = [
            stated(
                with_generated(scorer_example(sample, ()), sample, variants, recipe.compared, draw),
                f"refining {number}",
            )
            for variants in variants_by_base
            for number in range(recipe.refining_draws)
            for sample in samples
            if len(variants[sample.id]) > 1
        ]
        return comparing_items(scorer, by_id, generated)

    base = load_lvlm(start)
    assert isinstance(base, LVLM)
    decoder_as_text_model(base, output / "decoder")
    stages = (
        ("decoder", "checking", to_check, recipe.checking_epochs),
        ("checking", "comparing", to_compare, recipe.comparing_epochs),
        ("comparing", "refining", to_refine, 1),
    )
    for begin, end, items_for, epochs in stages:
        if not (output / end / "config.json").exists():
            scorer = load_scorer(output / begin)
            checkpoints = TrainingCheckpoints(output / "checkpoint" / end, {"recipe": asdict(recipe)})
            train_items(scorer, items_for(scorer), recipe, epochs, checkpoints)
            save_text_model(scorer.text_model, output / end)
    shipped = load_scorer(output / "refining", dtype=torch.bfloat16)
    save_text_model(shipped.text_model, output)
    if len(recipe.qualities) > 1:
        of_candidates = candidate_examples(held_out, best_tuned)
        by_quality = in_each_quality(of_candidates, by_id, recipe.qualities, recipe.seed)
        write_json(output / CALIBRATION, calibrate_confidence(load_scorer(output), by_quality, TOKEN_BUDGET))

    record = {
        "command": "python -m srcfast.recipes.train_scorer --output DIR" + (" --start BASE" if recipe.families else ""),
        "recipe": asdict(recipe),
        "held_out": held_out_scores(load_scorer(output), held_out, variants_by_base, recipe),
        "torch": torch.__version__,
    }
    write_json(output / "TRAINING.json", record)
    print(json.dumps(record["held_out"], indent=2), file=sys.stderr)


def parse_qualities(text: str) -> tuple[ReferenceQuality, ...]:
    """Parse names of qualities that commas separate. Raises BadParameter, which ends the command."""
    try:
        return ScorerTrainingConfig.model_validate({"qualities": text.replace(" ", "").split(",")}).qualities
    except ValueError:
        raise typer.BadParameter(f"expected some of complete, noisy, partial, answer, found {text!r}") from None


def draw_samples(recipe: Recipe, images: Path) -> tuple[list[Sample], list[Sample]]:
    """Draw the samples to train on, in random order, and the held-out samples, all with true rationales."""
    if recipe.families:
        samples = [
            s for name, n in recipe.families.items() for s in read_family(name, n, recipe.seed, images, "scorer")
        ]
        held_out = [
            sample
            for name in recipe.families
            for sample in read_family(name, recipe.held_out_samples, recipe.seed + 1, images, "validation")
        ]
        return random.Random(f"scorer/{recipe.seed}").sample(samples, len(samples)), held_out
    samples = world_samples("scorer", recipe.world_samples, recipe.seed, image_dir=images)
    held_out = world_samples("validation", recipe.held_out_samples, recipe.seed + 1, image_dir=images)
    for sample in read_easy_vqa("train", recipe.easy_vqa_samples, recipe.seed):
        if sample.rationale:
            (held_out if int(Path(sample.images[0]).stem) % 10 == 0 else samples).append(sample)
    random.Random(f"scorer/{recipe.seed}").shuffle(samples)
    return samples, held_out


def tuned_candidates(
    samples: Sequence[Sample], held_out: Sequence[Sample], recipe: Recipe, number: int, output: Path, base: str
) -> dict[str, list[str]]:
    """Tune a base, and generate candidates for samples that it was not tuned on. Returns their texts by sample id.

    Args:
        number: index into `recipe.tuned`.
        output: directory with the file of candidates; an existing file is read instead.
        base: directory of the base, or "embedded".
    """
    tuned_samples, epochs = recipe.tuned[number]
    seed = recipe.seed + number
    file = output / f"candidates-{tuned_samples}.jsonl"
    if not file.exists():
        searched = [*samples[: recipe.searched_samples], *held_out]
        learned = samples[recipe.searched_samples :][:tuned_samples]
        model, features = tuned_base(base, learned, [*samples, *held_out], recipe, epochs, seed)
        with track("candidates", len(searched), "samples") as progress:
            generated = generate_candidates(
                model, searched, search_of(recipe), features=features, seed=seed, batch_size=64, progress=progress
            )
        write_jsonl(file, ({"sample_id": c.sample_id, "text": c.text} for of_sample in generated for c in of_sample))
    candidates = defaultdict(list)
    for _, row in read_jsonl(file):
        candidates[str(row["sample_id"])].append(str(row["text"]))
    return candidates


def tuned_base(
    base: str, learned: Sequence[Sample], pictured: Sequence[Sample], recipe: Recipe, epochs: int, seed: int
) -> tuple[VisionLanguageModel, ImageFeatures]:
    """Tune a new adapter of a base on samples' true rationales.

    Args:
        base: directory of the base, or "embedded".
        learned: samples to tune it on.
        pictured: all samples whose images the features can encode, `learned` among them.
        recipe: with the learning rate.
        epochs: how often it sees each sample.
        seed: of the adapter's start and the order of samples.

    Returns:
        The tuned base, and the features of its images.
    """
    raps, _ = build_raps(learned)
    model = load_lvlm(base, lora=LoRAConfig(r=16, alpha=32).seeded(seed))
    features = ImageFeatures(model, image_loader(pictured), 1 << 30)
    loop = TrainingConfig(
        epochs=epochs,
        micro_batch_size=8,
        gradient_accumulation_steps=1,
        token_budget=8192,
        learning_rate=recipe.tuning_learning_rate,
        activation_checkpointing=0,
    ).seeded(seed)
    fine_tune_rationale(model, raps, loop, features=features)
    return model, features


def search_of(recipe: Recipe) -> CandidatesConfig:
    """Return the settings of the search for candidates."""
    return CandidatesConfig(
        num_candidates=recipe.num_candidates,
        num_beams=4,
        proposals=2,
        top_p=1.0,
        max_sentences=12,
        max_sentence_tokens=24,
        max_new_tokens=recipe.max_new_tokens,
    )


def verified_variants(samples: Mapping[str, Sample], candidates: Mapping[str, Sequence[str]]) -> Variants:
    """Count the faults of candidates by the oracle: none or one.

    Faulty candidates are not ranked among themselves: preferring the better of two bad rationales would teach bad ones.
    """
    variants: Variants = defaultdict(list)
    for key, texts in candidates.items():
        for text in texts:
            verification = verify_sample(samples[key], response := parse_response(text))
            if verification is not None and response.answer is not None:
                variants[key].append(Variant(text, 0) if verification.aligned else Variant(text, 1, "own"))
    return variants


def raps_of(samples: Sequence[Sample]) -> list[ParsedRationale]:
    """Return the samples' true rationale-answer pairs."""
    return [(sample, sample.extra["see"], sample.extra["think"], sample.answer) for sample in samples]


def is_faulty(sample: Sample, parts: Parts) -> bool:
    """Return whether the oracle finds a fault in a corruption."""
    see, think, answer = parts
    verification = verify_sample(sample, ParsedResponse(tuple(see), tuple(think), answer))
    return verification is not None and not verification.aligned


def with_generated(
    example: ScorerExample, sample: Sample, generated: Variants, limit: int, rng: random.Random
) -> ScorerExample:
    """Add generated candidates to an example.

    Up to `limit` variants are used: a good and a bad candidate, then the example's, then other candidates.
    """
    shuffled = rng.sample(generated[example.key], len(generated[example.key]))
    good = next(([variant] for variant in shuffled if not variant.faults), [])
    bad = next(([variant] for variant in shuffled if variant.faults), [])
    distinct = {variant.text: variant for variant in (*good, *bad, *example.variants, *shuffled)}
    chosen = [replace(variant, faults=min(variant.faults, 1)) for variant in distinct.values()][:limit]
    return scorer_example(sample, rng.sample(chosen, len(chosen)))


def candidate_examples(samples: Sequence[Sample], variants: Variants) -> list[ScorerExample]:
    """Build the examples of samples with at least two candidates, of these alone."""
    return [scorer_example(sample, variants[sample.id]) for sample in samples if len(variants[sample.id]) > 1]


def train_items(
    scorer: Scorer,
    items: Sequence[TrainingItem],
    recipe: Recipe,
    epochs: int,
    checkpoints: TrainingCheckpoints | None = None,
) -> None:
    """Train the whole model on items; every 40 steps print loss and shares of right predictions to stderr."""
    started = time.monotonic()

    def log(metrics: dict[str, float]) -> None:
        if metrics["step"] % 40 == 0:
            counts = {name: metrics[name] for name in KINDS if metrics[name]}
            shares = {name: round(metrics[f"right_{name}"] / count, 3) for name, count in counts.items()}
            line = f"step {metrics['step']} loss {metrics['loss']:.4f} right {shares}"
            print(f"{line} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    # On CPUs with bf16 its products are three times as fast as fp32's. Autocast's cache would reuse stale copies of the weights.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        train(
            scorer.requires_grad_(True).text_model,
            items,
            objective=Objective(lesson_loss(scorer), lesson_weight),
            settings=TrainingConfig(
                epochs=epochs,
                learning_rate=recipe.learning_rate,
                micro_batch_size=recipe.trees_per_step,
                gradient_accumulation_steps=1,
                token_budget=TOKEN_BUDGET,
                warmup_ratio=0.05,
                weight_decay=0.02,
                activation_checkpointing=0,
            ).seeded(recipe.seed),
            on_step=log,
            checkpoints=checkpoints,
        )


def held_out_scores(
    scorer: Scorer, held_out: Sequence[Sample], variants_by_base: Sequence[Variants], recipe: Recipe
) -> dict[str, object]:
    """Evaluate the R-Scorer on held-out samples: on corruptions, and on the candidates of each tuned base."""
    rng = random.Random(f"held out/{recipe.seed}")
    by_id = {sample.id: sample for sample in held_out}
    groups: dict[str, list[ScorerExample]] = {}
    for name in dict.fromkeys(sample.extra["dataset"] for sample in held_out):
        subset = [sample for sample in held_out if sample.extra["dataset"] == name]
        groups[name] = scorer_examples(raps_of(subset), rng, None, is_faulty=is_faulty)
        for variants, (tuned_samples, _) in zip(variants_by_base, recipe.tuned, strict=True):
            groups[f"{name}, candidates of a base tuned on {tuned_samples}"] = candidate_examples(subset, variants)
    scores: dict[str, object] = {}
    for quality in recipe.qualities:
        for name, examples in groups.items():
            stated = [with_quality(example, by_id[example.key], quality, recipe.seed) for example in examples]
            scores[name if quality == "complete" else f"{name}; reference {quality}"] = evaluate_scorer(scorer, stated)
    return scores


if __name__ == "__main__":
    typer.run(main)
