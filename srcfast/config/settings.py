"""Every setting of srcfast, one frozen tree: what it means, its unit, its bounds, its default.

The defaults suit a 7B LVLM on one GPU of 80 GB. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from srcfast.config.yaml import note_lines, parse_yaml, read_yaml
from srcfast.errors import ConfigError, shorten
from srcfast.units import parse_bytes

Preset = Literal["12GiB", "16GiB", "24GiB", "48GiB", "80GiB"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
PRESETS = Path(__file__).parent / "presets"


class Section(BaseModel):
    """A group of settings: nothing unknown, nothing changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def replace(self, **changes: Any) -> Self:
        """Return the same settings with some changed; they are validated again."""
        values = {name: getattr(self, name) for name in type(self).model_fields} | changes
        copy = type(self).model_validate(values)
        for name in self.__private_attributes__:
            setattr(copy, name, getattr(self, name))
        return copy

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if value is None and isinstance(kind, type) and issubclass(kind, Section):
            return {}  # a heading with nothing under it
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"expected no true or false here, found {str(value).lower()}")
        return value


class ModelConfig(Section):
    path: str = Field("embedded", description="LLaVA checkpoint directory, or `embedded` for the one shipped")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of weights and activations")
    quantize: Literal["none", "nf4"] = Field("none", description="4-bit weights of the frozen decoder")
    device: str = Field("cpu", description="`cpu`, `cuda` or `cuda:N`")
    vision_offload: bool = Field(False, description="the vision tower waits on the host while no image is encoded")


class ScorerConfig(Section):
    path: str = Field("embedded", description="R-Scorer: directory of a text LLM, or `embedded`")
    verdict: Literal["choice", "graded"] = Field("choice", description="first, tie, second; or grades 1 to 5")
    mode: Literal["pairwise", "independent"] = Field("pairwise", description="all ordered pairs, or each alone")
    token_budget: int = Field(16384, ge=64, description="most tokens in one forward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of the R-Scorer; on a GPU rather float16 than bfloat16, whose scores are an eighth as fine",
    )
    pairs: Literal["all", "adaptive"] = Field(
        "all", description="compared, of a sample's candidates; `adaptive`: those that may be best or worst"
    )
    adaptive_margin: float = Field(
        0.1,
        ge=0,
        le=1,
        description="of ratings on their own: who is within this of the best (worst) may be the best (worst)",
    )
    adaptive_contenders: int = Field(2, ge=1, le=128, description="most that may be the best, and the worst")
    adaptive_audit: float = Field(
        0.02, ge=0, le=1, description="share of samples also judged in full, to report what the short way misses"
    )


class DatasetConfig(Section):
    name: str = Field(min_length=1, description="how results call it")
    format: Literal["world", "easy_vqa", "jsonl", "llava", "vlmeval_tsv"] = Field(description="how it is read")
    path: str | None = Field(None, description="file; not for world and easy_vqa")
    image_root: str | None = Field(None, description="folder that image paths are relative to; default: the file's")
    split: str = Field("train", description="of the dataset; for a file, a name for the results")
    limit: int = Field(0, ge=0, description="samples, drawn by the seed; 0 = all (world: needed)")
    seed: int = Field(0, ge=0, description="of the draw")
    check_images: bool = Field(
        True, description="decode every image at the start, so that no run stops at a broken one"
    )
    use: tuple[Literal["rationale", "calibration"], ...] = Field(
        ("rationale", "calibration"), description="stages that a training set takes part in"
    )

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.format in ("jsonl", "llava", "vlmeval_tsv") and not self.path:
            raise ValueError(f"the dataset {self.name!r} of format {self.format} needs a path")
        if self.format == "world" and not self.limit:
            raise ValueError(f"the dataset {self.name!r} of format world has no end: set its limit")
        return self


