"""Train a base of the study: an LVLM that sees all data families, and reasons over text alone.

    python -m srcfast.recipes.families_base --output DIR --size 2m

As the embedded base (`pretrain_base.py`): the tower learns dense labels, then decoder and projector learn captions and short
answers about images, and tagged reasoning over facts given as text, last the same with mostly reasoning. No training data has
rationales about images. The small base's decoder starts from the embedded base's. With `--start`, the stages of language continue
from an earlier base, whose tower stays as it is. A run that was stopped continues by the same command.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from srcfast.data.jsonl import parse_object, replacing, write_json
from srcfast.models import LVLM, load_lvlm
from srcfast.models.lvlm import save_lvlm
from srcfast.recipes.base_checkpoint import new_lvlm, take_decoder, train_tokenizer
from srcfast.recipes.families import (
    CLASSES,
    IMAGE_SIZE,
    OF_IMAGE,
    PATCH_SIZE,
    Picture,
    by_images,
    corpus,
    draw_trees,
    enlarged,
    label,
    read_family,
)
from srcfast.recipes.language import Stage, Writer, short_answer_accuracy, text_accuracy, train_language
from srcfast.recipes.unfinished import Unfinished, check_recipe
from srcfast.recipes.vision_tower import DenseHeads, Labelled, normalise, train_on_labels
from srcfast.stages.prompts import image_keys, image_loader

Log = Callable[[str], None]
IMAGES_PER_FILE = 1024  # of features
HAVE_NONE = ("shape", "color", "size", "digit", "bar")  # attributes of patches whose class 0 is that there is none


def _samples() -> dict[str, int]:
    return {"world": 36_000, "clips": 12_000, "digits": 24_000, "charts": 24_000, "easy_vqa": 16_000}


def _weights() -> dict[str, float]:
    return {"world": 0.25, "clips": 0.2, "digits": 0.25, "charts": 0.25, "easy_vqa": 0.05}


@dataclass(frozen=True)
class Recipe:
    """All settings that determine a base, including the seed."""

    seed: int = 0
    vocabulary_size: int = 1000
    hidden_size: int = 128
    num_layers: int = 5
    decoder: Literal["random", "embedded"] = "random"  # what its weights start from
    vision_size: int = 128
    vision_layers: int = 4
    samples: dict[str, int] = field(default_factory=_samples)  # questions of each family
    weights: dict[str, float] = field(default_factory=_weights)  # shares of the families in the language stages
    tower_epochs: int = 8
    tower_batch_size: int = 64
    tower_learning_rate: float = 1.5e-3
    language: Stage = Stage(1_500, 100, 14, 8, 3, 1.5e-3)
    reasoning: Stage = Stage(250, 50, 6, 12, 4, 1e-3)
    weight_decay: float = 0.05
    validation_samples: int = 300  # of each family


RECIPES = {
    # After 1,800 and 600 steps from random weights, a fifth of the world's questions were reasoned out over facts as text.
    "2m": Recipe(decoder="embedded"),
    "25m": Recipe(
        hidden_size=384,
        num_layers=10,
        vision_size=256,
        vision_layers=6,
        tower_epochs=4,
        tower_learning_rate=7e-4,
        language=Stage(2_000, 200, 16, 6, 3, 8e-4),
        reasoning=Stage(600, 60, 6, 12, 4, 6e-4),
    ),
}


def main(
    output: Annotated[Path, typer.Option(help="directory for the checkpoint")],
    size: Annotated[Literal["2m", "25m"], typer.Option(help="of the base, in parameters")] = "2m",
    start: Annotated[
        Path | None, typer.Option(help="an earlier base of this size, to continue from; default: train a tower")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="of the language stage; default: the recipe's")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train a base, and write it with TRAINING.json, the record of its training.

    `output`/work holds pictures, the checkpoints of the stages, features and trainings in progress. What is there is not made
    again.
    """
    torch.set_num_threads(threads)
    recipe = RECIPES[size]
    if steps is not None:
        recipe = replace(recipe, language=replace(recipe.language, steps=steps))
    train_base(output, recipe, start)


