"""Train the embedded LVLM from random weights: a tower that sees, a language model that reasons over text, short answers.

    python -m srcfast.recipes.pretrain_base --output srcfast/world/assets/base

The stages are those of real LVLMs: the vision tower learns dense labels (`vision_tower.py`). Then decoder and projector
learn, in one mixture, to caption and locate (perception), to answer questions about images *shortly* (visual instructions),
and to reason in tagged steps over facts given as *text*. The last stage has the same mixture with mostly reasoning.
The training data has no rationales about images: rationale fine-tuning and calibration have to combine the two.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from srcfast.data.forest import Forest
from srcfast.data.jsonl import write_json
from srcfast.data.records import Sample
from srcfast.models import LVLM, load_lvlm
from srcfast.models.lvlm import save_lvlm
from srcfast.recipes.base_checkpoint import new_lvlm, train_tokenizer
from srcfast.recipes.language import Drawn, Stage, Writer, answer_rows, text_accuracy, train_language
from srcfast.recipes.vision_tower import normalise, train_tower
from srcfast.world.questions import ask
from srcfast.world.rationales import describe, facts, perception_questions, true_rationale
from srcfast.world.render import render
from srcfast.world.scenes import Scene, sample_scenes


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the embedded base, including the seed."""

    seed: int = 0
    vocabulary_size: int = 640
    hidden_size: int = 128
    num_layers: int = 5
    vision_layers: int = 4
    tower_pictures: int = 40_000
    tower_epochs: int = 5
    tower_batch_size: int = 64
    tower_learning_rate: float = 1.5e-3
    scenes: int = 40_000
    language: Stage = Stage(2_200, 200, 24, 6, 3, 2e-3)
    reasoning: Stage = Stage(700, 70, 8, 14, 5, 1.5e-3)
    weight_decay: float = 0.05


def picture_tree(writer: Writer, scene: Scene, key: str, rng: random.Random) -> Drawn:
    """Draw a tree of an image: six perception questions, two short answers and, with probability 1/4, a caption."""
    pairs = [("Describe the image.", describe(scene))] if rng.random() < 0.25 else []
    pairs += perception_questions(scene, rng, 6)
    pairs += [(reword(q.text, rng), q.answer) for q in ask(scene, rng, n=2)]
    return writer.tree(writer.image_root(), pairs, (key,))


def text_tree(writer: Writer, scene: Scene, rng: random.Random, questions: int) -> Drawn:
    """Draw a tree of a scene's facts as text, with questions that tagged rationales answer."""
    asked = ask(scene, rng, n=questions)
    return writer.text_tree(facts(scene), [(reword(q.text, rng), *true_rationale(scene, q), q.answer) for q in asked])


def reword(question: str, rng: random.Random) -> str:
    """Reword half of the short existence questions as easy-VQA asks them."""
    if question.startswith("Is there a") and question.count(" ") <= 5 and rng.random() < 0.5:
        phrase = question.removeprefix("Is there ").removesuffix("?")
        return rng.choice(
            (f"Is there {phrase} in the image?", f"Does the image contain {phrase}?", f"Is {phrase} present?")
        )
    return question


def corpus(scenes: Sequence[Scene], rng: random.Random) -> Iterator[str]:
    """Yield the texts on which the tokenizer is trained."""
    yield "USER: ASSISTANT: Describe the image. Nothing. Question Facts Answer First Second Better Score first second tie"
    for scene in scenes:
        yield describe(scene)
        for question, answer in perception_questions(scene, rng, 3):
            yield f"{question} {answer}"
        for item in ask(scene, rng, n=6):
            see, think = true_rationale(scene, item)
            yield " ".join([reword(item.text, rng), *see, *think, item.answer])