class DataConfig(Section):
    train: tuple[DatasetConfig, ...] = Field((), description="datasets to calibrate on")
    evaluation: tuple[DatasetConfig, ...] = Field((), description="datasets to evaluate on, held out from all else")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen = set()
        for one in self.evaluation:
            if (one.name, one.split) in seen:
                raise ValueError(f"evaluation has two datasets named {one.name!r} with split {one.split!r}")
            seen.add((one.name, one.split))
        return self


class Seeded(Section):
    """Settings of something drawn at random: the seed is the run's, not a setting of the section."""

    _seed: int = PrivateAttr(0)

    @property
    def seed(self) -> int:
        """The seed that `seeded` has set, else 0."""
        return self._seed

    def seeded(self, seed: int) -> Self:
        """Return the same settings for a run of this seed."""
        copy = self.model_copy()
        copy._seed = seed
        return copy


class LoRAConfig(Seeded):
    """A new adapter on the decoder's linear layers."""

    r: int = Field(64, ge=1, le=4096, description="rank")
    alpha: float = Field(128.0, gt=0, description="scaling is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="linear layers of the decoder",
    )


class TrainingConfig(Seeded):
    """How to train: what every training stage has."""

    _deterministic: bool = PrivateAttr(False)

    epochs: int = Field(1, ge=1, description="passes over the items")
    micro_batch_size: int = Field(8, ge=1, description="most trees in a forest")
    gradient_accumulation_steps: int = Field(4, ge=1, description="micro-batches an update")
    token_budget: int = Field(16384, ge=16, description="most tokens in a forest")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps with linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="of matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="global norm to which gradients are clipped")
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1, description="where the cosine ends, share of the peak")
    optimizer: OptimizerName = Field(
        "adamw", description="PyTorch's AdamW, or bitsandbytes' with 8-bit or paged moments"
    )
    activation_checkpointing: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="layers a group that backward computes again; 0 = none; `auto`: as few as fit into memory"
    )
    loader_workers: int = Field(
        0, ge=0, le=64, description="processes that pack and read images ahead of the step; 0 = this one, in line"
    )

    @property
    def global_batch_size(self) -> int:
        """Trees an update."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def deterministic(self) -> bool:
        """Whether a GPU takes deterministic algorithms alone (`Config.deterministic`)."""
        return self._deterministic

    def seeded(self, seed: int, deterministic: bool = False) -> Self:
        """Return the same settings for a run of this seed: of the order of the items, and of what dropout drops."""
        copy = super().seeded(seed)
        copy._deterministic = deterministic
        return copy

    def loop(self) -> dict[str, Any]:
        """Return all that the training loop reads, without the settings of one stage."""
        values = {name: getattr(self, name) for name in TrainingConfig.model_fields}
        return values | {"seed": self.seed, "deterministic": self.deterministic}


class RationaleConfig(TrainingConfig):
    format: Literal["tagged", "plain"] = Field("tagged", description="visual perception tags, or none")
    samples: int = Field(0, ge=0, description="most samples; 0 = all")
    teacher: str | None = Field(None, description="JSON lines {id, rationale, answer?} of a teacher")


class CandidatesConfig(Section):
    samples: int = Field(0, ge=0, description="samples an iteration; 0 = all")
    num_candidates: int = Field(8, ge=2, le=256, description="distinct candidates a sample (N)")
    num_beams: int = Field(8, ge=1, le=256, description="beams kept after each sentence")
    proposals: int = Field(3, ge=1, le=64, description="sentences that each beam proposes")
    temperature: float = Field(1.0, gt=0, le=10, description="of sampling")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus: probability mass sampled from")
    max_sentences: int = Field(16, ge=1, description="sentences a response")
    max_sentence_tokens: int = Field(64, ge=1, description="tokens a sentence")
    max_new_tokens: int = Field(384, ge=1, description="tokens a response")
    length_penalty: float = Field(1.0, ge=0, description="log-probability is divided by tokens to this power")
    diversity: float = Field(0.5, ge=0, description="weight of the diversity term, in nats a token")
    batch_size: int = Field(8, ge=1, description="samples searched at once")
    cuda_graphs: bool = Field(True, description="replay decoding steps as CUDA graphs; on a CPU there are none")

    @property
    def width(self) -> int:
        """Rows a sample that are decoded at once."""
        return self.num_beams * self.proposals


class CurationConfig(Section):
    pairs_per_sample: int = Field(1, ge=1, description="most pairs a sample")
    pair_choice: Literal["best_against_worst", "disjoint"] = Field(
        "best_against_worst",
        description="several pairs: one best against the worst ones, or best and worst anew",
    )
    min_margin: float = Field(0.1, ge=0, le=1, description="least difference of the two scores")
    min_confidence: float = Field(0.1, ge=0, le=1, description="least confidence of the pair")
    min_rating: float = Field(0.0, ge=0, le=1, description="least rating of the chosen on its own")
    max_length_ratio: float = Field(2.0, ge=1, description="longer over shorter response, in tokens")
    weighting: Literal["confidence", "none"] = Field("confidence", description="weight of a pair in the loss")
    pairing: Literal["score", "answer", "random"] = Field("score", description="by score, or a baseline")


class DPOConfig(TrainingConfig):
    learning_rate: float = Field(1e-5, gt=0, le=1, description="peak")
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
    loss_type: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="of the reward margin")
    label_smoothing: float | Literal["confidence"] = Field(
        0.0,
        description="probability of a pair being the wrong way round, in [0, 0.5); `confidence`: (1 - c) / 2",
    )
    sft_weight: float = Field(0.1, ge=0, description="of the chosen response's mean negative log-likelihood")
    rehearsal_weight: float = Field(
        0.0, ge=0, description="of the same of stage 1's rationale-answer pairs, mixed with the pairs; calibrate only"
    )

    reuse_generation_logprobs: bool = Field(
        True,
        description="the reference's log-probabilities from the candidates, where a recheck agrees; calibrate only",
    )

    @model_validator(mode="after")
    def _smoothing_fits(self) -> Self:
        smoothing = self.label_smoothing
        if not isinstance(smoothing, str) and not 0 <= smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected confidence or a number in [0, 0.5), found {smoothing}")
        if smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing: expected 0 with loss_type {self.loss_type}, found {smoothing}")
        return self


class ScorerTrainingConfig(TrainingConfig):
    learning_rate: float = Field(1e-5, gt=0, le=1, description="peak")
    variants: int = Field(4, ge=2, le=16, description="candidates a tree: the true one and its corruptions")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the samples for the reported accuracy")
    vocabulary: str | None = Field(
        None, description="YAML of interchangeable words, {class: [word, ...]}; default: the embedded world's"
    )


class EvaluationConfig(Section):
    max_new_tokens: int = Field(384, ge=1, description="tokens a response")
    batch_size: int = Field(32, ge=1, description="samples decoded at once")
    cuda_graphs: bool = Field(True, description="replay decoding steps as CUDA graphs; on a CPU there are none")
    bootstrap_resamples: int = Field(1000, ge=100, le=100_000, description="of the 95 % intervals")
    headroom_samples: int = Field(500, ge=0, description="samples for pass@N and best-of-N; 0 = not measured")


class CheckpointConfig(Section):
    """How often a training stage is saved, beside the time when a signal stops it; what is first due counts."""

    minutes: float = Field(10.0, ge=0, description="between two saves; 0 = not by the clock")
    steps: int = Field(0, ge=0, description="between two saves; 0 = not by their number")


class DistributedConfig(Section):
    timeout_seconds: int = Field(
        600,
        ge=1,
        description="longest wait of a rank for another once all are under way; then the run ends with an error",
    )
    shard: bool = Field(
        False, description="a node's ranks share out the base's layers, for a base that no card holds alone; slower"
    )
    ranks: int = Field(0, ge=0, le=4096, description="of a node, for `estimate`; a run has those that torchrun starts")


class Config(Section):
    """All settings of a run."""

    name: str = Field("srcfast", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run lies in output/name")
    output: str = Field("runs", min_length=1, description="folder of the runs")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything random")
    deterministic: bool = Field(
        False,
        description="on a GPU trainings come out the same, bit for bit, in every run and continued; slower: attention's "
        "backward pass, sums by index, and each step encodes its images anew. On a CPU they do either way",
    )
    iterations: int = Field(1, ge=0, le=100, description="rounds of candidates, scores, curation and DPO (K)")
    max_rejected: int | float = Field(
        1000,
        ge=0,
        description="most bad samples before the run stops: a count, or (with a decimal point) a share",
    )
    quiet: bool = Field(False, description="no progress, no tables")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = all")
    preset: Preset | None = Field(
        None, description="settings for a 7B LVLM on a GPU of this memory, beneath all others: srcfast/config/presets"
    )
    memory: str | None = Field(None, description="what the run may take of its device, such as 12GiB; default: all")
    model: ModelConfig = ModelConfig()
    scorer: ScorerConfig = ScorerConfig()
    data: DataConfig = DataConfig()
    lora: LoRAConfig = LoRAConfig()
    rationale: RationaleConfig = RationaleConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    curation: CurationConfig = CurationConfig()
    dpo: DPOConfig = DPOConfig()
    scorer_training: ScorerTrainingConfig = ScorerTrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _rejected_fits(self) -> Self:
        if isinstance(self.max_rejected, float) and self.max_rejected > 1:
            raise ValueError(
                f"max_rejected: expected a whole number or a share of at most 1, found {self.max_rejected}"
            )
        return self

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value, "memory")
        return value

    @property
    def run_path(self) -> Path:
        """Where the run lies."""
        return Path(self.output) / self.name


# Reading ----------------------------------------------------------------------------------------------------


def load_config(path: str | Path | None, overrides: Sequence[str] = (), section: str | None = None) -> Config:
    """Settings from a YAML file and from `key=value` words, which come last and win.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: dotted keys with YAML values: `dpo.beta=0.2`, `lora={r: 8, alpha: 16}`.
        section: a stage's section; a key is looked up there first, then from the root.

    Raises:
        ConfigError: an unknown setting (naming the nearest known one) or a repeated one, a value of the wrong
            kind or out of bounds, or no YAML; with file and line.
    """
    return load_with_sources(path, overrides, section)[0]


def load_with_sources(
    path: str | Path | None, overrides: Sequence[str] = (), section: str | None = None
) -> tuple[Config, dict[str, str]]:
    """`load_config`, and where each setting that is no default was set: dotted key -> preset, file and line, or override."""
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        tree = read_yaml(Path(path), sources)
    for word in overrides:
        key, value = _read_override(word, section)
        sources.update(dict.fromkeys([key, *_dotted(value, key)], f"override {word!r}"))
        _assign(tree, key.split("."), value, word)
    preset = _preset(tree)
    try:
        config = Config.model_validate(_over(preset, tree))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(one, sources) for one in error.errors()))) from None
    below = {key: f"preset {config.preset}" for name in preset for key in (name, *_dotted(preset[name], name))}
    return config, below | sources


def _preset(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of the preset that a tree names, if it names one that there is."""
    name = tree.get("preset")
    return read_yaml(PRESETS / f"{name}.yaml", {}) if name in get_args(Preset) else {}


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two trees as one: what is above wins, section by section."""
    found = dict(below)
    for key, value in above.items():
        held = found.get(key)
        if isinstance(held, dict) and value is None:
            continue  # a heading with nothing under it
        found[key] = _over(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return found


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all settings; sections before what is in them."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _read_override(word: str, section: str | None) -> tuple[str, Any]:
    """(full dotted key, value) of `key=value`."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r}: expected key=value, found no '='")
    known = known_keys()
    if section is not None and f"{section}.{key}" in known:
        key = f"{section}.{key}"
    elif key.startswith(("data.train.", "data.evaluation.")):
        whole = ".".join(key.split(".")[:2])
        raise ConfigError(f"override {word!r}: expected {whole} as a whole list, found a part of one")
    elif key not in known:
        raise ConfigError(f"override {word!r}: {_unknown(key, section)}")
    return key, parse_yaml(text, f"override {word!r}", lambda node: note_lines(node, f"{key}.", Path(word), {}))


