"""From settings to what they name: datasets, the policy in memory, the R-Scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from srcfast import distributed
from srcfast.config.settings import Config, LoRAConfig
from srcfast.data.records import Preference, Sample
from srcfast.memory.forecast import image_cache, images_at_once
from srcfast.memory.model_sizes import ModelSizes, limit_memory, memory_of, release_unused
from srcfast.memory.plan import policy_stays
from srcfast.models import LVLM, ImageFeatures, load_lvlm
from srcfast.models.checkpoint import model_hash
from srcfast.models.lora import adapter_hash, adapters, apply_lora, check_adapter_changes, save_adapter
from srcfast.models.scorer import Scorer, load_scorer
from srcfast.stages.prompts import image_loader
from srcfast.training.determinism import prepare_determinism
from srcfast.units import parse_bytes


class Policy:
    """The LVLM in memory with one adapter at a time, and the records' encoded images."""

    def __init__(self, config: Config, records: Sequence[Sample | Preference], adapter: Path | None = None) -> None:
        self.config = config
        self.adapter: Path | None = None
        self._model: LVLM | None = load_model(config, None)
        self.features = features_of(self._model, records)
        self.use(adapter)

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

    def use(self, adapter: Path | None, *, to_train: bool = False) -> LVLM:
        """Return the model with this adapter, trainable, or the bare base.

        Raises:
            InputError: the adapter changes nothing, unless it is to be trained.
        """
        if adapter != self.adapter:
            self._adapt(adapter)
            if adapter is not None and not to_train:
                check_adapter_changes(self.model, adapter)
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

    def save(self, directory: Path) -> None:
        """Write the adapter that was trained, and free the gradients, which no later stage needs."""
        if distributed.is_rank_zero():
            directory.mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, directory)
        self.adapter = directory
        self.model.zero_grad(set_to_none=True)

    def offload(self) -> None:
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
            self.features.clear()
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
        check_adapter_changes(model, lora)
    if config.model.vision_offload:
        model.vision.to_host()
    return model


def features_of(model: LVLM, records: Sequence[Sample | Preference]) -> ImageFeatures:
    """The records' encoded images, kept in memory up to a limit."""
    sizes = ModelSizes.of(model)
    room = memory_of(next(model.parameters()).device)
    return ImageFeatures(model, image_loader(records), image_cache(room), images_at_once(sizes, room))


def load_scorer_for(config: Config, lora: LoRAConfig | None = None) -> Scorer:
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