def train_mixture(model: LVLM, writer: Writer, recipe: Recipe, name: str, log: Callable[[str], None]) -> None:
    """Train decoder and projector on the mixture of the stage `name`; the tower is frozen."""
    stage: Stage = getattr(recipe, name)
    rng = random.Random(f"{name}/{recipe.seed}")
    scenes = sample_scenes("base", recipe.scenes, recipe.seed + 1)
    pictures = stage.steps * stage.pictures_per_step
    passes = range(-(-pictures // len(scenes)))
    order = np.concatenate([np.random.default_rng((recipe.seed, p)).permutation(len(scenes)) for p in passes])
    order = order[:pictures]
    distinct = np.unique(order)  # indices of the scenes in use
    # [distinct, 36, 128] float16, before the projector
    features = _encode_all(model, [scenes[i] for i in distinct], rng)

    def draw(step: int) -> list[Drawn]:
        picked = order[step * stage.pictures_per_step : (step + 1) * stage.pictures_per_step]
        trees = [picture_tree(writer, scenes[i], str(i), rng) for i in picked]
        return trees + [
            text_tree(writer, scenes[rng.randrange(len(scenes))], rng, stage.questions_per_text)
            for _ in range(stage.texts_per_step)
        ]

    def features_of(keys: Sequence[str]) -> Tensor:
        return features[np.searchsorted(distinct, [int(key) for key in keys])]

    model.requires_grad_(True)
    model.vision.model.vision_tower.requires_grad_(False)
    train_language(
        model, stage, draw, features_of, lambda line: log(f"{name} {line}"), weight_decay=recipe.weight_decay
    )


@torch.no_grad()
def _encode_all(model: LVLM, scenes: Sequence[Scene], rng: random.Random) -> Tensor:
    """Return the tower's features [scenes, 36, 128], float16."""
    features = []
    for start in range(0, len(scenes), 256):
        pixels = np.stack([np.asarray(render(s, rng.randrange(2**31))) for s in scenes[start : start + 256]])
        features.append(model.vision.model.vision_tower(normalise(pixels)).last_hidden_state[:, 1:].half())
    return torch.cat(features)


@torch.no_grad()
def short_answer_accuracy(model: LVLM, writer: Writer, seed: int, split: str = "validation") -> dict[str, float]:
    """Measure the share of right short answers on 300 unseen scenes, by ability and overall, teacher-forced."""
    rng = random.Random(f"probe/{seed}")
    scenes = sample_scenes(split, 300, seed)
    right: dict[str, list[bool]] = {}
    for start in range(0, len(scenes), 50):
        batch = scenes[start : start + 50]
        features = model.encode_images([render(scene, rng.randrange(2**31)) for scene in batch])
        questions = [ask(scene, rng, n=6) for scene in batch]
        trees = [
            writer.tree(writer.image_root(), [(q.text, q.answer) for q in of_scene], (str(i),))
            for i, of_scene in enumerate(questions)
        ]
        forest = Forest.of([tree for tree, _ in trees])
        rows, targets = answer_rows(forest, [lengths for _, lengths in trees])
        hidden = model(forest, {str(i): feature for i, feature in enumerate(features)})
        hits = iter(((hidden[rows] @ model.decoder.head_weight.T).argmax(-1) == targets).tolist())
        for of_scene, (_, lengths) in zip(questions, trees, strict=True):
            for question, length in zip(of_scene, lengths, strict=True):
                right.setdefault(question.ability, []).append(all([next(hits) for _ in range(length)]))
    shares = {ability: float(np.mean(values)) for ability, values in sorted(right.items())}
    return shares | {"overall": float(np.mean([hit for values in right.values() for hit in values]))}


def text_probe(seed: int) -> list[Sample]:
    """Draw 600 questions over unseen scenes, to be given as text."""
    rng = random.Random(f"text probe/{seed}")
    return [
        Sample(
            id=f"{number}-{index}",
            images=(),
            question=question.text,
            answer=question.answer,
            facts=facts(scene),
            extra={"program": question.program, "scene": scene.to_json()},
            image_root=Path(),
        )
        for number, scene in enumerate(sample_scenes("validation", 100, seed))
        for index, question in enumerate(ask(scene, rng, n=6))
    ]


def main(
    output: Annotated[Path, typer.Option(help="directory for the checkpoint")],
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train the embedded base LVLM, and write it with TRAINING.json, the record of its training.

    `output`/tower and `output`/language have the checkpoints after these stages; a stage whose checkpoint exists is skipped.
    """
    torch.set_num_threads(threads)
    recipe = Recipe()
    started = time.monotonic()

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if not (output / "tower" / "TRAINING.json").exists():
        train_new_tower(output / "tower", recipe, log)
    if not (output / "language" / "TRAINING.json").exists():
        train_stage(output / "tower", output / "language", recipe, "language", log)
    train_stage(output / "language", output, recipe, "reasoning", log)
    log(f"{time.monotonic() - started:.0f} s")


def train_new_tower(output: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Write a new checkpoint, with random weights except for a trained vision tower."""
    texts = corpus(sample_scenes("base", 3000, recipe.seed), random.Random(f"corpus/{recipe.seed}"))
    new_lvlm(
        output,
        train_tokenizer(texts, recipe.vocabulary_size),
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        vision_layers=recipe.vision_layers,
        seed=recipe.seed,
    )
    model = load_lvlm(output)
    model.requires_grad_(True)
    accuracy = train_tower(
        model.vision.model.vision_tower,
        pictures=recipe.tower_pictures,
        epochs=recipe.tower_epochs,
        batch_size=recipe.tower_batch_size,
        learning_rate=recipe.tower_learning_rate,
        seed=recipe.seed,
        on_step=lambda step, total, loss: log(f"tower {step}/{total} loss {loss:.3f}") if step % 50 == 0 else None,
    )
    save_lvlm(model, output)
    write_json(output / "TRAINING.json", {"tower_accuracy": accuracy})


def train_stage(start: Path, output: Path, recipe: Recipe, name: str, log: Callable[[str], None]) -> None:
    """Run the language stage `name` from the checkpoint `start`, write the result to `output`, and measure it."""
    model = load_lvlm(start)
    writer = Writer(model.tokenizer, model.vision.config.image_seq_length)
    train_mixture(model, writer, recipe, name, log)
    save_lvlm(model, output, dtype=torch.bfloat16)
    trained = load_lvlm(output)
    record = json.loads((start / "TRAINING.json").read_text(encoding="utf-8")) | {
        "command": "python -m srcfast.recipes.pretrain_base --output DIR",
        "recipe": asdict(recipe),
        "short_answer_accuracy": {
            split: short_answer_accuracy(trained, writer, 1, split) for split in ("validation", "generalisation")
        },
        "text_accuracy": text_accuracy(trained, writer, text_probe(1)),
        "torch": torch.__version__,
    }
    write_json(output / "TRAINING.json", record)
    log(json.dumps({key: record[key] for key in ("short_answer_accuracy", "text_accuracy")}, indent=2))


if __name__ == "__main__":
    typer.run(main)
