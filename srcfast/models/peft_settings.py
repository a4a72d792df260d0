"""What the settings of a PEFT adapter mean for each layer, by the rules of PEFT 0.21; what is not computed is refused.

Fields are allowed by name and value: an unknown one, or one of a later PEFT, is refused unless it is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srcfast.errors import InputError

WAY_OUT = "merge the adapter into its base with PEFT (merge_and_unload), and use the merged model as the base"
# Fields that change nothing of what a trained adapter computes.
WITHOUT_EFFECT = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",  # the module of Megatron's layers, which `megatron_config` asks for
    "qalora_group_size",  # of `use_qalora`
    "runtime_config",  # where an adapter is computed
    # Of initial values; those that change the base are refused by `init_lora_weights`.
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
# Ways to draw initial values that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it.
INITIAL_VALUES = (True, False, None, "gaussian", "eva", "orthogonal")


def _is_pattern(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(_is_regex(key) for key in value))


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) <= 10_000 and re.compile(value) is not None
    except re.error:
        return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 4096


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


def _are_layers(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value))


# Fields that are computed: whether a value fits, and what fits.
COMPUTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a rank, a whole number from 1 to 4096"),
    "lora_alpha": (_is_alpha, "a number above 0"),
    "lora_dropout": (lambda share: type(share) in (int, float) and 0 <= share < 1, "a share from 0 to below 1"),
    "use_rslora": (lambda value: value is None or type(value) is bool, "true or false"),
    "target_modules": (lambda value: _is_regex(value) or _are_names(value), "a regular expression, or names"),
    "exclude_modules": (
        lambda value: value is None or _is_regex(value) or _are_names(value),
        "a regular expression, or names",
    ),
    "rank_pattern": (
        lambda value: _is_pattern(value) and all(map(_is_rank, (value or {}).values())),
        "ranks from 1 to 4096 by pattern",
    ),
    "alpha_pattern": (
        lambda value: _is_pattern(value) and all(map(_is_alpha, (value or {}).values())),
        "numbers above 0 by pattern",
    ),
    "layers_to_transform": (_are_layers, "a layer's number, or numbers"),
    "layers_pattern": (lambda value: value is None or _is_regex(value) or _are_names(value), "names of module lists"),
}
# Fields that have one value, beside those that are off.
FIXED: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITIAL_VALUES}


@dataclass(frozen=True)
class PeftSettings:
    """The settings that are computed; fields as in PEFT's LoraConfig."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool | None = False
    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] | None = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    @classmethod
    def read(cls, settings: Mapping[str, Any], file: Path) -> PeftSettings:
        """Read an adapter's config.

        Raises:
            InputError: a field is missing, has no such value, or makes PEFT compute what srcfast does not.
        """
        for name, value in {
            "peft_type": None,
            "r": None,
            "lora_alpha": None,
            "target_modules": None,
            **settings,
        }.items():
            if name in COMPUTED:
                fits, expected = COMPUTED[name]
                if not fits(value):
                    raise InputError(file=file, field=name, expected=expected, found=repr(value)[:200])
            elif name in FIXED:
                # By identity: 1 is no True.
                if not any(value is one or (isinstance(value, str) and value == one) for one in FIXED[name]):
                    allowed = ", ".join(map(repr, FIXED[name]))
                    raise InputError(file=file, field=name, expected=allowed, found=repr(value)[:200], fix=WAY_OUT)
            elif name not in WITHOUT_EFFECT and value not in (None, False, "", [], {}):
                expected = "no setting that srcfast does not compute"
                raise InputError(file=file, field=name, expected=expected, found=repr(value)[:200], fix=WAY_OUT)
        values = {name: settings[name] for name in COMPUTED if name in settings}
        if isinstance(values["target_modules"], str) and values.get("layers_to_transform") is not None:
            expected = "none where target_modules is a regular expression"
            raise InputError(file=file, field="layers_to_transform", expected=expected, found="numbers")
        return cls(**values)

    def targets(self, name: str) -> bool:
        """Return whether PEFT adapts the linear of this name in the base, such as "model.layers.0.self_attn.q_proj"."""
        if self.exclude_modules and _matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            return True
        if not _matches(self.target_modules, name):
            return False
        if (
            isinstance(self.target_modules, str)
            or name in self.target_modules
            or self.layers_to_transform in (None, [])
        ):
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns or ()] or [r".*?\.[^.]*\.(\d+)\."]
        number = next((match[1] for match in (re.match(one, name) for one in expressions) if match), None)
        layers = self.layers_to_transform
        return number is not None and int(number) in ([layers] if isinstance(layers, int) else layers or ())

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """Return a layer's rank r and the alpha by which it is scaled alpha / r; that of rsLoRA is scaled alpha / sqrt(r)."""
        rank = _by_pattern(self.rank_pattern, name, self.r)
        alpha = float(_by_pattern(self.alpha_pattern, name, self.lora_alpha))
        return rank, alpha * math.sqrt(rank) if self.use_rslora else alpha


def _matches(modules: str | Sequence[str], name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return name in modules or any(name.endswith(f".{one}") for one in modules)


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first key that matches a name's end."""
    values = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(values, default)
