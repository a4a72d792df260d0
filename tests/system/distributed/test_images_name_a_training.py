"""Of the ranks of a training one alone reads the images by which its checkpoints know it; the others wait for it."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from helpers.rank_processes import SharedClock, run_ranks, values_of
from helpers.small_model import SmallModel, image_embedding
from PIL import Image

from srcfast import distributed
from srcfast.config.settings import TrainingConfig
from srcfast.data.rationale_pairs import RationalePair, build_raps
from srcfast.data.records import Sample
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.items import TrainingItem


def raps_with_images(folder: Path) -> list[RationalePair]:
    """Six with three images, `0.png` to `2.png`, which are there already."""
    samples = [
        Sample(str(number), (f"{number % 3}.png",), "What colour?", "red", None, (f"Fact {number}",), {}, folder)
        for number in range(6)
    ]
    return build_raps(samples)[0]


def draw_images(folder: Path) -> None:
    for number in range(3):
        Image.new("RGB", (5, 4), (40 * number, 0, 0)).save(folder / f"{number}.png")


def fine_tune(folder: Path, checkpoints: TrainingCheckpoints | None, on_items: Any = None) -> None:
    def features(keys: list[str]) -> dict:
        return {key: image_embedding(key) for key in keys}

    settings = TrainingConfig(
        micro_batch_size=3,
        learning_rate=0.005,
        gradient_accumulation_steps=1,
        token_budget=8192,
        activation_checkpointing=0,
    )
    raps = raps_with_images(folder)
    fine_tune_rationale(SmallModel(), raps, settings, features=features, on_items=on_items, checkpoints=checkpoints)


def tell_images_read_to_name_a_training(folder: Path) -> list[list[str]]:
    """Without checkpoints, then with them; each takes long to read."""
    read: list[str] = []
    clock = SharedClock()
    file_digest = hashlib.file_digest

    def digest_and_tell(file: Any, name: str) -> Any:
        if str(file.name).endswith(".png"):
            read.append(Path(file.name).name)
            clock.spend(25)
        return file_digest(file, name)

    hashlib.file_digest = digest_and_tell  # this process ends with the test
    distributed.end_startup_timeout()
    fine_tune(folder, None)
    without = list(read)
    fine_tune(folder, TrainingCheckpoints(folder / "checkpoint", {}, steps=1))
    return [without, read[len(without) :]]


def test_images_are_read_to_name_a_training_once_and_on_rank_0_alone_and_only_for_checkpoints(tmp_path: Path) -> None:
    draw_images(tmp_path)
    # The other rank waits longer than it would for a rank that gives no sign of life.
    found = run_ranks(2, tell_images_read_to_name_a_training, tmp_path, timedelta(seconds=60))
    assert values_of(found) == [[[], ["0.png", "1.png", "2.png"]], [[], []]]


def lose_an_image_before_a_training_begins(folder: Path) -> None:
    def lose(items: list[TrainingItem]) -> None:
        distributed.barrier()  # all have read their prompts' images
        if distributed.is_rank_zero():
            (folder / "1.png").unlink()

    fine_tune(folder, TrainingCheckpoints(folder / "checkpoint", {}, steps=1), lose)


def test_an_image_lost_before_a_training_begins_ends_it_on_all_ranks_by_its_name(tmp_path: Path) -> None:
    draw_images(tmp_path)
    for rank, one in enumerate(run_ranks(2, lose_an_image_before_a_training_begins, tmp_path)):
        assert f"{tmp_path / '1.png'}" in one["error"] and "expected a readable file" in one["error"]
        assert ("rank 0 has failed" in one["error"]) == (rank == 1)