def _assign(tree: dict[str, Any], keys: Sequence[str], value: Any, word: str) -> None:
    """Set a value within nested mappings; a mapping is merged into the one that is there."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {word!r}: expected {key} to be a section, found {tree!r} in the file")
    last, held = keys[-1], tree.get(keys[-1])
    tree[last] = held | value if isinstance(held, dict) and isinstance(value, dict) else value


def _dotted(value: Any, prefix: str) -> list[str]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in pairs:
        found += [f"{prefix}.{key}", *_dotted(inner, f"{prefix}.{key}")]
    return found


def _unknown(key: str, section: str | None = None) -> str:
    """The error's text: the nearest known dotted key, by its whole name or by its last part."""
    known = known_keys()
    parent = key.rpartition(".")[0]
    dataset = parent.startswith(("data.train.", "data.evaluation."))
    if dataset:
        known = [f"{parent}.{name}" for name in DatasetConfig.model_fields]
    tries = [key] if section is None else [f"{section}.{key}", key]
    scored = [
        (difflib.SequenceMatcher(None, wanted, name).ratio(), -place, name)
        for place, wanted in enumerate(tries)
        for name in known
    ]
    last = key.rpartition(".")[2]
    if not dataset:
        # A setting under the wrong section: the same last part counts nearly as much as the same name.
        tails = [(difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio(), name) for name in known]
        scored += [(0.95 * ratio, -len(tries), name) for ratio, name in tails]
    return f"unknown setting {key!r}; the nearest known one is {max(scored)[2]!r}"


