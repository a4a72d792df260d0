"""From settings to what they name: datasets, the policy in memory, the R-Scorer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from srcfast import distributed
from srcfast.config.settings import Config, DatasetConfig, LoRAConfig
from srcfast.data.readers import check_rejected, read_samples
from srcfast.data.records import Preference, Sample
from srcfast.errors import ConfigError, InputError
from srcfast.memory.forecast import image_cache, images_at_once
from srcfast.memory.model_sizes import ModelSizes, limit_memory, memory_of, release_unused
from srcfast.memory.plan import policy_stays
from srcfast.models import LVLM, ImageFeatures, load_lvlm
from srcfast.models.checkpoint import model_hash
from srcfast.models.lora import adapter_hash, adapters, apply_lora, refuse_idle_adapter
from srcfast.models.scorer import Scorer, load_scorer
from srcfast.stages.rationale import Rap, build_raps, image_loader, read_teacher
from srcfast.training.determinism import prepare_determinism
from srcfast.units import parse_bytes
from srcfast.world.easy_vqa import read_easy_vqa
from srcfast.world.samples import world_samples


@contextmanager
def on_all_ranks(config: Config) -> Iterator[Config]:
    """The settings as this rank has them, among the ranks that `torchrun` has started: only rank 0 shows progress."""
    with distributed.process_group(timedelta(seconds=config.distributed.timeout_seconds), config.model.device):
        yield config if distributed.is_main() else config.model_copy(update={"quiet": True})


@dataclass(frozen=True)
class EvaluationSet:
    """Samples held out from all else."""

    name: str
    split: str
    samples: list[Sample]


def read_dataset(dataset: DatasetConfig, image_dir: Path, rejected: list[dict[str, Any]]) -> list[Sample]:
    """A dataset's samples; bad records go to `rejected`. The world's images are drawn into `image_dir`."""
    if dataset.format == "world":
        return world_samples(dataset.split, dataset.limit, dataset.seed, image_dir=image_dir)
    if dataset.format == "easy_vqa":
        return read_easy_vqa(dataset.split, dataset.limit or None, dataset.seed)
    path = Path(dataset.path or "")
    root = path.parent if dataset.image_root is None else Path(dataset.image_root)
    samples = read_samples(
        path, format=dataset.format, image_root=root, rejected=rejected, check_images=dataset.check_images
    )
    if 0 < dataset.limit < len(samples):
        samples = random.Random(f"{dataset.name}/{dataset.seed}").sample(samples, dataset.limit)
    return samples


def read_training_samples(config: Config, use: str, image_dir: Path, rejected: list[dict[str, Any]]) -> list[Sample]:
    """The samples of all training sets that take part in `use` ("rationale" or "calibration").

    Raises:
        ConfigError: no training set takes part.
        InputError: more bad samples than `max_rejected`, or none left, or an id that two sets share.
    """
    sets = [one for one in config.data.train if use in one.use]
    if not sets:
        raise ConfigError(f"data.train: expected a dataset with use {use!r}, found none. Mend: name one")
    own: list[dict[str, Any]] = []
    samples = [sample for one in sets for sample in read_dataset(one, image_dir, own)]
    check_rejected(own, len(own) + len(samples), config.max_rejected)
    known = {(row["file"], row["line"]) for row in rejected}
    rejected += [row for row in own if (row["file"], row["line"]) not in known]
    refuse_shared_ids(samples)
    return samples


def read_evaluation_sets(config: Config, image_dir: Path, rejected: list[dict[str, Any]]) -> list[EvaluationSet]:
    """The evaluation sets, in the config's order. Raises InputError where one is empty."""
    found = []
    for one in config.data.evaluation:
        own: list[dict[str, Any]] = []
        samples = read_dataset(one, image_dir, own)
        check_rejected(own, len(own) + len(samples), config.max_rejected)
        rejected += own
        if not samples:
            raise InputError(
                file=one.path,
                field="data.evaluation",
                expected=f"at least one sample in {one.name!r}",
                found="none",
                mend="name data that holds some, or leave the dataset out",
            )
        found.append(EvaluationSet(one.name, one.split, samples))
    return found


def refuse_shared_ids(samples: Sequence[Sample]) -> None:
    """Raises InputError where two samples have one id: their candidates would be mixed."""
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InputError(
                sample_id=sample.id,
                field="id",
                expected="an id that no other sample of the run has",
                found=sample.id,
                mend="give the samples of all datasets ids of their own",
            )
        seen.add(sample.id)


