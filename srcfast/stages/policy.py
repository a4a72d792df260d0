"""Load the models that the settings name: the policy with its adapter and encoded images, the R-Scorer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from srcfast import distributed
from srcfast.config.settings import Config, LoRAConfig
from srcfast.data.records import Preference, Sample
from srcfast.memory.forecast import image_cache, images_at_once
from srcfast.memory.model_sizes import ModelSizes, limit_memory, memory_of, release_unused
from srcfast.memory.plan import policy_stays
from srcfast.models import AnyLVLM, ImageFeatures, load_lvlm
from srcfast.models.checkpoint import model_hash
from srcfast.models.lora import adapter_hash, apply_lora, check_adapter_changes, remove_adapter, save_adapter
from srcfast.models.scorer import Scorer, load_scorer
from srcfast.stages.prompts import image_loader
from srcfast.training.determinism import prepare_determinism
from srcfast.units import parse_bytes


class Policy:
    """The LVLM in memory with one adapter at a time, and the records' encoded images."""

    def __init__(self, config: Config, records: Sequence[Sample | Preference], adapter: Path | None = None) -> None:
        self.config = config
        self.adapter: Path | None = None
        self._unsaved = False  # whether the adapter is one that no directory holds
        self._model: AnyLVLM | None = load_model(config, None)
        self.features = features_of(self._model, records)
        self.use(adapter)

    @property
    def model(self) -> AnyLVLM:
        """The LVLM; read again, as the bare base, after `offload`."""
        if self._model is None:
            self._model = load_model(self.config, None)
            self.features.model = self._model
        return self._model

    @property
    def in_memory(self) -> bool:
        """Whether the model is loaded: not after `offload`, until something needs it."""
        return self._model is not None

    def use(self, adapter: Path | None, *, to_train: bool = False) -> AnyLVLM:
        """Return the model with this adapter, trainable, or the bare base.

        Raises:
            InputError: the adapter changes nothing, unless it is to be trained.
        """
        if adapter != self.adapter or self._unsaved:
            self._adapt(adapter)
            if adapter is not None and not to_train:
                check_adapter_changes(self.model, adapter)
            self.adapter, self._unsaved = adapter, False
        return self.model

    def fresh(self) -> AnyLVLM:
        """Return the model with a new adapter, initialised from the config's seed."""
        self._adapt(self.config.lora.seeded(self.config.seed))
        self.adapter, self._unsaved = None, True
        return self.model

    def hash(self) -> str:
        """Return the hash that names whose log-probabilities these are; see `policy_hash`."""
        return policy_hash(self.config, self.model, self.adapter)

    def save(self, directory: Path) -> None:
        """Write the adapter that was trained, and free the gradients, which no later stage needs."""

        def write() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, directory)

        distributed.run_on_rank_zero(write)
        self.adapter, self._unsaved = directory, False
        self.model.adapter_path = directory
        self.model.zero_grad(set_to_none=True)

    def offload(self) -> None:
        """Free the model where it does not fit into memory beside the R-Scorer; what needs it next reads it again.

        Encoded images stay.
        """
        # All ranks decide alike, though one may have less memory: a sharded model is read by all ranks together.
        if self._model is None or all(distributed.gather(policy_stays(self.config))):
            return
        del self.features.model
        self._model = self.adapter = None
        self._unsaved = False
        release_unused(self.config.model.device)

    def end_stage(self) -> None:
        """Free a GPU's memory beyond the model: the plan of the next stage counts on it."""
        if torch.device(self.config.model.device).type == "cuda":
            self.features.clear()
            release_unused(self.config.model.device)

    def _adapt(self, lora: Path | LoRAConfig | None) -> None:
        """Replace the adapter on the same base: no weight is read again, and no second model is ever in memory."""
        remove_adapter(self.model)
        apply_lora(self.model, lora)


def load_model(config: Config, lora: Path | LoRAConfig | None) -> AnyLVLM:
    """Load the LVLM of the settings.

    Args:
        config: model, quantization, dtype, device, sharding.
        lora: a saved adapter's directory, or the settings of a new one; None: the bare base.

    Raises:
        InputError: a saved adapter changes nothing.
    """
    _set_up_device(config)
    model = load_lvlm(
        config.model.path,
        quantize=None if config.model.quantize == "none" else config.model.quantize,
        dtype=getattr(torch, config.model.dtype),
        device=config.model.device,
        lora=lora,
        shard=config.distributed.shard,
        backbone=config.model.backbone,
    )
    if isinstance(lora, Path):
        check_adapter_changes(model, lora)
    if config.model.vision_offload:
        model.vision.to_host()
    return model


def features_of(model: AnyLVLM, records: Sequence[Sample | Preference]) -> ImageFeatures:
    """Return the records' encoded images, cached in memory up to a limit."""
    sizes = ModelSizes.of(model)
    capacity = memory_of(next(model.parameters()).device)  # bytes
    return ImageFeatures(model, image_loader(records), image_cache(capacity), images_at_once(sizes, capacity))


def load_scorer_for(config: Config, to_train: bool = False) -> Scorer:
    """Load the R-Scorer of the settings; one that is to be trained reads a trained R-Scorer's prompt."""
    _set_up_device(config)
    settings = config.scorer
    scorer = load_scorer(
        settings.path,
        verdict_form=settings.verdict,
        quality=settings.reference,
        prompt="trained" if to_train else settings.prompt,
        dtype=getattr(torch, settings.dtype),
        device=config.model.device,
    )
    if scorer.prompt_kind == "instructions" and settings.prompt == "auto" and distributed.is_rank_zero():
        text = "no record of training is beside it, so it gets instructions in its chat template"
        warnings.warn(
            f"scorer.path: {settings.path}: {text}. scorer.prompt says otherwise, and silences this", stacklevel=2
        )
    return scorer


def _set_up_device(config: Config) -> None:
    """Set threads, determinism and the memory limit; before a model is loaded, and so before the device's first product."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        prepare_determinism()
    limit_memory(None if config.memory is None else parse_bytes(config.memory, "memory"), config.model.device)


def policy_hash(config: Config, model: AnyLVLM, adapter: Path | None) -> str:
    """Return the hashes of base and adapter, with dtype and quantization: these decide a log-probability."""
    adapter_name = "none" if adapter is None else adapter_hash(adapter)
    return f"base:{model_hash(model.path)} adapter:{adapter_name} {config.model.dtype} {config.model.quantize}"
