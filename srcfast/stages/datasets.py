"""Read the samples that the settings name (training sets, evaluation sets), and draw those of a round."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from srcfast.config.datasets import DRAWN, DatasetConfig
from srcfast.config.settings import Config
from srcfast.config.yaml import read_yaml
from srcfast.data.answer_rules import Rule, rule_of
from srcfast.data.corruptions import Vocabulary
from srcfast.data.image_controls import blank_images, shuffled_images
from srcfast.data.readers import check_rejected, read_samples
from srcfast.data.records import Sample, of_record
from srcfast.errors import ConfigError, InputError
from srcfast.hub.names import local_data
from srcfast.stages.free_answers import judge_endpoint
from srcfast.world.charts import CHARTS
from srcfast.world.degraded_references import degrade_reference
from srcfast.world.digits import DIGITS
from srcfast.world.easy_vqa import read_easy_vqa
from srcfast.world.number_samples import number_samples
from srcfast.world.samples import clip_samples, world_samples

# How the samples of the formats DRAWN are drawn, by split, number and seed.
_DRAW: dict[str, Callable[..., list[Sample]]] = {
    "world": world_samples,
    "clips": clip_samples,
    "digits": partial(number_samples, DIGITS),
    "charts": partial(number_samples, CHARTS),
}


@dataclass(frozen=True)
class EvaluationSet:
    """Samples that no training uses."""

    name: str
    split: str
    samples: list[Sample]
    rule: Rule = "exact"  # by which answers are right

    @property
    def label(self) -> str:
        """The name of the set's files and directories."""
        return f"{self.name}-{self.split}"


def read_dataset(dataset: DatasetConfig, image_dir: Path, rejected: list[dict[str, Any]]) -> list[Sample]:
    """Read a dataset's samples and append its bad records to `rejected`; images that are made are written to `image_dir`."""
    samples = _read_samples(dataset, image_dir, rejected)
    if dataset.rationales == "none":
        samples = [replace(sample, rationale=None, facts=()) for sample in samples]
    if dataset.images == "blank":
        return blank_images(samples, image_dir)
    return shuffled_images(samples, dataset.seed) if dataset.images == "shuffled" else samples


def _read_samples(dataset: DatasetConfig, image_dir: Path, rejected: list[dict[str, Any]]) -> list[Sample]:
    if dataset.format in DRAWN:
        return _DRAW[dataset.format](dataset.split, dataset.limit, dataset.seed, image_dir=image_dir)
    if dataset.format == "easy_vqa":
        return read_easy_vqa(dataset.split, dataset.limit or None, dataset.seed)
    samples = read_samples(
        list(map(local_data, dataset.paths)),
        format=dataset.format,
        image_root=[Path(local_data(root)) for root in dataset.image_roots] or None,
        rejected=rejected,
        check_images=dataset.check_images,
        follow_links=dataset.follow_links,
        duplicate_ids=dataset.duplicate_ids,
    )
    if 0 < dataset.limit < len(samples):
        samples = random.Random(f"{dataset.name}/{dataset.seed}").sample(samples, dataset.limit)
    return samples


def training_sets(config: Config, use: str) -> tuple[DatasetConfig, ...]:
    """Return the training sets that take part in `use` ("rationale" or "calibration"). Raises ConfigError if none does."""
    datasets = tuple(dataset for dataset in config.data.train if use in dataset.use)
    if not datasets:
        raise ConfigError(
            f"data.train: expected a dataset with use {use!r}, found no data. Fix: name one; a command takes --data FILE, too"
        )
    return datasets


def read_training_samples(
    datasets: Sequence[DatasetConfig], config: Config, image_dir: Path, rejected: list[dict[str, Any]], use: str
) -> list[Sample]:
    """Read the samples of training sets, as one set; append their bad records to `rejected`.

    For the use "calibration", in which they are judged, their references have the quality that the dataset sets.

    Raises:
        InputError: more bad samples than `max_rejected`, or no good one, or an id that two samples share.
    """
    bad: list[dict[str, Any]] = []
    samples: list[Sample] = []
    for dataset in datasets:
        of_dataset = read_dataset(dataset, image_dir, bad)
        samples += of_dataset if use == "rationale" else degraded_references(of_dataset, dataset, config)
    # A dataset of both uses is read twice: its bad records are listed once.
    listed = {(row["file"], row["line"]) for row in rejected}
    rejected += [row for row in bad if (row["file"], row["line"]) not in listed]
    check_rejected(bad, len(bad) + len(samples), config.max_rejected)
    if not samples:
        raise _no_samples(datasets[0], "data.train")
    check_unique_ids(samples)
    return samples