def train_base(output: Path, recipe: Recipe, start: Path | None = None, minutes: float = 5.0) -> None:
    """Train the base of a recipe into `output`.

    Args:
        output: directory for the checkpoint; `work` below it holds what a stopped run continues from.
        recipe: of the base.
        start: directory of an earlier base, from which the stages of language start; None: a tower is trained.
        minutes: between two saves of a training.

    Raises:
        SrcfastError: the directory holds the work of another recipe.
    """
    started = time.monotonic()
    work = output / "work"
    settings = asdict(recipe)
    if start is not None:
        settings["start"] = sha256((start / "model.safetensors").read_bytes()).hexdigest()
    check_recipe(work, settings)

    def log(line: str) -> None:
        print(f"{time.monotonic() - started:.0f} s  {line}", file=sys.stderr, flush=True)

    pictures = draw_pictures(recipe.samples, recipe.seed, work, log)
    if start is None and not (work / "tower" / "TRAINING.json").exists():
        train_tower(work, recipe, pictures, minutes, log)
    if not (work / "language" / "TRAINING.json").exists():
        train_stage(work, start or work / "tower", work / "language", recipe, "language", pictures, minutes, log)
    train_stage(work, work / "language", output, recipe, "reasoning", pictures, minutes, log)


def draw_pictures(samples: Mapping[str, int], seed: int, work: Path, log: Log) -> dict[str, list[Picture]]:
    """Draw the pictures of so many samples of each family; their images are files below `work`."""
    pictures = {}
    for name, count in samples.items():
        pictures[name] = by_images(read_family(name, count, seed, work / "pictures"))
        log(f"{len(pictures[name])} pictures of {name}")
    return pictures


def train_tower(work: Path, recipe: Recipe, pictures: dict[str, list[Picture]], minutes: float, log: Log) -> None:
    """Write a new checkpoint, with random weights except for a trained vision tower."""
    output = work / "tower"
    samples = [sample for of_family in pictures.values() for picture in of_family for sample in picture]
    rng = random.Random(f"corpus/{recipe.seed}")
    new_lvlm(
        output,
        train_tokenizer(
            corpus(rng.sample(samples, min(6000, len(samples))), rng), recipe.vocabulary_size, single_digits=True
        ),
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        vision_size=recipe.vision_size,
        vision_layers=recipe.vision_layers,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        seed=recipe.seed,
    )
    model = load_lvlm(output)
    assert isinstance(model, LVLM)
    model.requires_grad_(True)
    torch.manual_seed(recipe.seed)
    heads = DenseHeads(recipe.vision_size, list(CLASSES.values()), list(OF_IMAGE.values()))
    started = time.monotonic()
    unfinished = Unfinished(work / "tower.safetensors", minutes)
    train_on_labels(
        model.vision.model.vision_tower,
        heads,
        label([picture for of_family in pictures.values() for picture in of_family]),
        epochs=recipe.tower_epochs,
        batch_size=recipe.tower_batch_size,
        learning_rate=recipe.tower_learning_rate,
        seed=recipe.seed,
        on_step=lambda step, total, loss: log(f"tower {step}/{total} loss {loss:.3f}") if step % 50 == 0 else None,
        unfinished=unfinished,
    )
    if recipe.decoder == "embedded":
        embedded = load_lvlm("embedded")
        assert isinstance(embedded, LVLM)
        take_decoder(model, embedded)
    save_lvlm(model, output)
    accuracy = {
        name: dense_accuracy(
            model,
            heads,
            label(
                by_images(
                    read_family(name, recipe.validation_samples, recipe.seed + 1, work / "pictures", split="validation")
                )
            ),
        )
        for name in recipe.samples
    }
    log(f"tower {json.dumps(accuracy)}")
    write_json(output / "TRAINING.json", {"tower_accuracy": accuracy, "seconds": time.monotonic() - started})
    unfinished.file.unlink(missing_ok=True)