def draw(samples: Sequence[Sample], count: int, seed: str) -> list[Sample]:
    """`count` of the samples in an order drawn by the seed; 0 for all."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    return shuffled[: count or len(shuffled)]


def draw_round(samples: Sequence[Sample], count: int, iteration: int, seed: int) -> list[Sample]:
    """`count` fresh samples each round (0 for all), from one shuffle; they begin anew once all had their turn."""
    shuffled = draw(samples, 0, f"calibration/{seed}")
    count = min(count or len(shuffled), len(shuffled))
    start = (iteration - 1) * count
    return [shuffled[i % len(shuffled)] for i in range(start, start + count)]


def rationale_pairs(config: Config, samples: Sequence[Sample]) -> tuple[list[Rap], Counter[str]]:
    """The rationale-answer pairs that stage 1 trains on, and how many samples were dropped for which reason.

    Raises:
        InputError: no sample gives a pair.
    """
    section = config.rationale
    teacher = None if section.teacher is None else read_teacher(section.teacher)
    raps, dropped = build_raps(draw(samples, section.samples, f"rationale/{config.seed}"), section.format, teacher)
    if not raps:
        raise InputError(
            field="rationale",
            expected="samples with facts or a rationale",
            found=f"dropped: {dict(dropped)}",
            mend="add facts or rationales, or name a teacher's file: rationale.teacher=FILE.jsonl",
        )
    return raps, dropped


class Policy:
    """The LVLM in memory with one adapter at a time, and the records' encoded images."""

    def __init__(self, config: Config, records: Sequence[Sample | Preference]) -> None:
        self.config = config
        self.adapter: Path | None = None
        self._model: LVLM | None = load_model(config, None)
        self.features = features_of(self._model, records)

    @property
    def model(self) -> LVLM:
        """Read again if it was set aside: the bare base then."""
        if self._model is None:
            self._model = load_model(self.config, None)
            self.features.model = self._model
        return self._model

    @property
    def in_memory(self) -> bool:
        return self._model is not None

    def use(self, adapter: Path | None) -> LVLM:
        """The model with this adapter, trainable, or the bare base."""
        if adapter != self.adapter:
            self._adapt(adapter)
            if adapter is not None:
                refuse_idle_adapter(self.model, adapter)
            self.adapter = adapter
        return self.model

    def fresh(self) -> LVLM:
        """The model with a new adapter, drawn by the config's seed."""
        self._adapt(self.config.lora.seeded(self.config.seed))
        self.adapter = None
        return self.model

    def hash(self) -> str:
        """Names base and adapter, and how they are computed with: whose log-probabilities these are."""
        return policy_hash(self.config, self.model, self.adapter)

    def make_room(self) -> None:
        """Set the model aside where it does not fit into memory beside the R-Scorer; what needs it next reads it again.

        Encoded images stay.
        """
        # All ranks alike, though one may have less memory: what needs the model next reads it together where it is shared out.
        if self._model is None or all(distributed.gather(policy_stays(self.config))):
            return
        del self.features.model
        self._model = self.adapter = None
        release_unused(self.config.model.device)

    def end_stage(self) -> None:
        """Give back to a GPU what the stage had: the next one is planned with all that the model leaves free."""
        if torch.device(self.config.model.device).type == "cuda":
            self.features.forget()
            release_unused(self.config.model.device)

    def _adapt(self, lora: Path | LoRAConfig | None) -> None:
        """Another adapter on the same base: no weight is read again, and no second model is ever in memory."""
        remove_adapter(self.model)
        apply_lora(self.model, lora)


def remove_adapter(model: LVLM) -> None:
    """The bare base again, as it was."""
    for name, layer in adapters(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.decoder.get_submodule(parent), last, layer.base)


def load_model(config: Config, lora: Path | LoRAConfig | None, to_train: bool = False) -> LVLM:
    """The LVLM of the settings. Unless it is to be trained, InputError where a saved adapter changes nothing."""
    _set_up_device(config)
    model = load_lvlm(
        config.model.path,
        quantize=None if config.model.quantize == "none" else config.model.quantize,
        dtype=getattr(torch, config.model.dtype),
        device=config.model.device,
        lora=lora,
        shard=config.distributed.shard,
    )
    if isinstance(lora, Path) and not to_train:
        refuse_idle_adapter(model, lora)
    if config.model.vision_offload:
        model.vision.rest()
    return model


def features_of(model: LVLM, records: Sequence[Sample | Preference]) -> ImageFeatures:
    """The records' encoded images, kept in memory up to a limit."""
    sizes = ModelSizes.of(model)
    room = memory_of(next(model.parameters()).device)
    return ImageFeatures(model, image_loader(records), image_cache(room), images_at_once(sizes, room))


def load_judge(config: Config, lora: LoRAConfig | None = None) -> Scorer:
    """The R-Scorer of the settings."""
    _set_up_device(config)
    dtype = getattr(torch, config.scorer.dtype)
    return load_scorer(
        config.scorer.path, verdict_form=config.scorer.verdict, dtype=dtype, device=config.model.device, lora=lora
    )


def _set_up_device(config: Config) -> None:
    """Limits the memory; before a model is loaded, and so before the device's first product."""
    if config.deterministic:
        prepare_determinism()
    limit_memory(None if config.memory is None else parse_bytes(config.memory, "memory"), config.model.device)


def policy_hash(config: Config, model: LVLM, adapter: Path | None) -> str:
    """Names base and adapter, and how they are computed with: whose log-probabilities these are."""
    added = "none" if adapter is None else adapter_hash(adapter)
    return f"base:{model_hash(model.path)} adapter:{added} {config.model.dtype} {config.model.quantize}"