def _explain(error: Any, places: dict[str, str]) -> str:
    """One validation error in words: where, which setting, what was expected, what was found."""
    location = [str(part) for part in error["loc"]]
    known, dotted = known_keys(), ".".join(location)
    while location and dotted not in places and dotted not in known:  # pydantic appends the union's branch
        location.pop()
        dotted = ".".join(location)
    place = next((places[key] for key in _ancestors(dotted) if key in places), None)
    where = f"{place}: " if place else ""
    if error["type"] == "extra_forbidden":
        return where + _unknown(dotted)
    if error["type"] == "invalid_key":
        return f"{where}{dotted + ': ' if dotted else ''}expected the name of a setting, found {error['input']!r}"
    if error["type"] == "missing":
        return f"{where}{'.'.join(str(part) for part in error['loc'])}: expected a value, found none"
    if error["type"] == "value_error":
        return f"{where}{dotted + ': ' if dotted else ''}{error['ctx']['error']}"
    field = _field(dotted)
    bounds = "" if field is None else _bounds(field)
    expected = error["msg"].removeprefix("Input should be ")
    if error["type"] == "model_type":
        expected = "a group of settings (key: value)"
    if bounds and field is not None:
        expected = f"{'a whole number' if field.annotation is int else 'a number'} {bounds}"
    return f"{where}{dotted}: expected {expected}, found {shorten(repr(error['input']))}"


def _ancestors(dotted: str) -> list[str]:
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _field(dotted: str) -> FieldInfo | None:
    """The definition of a setting; that of a dataset's for `data.train.0.limit`."""
    parts = dotted.split(".")
    if parts[:2] in (["data", "train"], ["data", "evaluation"]) and len(parts) == 4:
        return DatasetConfig.model_fields.get(parts[3])
    model: type[BaseModel] = Config
    for parent in parts[:-1]:
        field = model.model_fields.get(parent)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):
            return None
        model = field.annotation
    return model.model_fields.get(parts[-1])


def _bounds(field: FieldInfo) -> str:
    """`> 0 and <= 1`; empty for a setting without bounds."""
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    return " and ".join(
        f"{sign} {value}"
        for limit in field.metadata
        for attribute, sign in signs
        if (value := getattr(limit, attribute, None)) is not None
    )