@torch.no_grad()
def dense_accuracy(model: LVLM, heads: DenseHeads, labelled: Labelled) -> dict[str, float]:
    """Measure the share of right labels: of patches on which there is something, and of images."""
    patches, images = [], []
    for indices in np.array_split(np.arange(len(labelled.images)), -(-len(labelled.images) // 64)):
        by_patch, by_image = heads(tower_features(model, labelled.pixels(indices)))
        patches.append(torch.stack([logits.argmax(-1) for logits in by_patch], dim=-1))
        images.append(torch.stack([logits.argmax(-1) for logits in by_image], dim=-1))
    accuracy = {}
    for names, labels, guesses in (
        (CLASSES, labelled.patches, torch.cat(patches).numpy()),
        (OF_IMAGE, labelled.images, torch.cat(images).numpy()),
    ):
        for column, name in enumerate(names):
            counted = labels[..., column] >= (1 if name in HAVE_NONE else 0)
            if counted.any():
                accuracy[name] = float((guesses[..., column] == labels[..., column])[counted].mean())
    return accuracy


@torch.no_grad()
def tower_features(model: LVLM, pixels: np.ndarray) -> Tensor:
    """Return the tower's features [images, 81, hidden] of pixels [images, 144, 144, 3] uint8."""
    return model.vision.model.vision_tower(normalise(pixels)).last_hidden_state[:, 1:]


class TowerFeatures:
    """The tower's features of pictures' images, in float16, in files of 1,024 images that are computed once."""

    def __init__(self, model: LVLM, pictures: Sequence[Picture], directory: Path) -> None:
        firsts = [picture[0] for picture in pictures]
        load = image_loader(firsts)
        keys = [key for sample in firsts for key in image_keys(sample)]
        self.rows = {key: row for row, key in enumerate(keys)}
        self.files: list[np.ndarray] = []
        for start in range(0, len(keys), IMAGES_PER_FILE):
            file = directory / f"{start // IMAGES_PER_FILE:04d}.npy"
            if not file.exists():
                chunk = keys[start : start + IMAGES_PER_FILE]
                batches = [chunk[at : at + 64] for at in range(0, len(chunk), 64)]
                stacks = (np.stack([enlarged(np.asarray(load(key))) for key in batch]) for batch in batches)
                features = torch.cat([tower_features(model, pixels).half() for pixels in stacks])
                directory.mkdir(parents=True, exist_ok=True)
                with replacing(file) as opened:
                    np.save(opened, features.numpy(), allow_pickle=False)
            self.files.append(np.load(file, mmap_mode="r", allow_pickle=False))

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """Return the features of images [images, 81, hidden]."""
        rows = [divmod(self.rows[key], IMAGES_PER_FILE) for key in keys]
        return torch.from_numpy(np.stack([self.files[file][row] for file, row in rows]))


def train_stage(
    work: Path,
    start: Path,
    output: Path,
    recipe: Recipe,
    name: Literal["language", "reasoning"],
    pictures: dict[str, list[Picture]],
    minutes: float,
    log: Log,
) -> None:
    """Run the language stage `name` from the checkpoint `start`, write the result to `output`, and measure it."""
    stage = recipe.language if name == "language" else recipe.reasoning
    model = load_lvlm(start)
    assert isinstance(model, LVLM)
    writer = Writer(model.tokenizer, model.vision.config.image_seq_length)
    all_pictures = [picture for of_family in pictures.values() for picture in of_family]
    features = TowerFeatures(model, all_pictures, work / "features")
    log(f"{name}: features of {len(features.rows)} images")
    model.requires_grad_(True)
    model.vision.model.vision_tower.requires_grad_(False)
    unfinished = Unfinished(work / f"{name}.safetensors", minutes)
    started = time.monotonic()
    train_language(
        model,
        stage,
        lambda step: draw_trees(writer, pictures, recipe.weights, stage, f"{name}/{recipe.seed}/{step}"),
        features,
        lambda line: log(f"{name} {line}"),
        weight_decay=recipe.weight_decay,
        unfinished=unfinished,
    )
    save_lvlm(model, output, dtype=torch.bfloat16)
    record = parse_object((start / "TRAINING.json").read_bytes())
    # A record of an earlier base stands beside this one; that of an earlier stage of this base is continued.
    if name == "language" and "recipe" in record:
        record = {"tower_accuracy": record["tower_accuracy"], "seconds": 0.0, "start": record}
    record |= measured(output, writer, recipe.samples, recipe.validation_samples, recipe.seed + 1, work / "pictures")
    options = "--output DIR --size SIZE" + (" --start BASE" if "start" in record else "")
    record |= {
        "command": f"python -m srcfast.recipes.families_base {options}",
        "recipe": asdict(recipe),
        "seconds": record["seconds"] + time.monotonic() - started,  # of the last start of each stage
    }
    write_json(output / "TRAINING.json", record)
    unfinished.file.unlink(missing_ok=True)
    log(json.dumps({key: record[key] for key in ("short_answer_accuracy", "text_accuracy")}, indent=2))


def measured(
    checkpoint: Path, writer: Writer, families: Iterable[str], count: int, seed: int, images: Path
) -> dict[str, Any]:
    """Measure a base on so many samples of each family's validation split; images are drawn into a directory."""
    model = load_lvlm(checkpoint)
    assert isinstance(model, LVLM)
    held_out = {name: read_family(name, count, seed, images, split="validation") for name in families}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "short_answer_accuracy": {name: short_answer_accuracy(model, samples) for name, samples in held_out.items()},
        "text_accuracy": {name: text_accuracy(model, writer, samples, 176) for name, samples in held_out.items()},
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    typer.run(main)