def read_evaluation_sets(
    datasets: Sequence[DatasetConfig], config: Config, image_dir: Path, rejected: list[dict[str, Any]]
) -> list[EvaluationSet]:
    """Read evaluation sets, each with its own count of bad records, which are appended to `rejected`.

    Their references, which the headroom's judging reads, have the quality that the dataset sets.

    Raises:
        InputError: one is empty, or has more bad samples than `max_rejected`.
        ConfigError: one needs a judge, and the settings name none.
    """
    evaluation_sets = []
    for dataset in datasets:
        bad: list[dict[str, Any]] = []
        samples = read_dataset(dataset, image_dir, bad)
        rejected += bad
        check_rejected(bad, len(bad) + len(samples), config.max_rejected)
        if not samples:
            raise _no_samples(dataset, "data.evaluation")
        samples = degraded_references(samples, dataset, config)
        rule = rule_of(samples) if dataset.rule == "auto" else dataset.rule
        if rule == "judge":
            judge_endpoint(config)  # before a model answers
        evaluation_sets.append(EvaluationSet(dataset.name, dataset.split, samples, rule))
    return evaluation_sets


def degraded_references(samples: Sequence[Sample], dataset: DatasetConfig, config: Config) -> list[Sample]:
    """Return the samples with references of the dataset's quality. Raises InputError where one can't be made."""
    if dataset.reference == "complete":
        return list(samples)
    words = read_vocabulary(config.scorer_training.vocabulary)
    degraded = []
    for sample in samples:
        try:
            degraded.append(degrade_reference(sample, dataset.reference, dataset.seed, words))
        except InputError as error:
            raise of_record(error, sample) from error
    return degraded


def read_vocabulary(path: str | None) -> Vocabulary | None:
    """Read classes of interchangeable words from YAML; None: there is no file, each data family has its words.

    Raises:
        ConfigError: the file is not a mapping from class to a list of at least two words.
    """
    if path is None:
        return None
    try:
        classes = read_yaml(Path(path), {})
    except ConfigError as error:
        raise ConfigError(f"scorer_training.vocabulary: {error}") from error
    lists = [words for words in classes.values() if isinstance(words, list) and len(words) > 1]
    if not classes or len(lists) < len(classes) or any(type(word) not in (str, int) for word in sum(lists, [])):
        fix = "Fix: quote words such as 'true' and '1.50'"
        raise ConfigError(f"scorer_training.vocabulary: {path}: expected {{class: [word, word, ...]}}. {fix}")
    return {str(name): tuple(str(word) for word in words) for name, words in classes.items()}


def _no_samples(dataset: DatasetConfig, field: str) -> InputError:
    """Return the error of a dataset without a good sample."""
    return InputError(
        file=None if dataset.path is None else str(dataset.path),
        field=field,
        expected=f"at least one sample in {dataset.name!r}",
        found="none",
        fix="name data that holds some, or leave the dataset out",
    )


def check_unique_ids(samples: Sequence[Sample]) -> None:
    """Raise InputError where two samples have the same id: their candidates would be mixed."""
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InputError(
                sample_id=sample.id,
                field="id",
                expected="an id that no other sample of the run has",
                found=sample.id,
                fix="give each sample of all datasets an id that no other has",
            )
        seen.add(sample.id)


def draw(samples: Sequence[Sample], count: int, seed: str) -> list[Sample]:
    """Draw `count` of the samples, 0 for all, in an order that the seed decides."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    return shuffled[: count or len(shuffled)]


def draw_round(samples: Sequence[Sample], count: int, iteration: int, seed: int) -> list[Sample]:
    """Return the round's `count` samples (0 for all), from one shuffle of all: fresh ones each round, until all were used."""
    shuffled = draw(samples, 0, f"calibration/{seed}")
    count = min(count or len(shuffled), len(shuffled))
    start = (iteration - 1) * count
    return [shuffled[i % len(shuffled)] for i in range(start, start + count)]
